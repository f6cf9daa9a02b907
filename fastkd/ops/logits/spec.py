"""What tests, fuzzing and benchmarks know about `logit_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._spec import Case, OpSpec, register, tensor_bytes
from .logit_loss import OP, backward, forward
from .losses import logit_loss

WEIGHTS = ("ce", "kl", "reverse_kl", "jsd", "tvd", "dkd", "nkd")
OPTIONS = (*WEIGHTS, "temperature", "beta", "label_smoothing", "reduction", "normalize")


def _reference(**kwargs) -> Tensor:
    return logit_loss(**kwargs, teacher_grad=True)  # which runs as plain PyTorch


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, classes = case["batch"], case["classes"]
    student, teacher = (spread * torch.randn(batch, classes, generator=random) for spread in (1.5, 2.5))
    if case.get("excluded") and classes > 2:  # a class that both sides leave out, never the target
        student[:, -1] = teacher[:, -1] = float("-inf")
    kwargs = dict(student_logits=student.to(device, dtype), teacher_logits=teacher.to(device, dtype))
    if case.get("scores"):
        scores = torch.randn(batch, classes, generator=random).mul(2)
        if case.get("excluded") and classes > 2:
            scores[:, -1] = float("-inf")
        kwargs["target"] = scores.softmax(-1).to(device, dtype)
    elif case.get("target", True):
        # Not the last class, which may be excluded.
        target = torch.randint(max(classes - 1, 2), (batch,), generator=random)
        if case.get("ignore"):
            target[1::3] = -100
        kwargs["target"] = target.to(device)
    if case.get("weight"):
        kwargs["weight"] = (torch.rand(classes, generator=random) + 0.5).to(device, dtype)
    if case.get("sample_weight"):
        kwargs["sample_weight"] = (torch.rand(batch, generator=random) + 0.5).to(device, dtype)
    return kwargs | {name: case[name] for name in OPTIONS if name in case}


def _law(kwargs: dict) -> None:
    """A perfect student has no divergence; a constant added to a row's logits on either side changes nothing."""
    options = {name: value for name, value in kwargs.items() if name not in (*WEIGHTS, "student_logits")}
    teacher = kwargs["teacher_logits"]
    zero = logit_loss(teacher, **options, kl=1, reverse_kl=1, jsd=1, tvd=1)
    assert zero.abs().max() < 2e-5 * kwargs.get("temperature", 1) ** 2, zero
    student = kwargs.pop("student_logits")
    plain = logit_loss(student, **kwargs)
    moved = logit_loss(student + 3, **kwargs | dict(teacher_logits=teacher - 5))
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)


def _bytes_moved(kwargs: dict) -> int:
    soft = kwargs.get("target")
    soft = soft if soft is not None and soft.is_floating_point() else None
    return 2 * tensor_bytes(kwargs["student_logits"]) + tensor_bytes(kwargs.get("teacher_logits"), soft)


SPEC = register(
    OpSpec(
        name=OP,
        function=logit_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student_logits",),
        cases={
            "ce_kl": dict(batch=5, classes=33, ce=0.1, kl=0.9, temperature=4.0, ignore=True),
            "kl_each": dict(batch=3, classes=20, kl=1.0, target=False, reduction="none", excluded=True),
            "dkd": dict(batch=4, classes=17, dkd=(1.0, 8.0), temperature=4.0, ce=1.0, ignore=True, weight=True,
                        label_smoothing=0.1, sample_weight=True),
            "divergences": dict(batch=3, classes=40, jsd=1.0, reverse_kl=0.3, tvd=0.5, beta=0.3, temperature=2.0,
                                excluded=True),
            "nkd_scores": dict(batch=3, classes=21, nkd=(1.0, 3.5), temperature=3.0, ce=1.0, scores=True,
                               label_smoothing=0.1, weight=True),
            "long": dict(batch=2, classes=8200, jsd=1.0, kl=0.5, ce=0.1, temperature=2.0, ignore=True),
            "two_classes": dict(batch=5, classes=2, ce=1.0, kl=0.5, dkd=(1.0, 2.0), nkd=(1.0, 1.5), jsd=1.0,
                                reduction="sum"),
        },
        space=dict(
            batch=(1, 2, 7), classes=(2, 3, 16, 33, 130), ce=(0.0, 0.7), kl=(0.0, 0.9), reverse_kl=(0.0, 0.5),
            jsd=(0.0, 1.0), tvd=(0.0, 0.5), dkd=((0.0, 0.0), (1.0, 8.0)), nkd=((0.0, 0.0), (1.0, 1.5)),
            temperature=(1.0, 0.5, 4.0), beta=(0.1, 0.5, 0.9), normalize=(False, True), label_smoothing=(0.0, 0.1),
            reduction=("mean", "batchmean", "sum", "none"), scores=(False, True), ignore=(False, True),
            excluded=(False, True), weight=(False, True), sample_weight=(False, True), seed=tuple(range(3)),
        ),
        bench={
            "kl": dict(batch=1024, classes=1000, kl=1.0, temperature=4.0, target=False),
            "ce_kl": dict(batch=1024, classes=1000, ce=0.1, kl=0.9, temperature=4.0),
            "dkd": dict(batch=1024, classes=1000, dkd=(1.0, 8.0), temperature=4.0),
            "jsd": dict(batch=1024, classes=1000, jsd=1.0, target=False),
            "nkd": dict(batch=1024, classes=1000, nkd=(1.0, 1.5)),
            "ce_kl_32k": dict(batch=32, classes=32000, ce=0.5, kl=0.5),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 30 * k["student_logits"].numel(),
        golden="classic_kd_kl",
        law=_law,
    )
)  # fmt: skip
