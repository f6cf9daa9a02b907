"""OpSpecs of the losses of a linear head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._spec import Case, OpSpec, register, tensor_bytes
from ..blocks.linear import wide_dtype
from . import linear_loss, linear_topk
from .linear_losses import linear_cross_entropy, linear_jsd, linear_kl

# The same in plain PyTorch: the logits of student and teacher in full, in float32 from the products on.


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    wide = wide_dtype(x.dtype)
    z = scale * F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(wide)
    return z if cap is None else cap * (z / cap).tanh()


def _cross_entropy(
    input, weight, target, bias=None, *, label_smoothing=0.0, ignore_index=-100, reduction="mean", num_items=None,
    logit_scale=1.0, softcap=None, chunk_size=None,
) -> Tensor:  # fmt: skip
    z = _logits(input, weight, bias, logit_scale, softcap)
    rows = F.cross_entropy(
        z.flatten(0, -2), target.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    if reduction == "none":
        return rows.view(target.shape)
    count = (target != ignore_index).sum().clamp_min(1) if num_items is None else num_items
    return rows.sum() / (1 if reduction == "sum" else count)


def divergence(z: Tensor, v: Tensor, beta: float) -> Tensor:
    """Rows of the generalised Jensen-Shannon divergence of logits."""
    lq, lp = z.log_softmax(-1), v.log_softmax(-1)
    if beta == 0:
        return (lp.exp() * (lp - lq)).sum(-1)
    if beta == 1:
        return (lq.exp() * (lq - lp)).sum(-1)
    mix = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    return beta * (lp.exp() * (lp - mix)).sum(-1) + (1 - beta) * (lq.exp() * (lq - mix)).sum(-1)


def _topk(z: Tensor, ids: Tensor, logprobs: Tensor, mode: str) -> Tensor:
    lq, lp = z.log_softmax(-1).gather(-1, ids), logprobs.to(z.dtype)
    if mode == "renorm":
        lp = lp.log_softmax(-1)
    loss = (lp.exp() * (lp - lq)).sum(-1)
    if mode == "tail":
        theirs, mine = ((1 - x.exp().sum(-1)).clamp_min(linear_topk.FLOOR) for x in (lp, lq))
        loss = loss + theirs * (theirs.log() - mine.log())
    return loss


def _jsd(
    student_input, student_weight, teacher_input=None, teacher_weight=None, target=None, *, student_bias=None,
    teacher_bias=None, teacher_logits=None, topk_ids=None, topk_logprobs=None, topk_mode="tail", beta=0.5,
    temperature=1.0, t_square=False, ce_weight=0.0, jsd_weight=1.0, ignore_index=-100, reduction="batchmean",
    num_items=None, logit_scale=1.0, softcap=None, teacher_logit_scale=1.0, teacher_softcap=None, vocab_size=None,
    chunk_size=None,
) -> Tensor:  # fmt: skip
    z = _logits(student_input, student_weight, student_bias, logit_scale, softcap)
    if teacher_input is not None:
        v = _logits(teacher_input, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    elif teacher_logits is not None:
        v = teacher_logits.to(z.dtype)
    if topk_ids is not None:
        soft = _topk(z, topk_ids, topk_logprobs, topk_mode)
    else:
        soft = divergence(z / temperature, v / temperature, beta)
    soft = jsd_weight * (temperature**2 if t_square else 1) * soft / (z.shape[-1] if reduction == "mean" else 1)
    valid = torch.ones_like(soft) if target is None else (target != ignore_index).to(soft.dtype)
    rows = soft * valid
    if ce_weight:
        hard = F.cross_entropy(z.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction="none")
        rows = rows + ce_weight * hard.view(rows.shape)
    if reduction == "none":
        return rows
    return rows.sum() / (1 if reduction == "sum" else valid.sum().clamp_min(1))


def _kl(*args, kl_weight=1.0, **kwargs) -> Tensor:
    return _jsd(*args, beta=0.0, jsd_weight=kl_weight, **kwargs)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0) + 11)
    rows, width, classes = case["batch"], case["width"], case["classes"]
    x = torch.randn(rows, width, generator=random)
    weight = 2 * torch.randn(classes, width, generator=random) / width**0.5
    bias = torch.randn(classes, generator=random) if case.get("bias") else None
    target = torch.randint(classes, (rows,), generator=random)
    if case.get("ignored"):
        target[: case["ignored"]] = -100
    parameters = wide_dtype(dtype) if case.get("mixed") else dtype
    found = dict(x=x.to(device, dtype), weight=weight.to(device, parameters), target=target.to(device))
    found["bias"] = None if bias is None else bias.to(device, parameters)
    found["options"] = {k: case[k] for k in ("reduction", "logit_scale", "softcap", "chunk_size") if k in case}
    return found | dict(random=random)


def _build_cross_entropy(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    made = _build(case, dtype, device)
    return dict(
        input=made["x"], weight=made["weight"], target=made["target"], bias=made["bias"],
        label_smoothing=case.get("smoothing", 0.0), **made["options"],
    )  # fmt: skip


def _build_divergence(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    made, (rows, classes) = _build(case, dtype, device), (case["batch"], case["classes"])
    random, wider, kind = made["random"], case.get("teacher_width", case["width"]), case.get("teacher", "head")
    kwargs = dict(student_input=made["x"], student_weight=made["weight"], student_bias=made["bias"])
    if case.get("target", True):
        kwargs["target"] = made["target"]
    logits = torch.randn(rows, classes, generator=random) * 3
    if kind == "head":
        kwargs["teacher_input"] = torch.randn(rows, wider, generator=random).to(device, dtype)
        head = 2 * torch.randn(classes, wider, generator=random) / wider**0.5
        kwargs["teacher_weight"] = head.to(device, made["weight"].dtype)
        if case.get("bias"):
            kwargs["teacher_bias"] = torch.randn(classes, generator=random).to(device, made["weight"].dtype)
    elif kind == "logits":
        kwargs["teacher_logits"] = logits.to(device, dtype)
    else:
        # Distinct classes a row, not the most probable ones: that leaves some probability to both tails.
        ids = torch.rand(rows, classes, generator=random).argsort(1)[:, : max(1, min(case.get("k", 4), classes - 1))]
        kwargs["topk_ids"] = ids.to(device)
        kwargs["topk_logprobs"] = logits.log_softmax(1).gather(1, ids).to(device, wide_dtype(dtype))
        kwargs["topk_mode"] = kind
    for name in ("temperature", "t_square", "ce_weight", "beta", "jsd_weight", "kl_weight"):
        if name in case and not (name == "temperature" and "topk_ids" in kwargs):
            kwargs[name] = case[name]
    if not case.get("target", True):
        kwargs.pop("ce_weight", None)
    return kwargs | made["options"]


def _law_cross_entropy(kwargs: dict) -> None:
    """The order of the classes is free, and so is where the rows are cut."""
    loss = linear_cross_entropy(**kwargs)
    target, classes = kwargs["target"], len(kwargs["weight"])
    turned = dict(
        weight=kwargs["weight"].flip(0), bias=None if kwargs["bias"] is None else kwargs["bias"].flip(0),
        target=torch.where(target < 0, target, classes - 1 - target), chunk_size=2,
    )  # fmt: skip
    torch.testing.assert_close(linear_cross_entropy(**{**kwargs, **turned}), loss, rtol=1e-4, atol=1e-5)


def _law_divergence(function) -> None:
    def law(kwargs: dict) -> None:
        """The order of the rows is free, and so is where they are cut; equal heads have no divergence."""
        loss = function(**kwargs)
        rows = ("student_input", "teacher_input", "teacher_logits", "topk_ids", "topk_logprobs", "target")
        flipped = {k: kwargs[k].flip(0) for k in rows if k in kwargs}
        got = function(**{**kwargs, **flipped, "chunk_size": 3})
        torch.testing.assert_close(got.flip(0) if got.ndim else got, loss, rtol=1e-4, atol=1e-5)
        if "teacher_input" in kwargs:
            same = dict(kwargs, teacher_input=kwargs["student_input"], teacher_weight=kwargs["student_weight"])
            same |= dict(teacher_bias=kwargs["student_bias"], ce_weight=0.0)
            same["teacher_softcap"], same["teacher_logit_scale"] = kwargs.get("softcap"), kwargs.get("logit_scale", 1.0)
            assert function(**same).abs().max() < 1e-5

    return law


def _heads(kwargs: dict, prefix: str) -> tuple[Tensor, Tensor]:
    return kwargs[f"{prefix}input"], kwargs[f"{prefix}weight"]


def _bytes_moved(kwargs: dict) -> int:
    # Logits stay in the cache: what must move are inputs, weights twice, and the gradients of both.
    student = _heads(kwargs, "" if "input" in kwargs else "student_")
    others = [v for k, v in kwargs.items() if isinstance(v, Tensor) and k.startswith(("teacher", "topk"))]
    return 3 * tensor_bytes(*student) + tensor_bytes(*others)


def _flops(kwargs: dict) -> int:
    x, weight = _heads(kwargs, "" if "input" in kwargs else "student_")
    teacher = kwargs.get("teacher_input")
    return 6 * x.numel() * len(weight) + (0 if teacher is None else 2 * teacher.numel() * len(weight))


_SPACE = dict(
    batch=(1, 2, 5, 9), width=(1, 8, 33), classes=(2, 3, 17, 40), bias=(False, True), mixed=(False, True),
    ignored=(0, 1), logit_scale=(1.0, 0.5), softcap=(None, 4.0), chunk_size=(2, 1024), seed=tuple(range(5)),
)  # fmt: skip

register(
    OpSpec(
        name="linear_cross_entropy",
        function=linear_cross_entropy,
        reference=_cross_entropy,
        kernels=(linear_loss.kernel,),
        build=_build_cross_entropy,
        differentiable=("input", "weight", "bias"),
        cases={
            "mean": dict(batch=7, width=16, classes=19, bias=True, ignored=2, chunk_size=3),
            "smooth": dict(batch=4, width=9, classes=33, smoothing=0.1, bias=True, mixed=True, logit_scale=0.5),
            "capped_rows": dict(batch=5, width=8, classes=12, reduction="none", softcap=3.0, ignored=1, chunk_size=2),
            "one_row": dict(batch=1, width=3, classes=2, reduction="sum"),
        },
        space=_SPACE | dict(smoothing=(0.0, 0.2), reduction=("mean", "sum", "none")),
        bench={"gpt2_head": dict(batch=512, width=256, classes=16384, bias=False)},
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="lm_distill_linear_ce",
        law=_law_cross_entropy,
    )
)
register(
    OpSpec(
        name="linear_kl",
        function=linear_kl,
        reference=_kl,
        kernels=(linear_loss.kernel, linear_topk.kernel),
        build=_build_divergence,
        differentiable=("student_input", "student_weight", "student_bias"),
        cases={
            "head": dict(batch=7, width=16, classes=19, teacher_width=24, bias=True, temperature=2.0, chunk_size=3),
            "tail": dict(batch=5, width=8, classes=21, teacher="tail", ignored=2, ce_weight=0.5, chunk_size=2),
            "raw_rows": dict(batch=4, width=9, classes=12, teacher="raw", reduction="none", bias=True, mixed=True),
            "renorm": dict(batch=3, width=6, classes=9, teacher="renorm", target=False, logit_scale=0.5),
            "logits": dict(batch=3, width=6, classes=15, teacher="logits", ignored=1, t_square=True, temperature=3.0),
        },
        space=_SPACE | dict(
            teacher=("head", "logits", *linear_topk.MODES), teacher_width=(4, 20), temperature=(1.0, 2.0),
            t_square=(False, True), ce_weight=(0.0, 0.5), kl_weight=(1.0, 0.3), target=(True, False),
            reduction=("batchmean", "mean", "sum", "none"),
        ),
        bench={
            "lm_head": dict(batch=512, width=256, classes=16384, teacher_width=384, target=False),
            "top_64": dict(batch=512, width=256, classes=16384, teacher="tail", k=64, target=False),
        },
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="lm_distill_topk_kl",
        law=_law_divergence(linear_kl),
    )
)  # fmt: skip
register(
    OpSpec(
        name="linear_jsd",
        function=linear_jsd,
        reference=_jsd,
        kernels=(linear_loss.kernel,),
        build=_build_divergence,
        differentiable=("student_input", "student_weight", "student_bias"),
        cases={
            "half": dict(batch=7, width=16, classes=19, teacher_width=24, ignored=2, ce_weight=0.4, chunk_size=3),
            "reverse": dict(batch=4, width=9, classes=12, beta=1.0, bias=True, temperature=0.5, mixed=True),
            "tenth_capped": dict(
                batch=5, width=8, classes=11, beta=0.1, reduction="none", softcap=3.0, target=False, chunk_size=2,
            ),
        },
        space=_SPACE | dict(
            teacher=("head", "logits"), teacher_width=(4, 20), temperature=(1.0, 2.0), beta=(0.0, 0.1, 0.5, 1.0),
            ce_weight=(0.0, 0.5), target=(True, False), reduction=("batchmean", "mean", "sum", "none"),
        ),
        bench={"lm_head": dict(batch=512, width=256, classes=16384, teacher_width=384, ce_weight=0.5)},
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="lm_distill_linear_jsd",
        law=_law_divergence(linear_jsd),
    )
)  # fmt: skip
