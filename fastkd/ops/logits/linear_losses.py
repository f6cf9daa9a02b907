"""Losses of a linear head from its input and weight: cross entropy and divergence from a teacher, no logits stored.

The maths, the chunks and the memory are those of `linear_loss`; the rows against a top-k teacher those of
`linear_topk`. Sources: Hinton et al. 2015 (KL), Agarwal et al. 2024 (GKD, eq. 1: generalised JSD).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from ..blocks import linear as _linear
from .linear_loss import Options, Teacher, linear_loss
from .linear_topk import MODES

CHUNK = 1024  # rows whose logits live at a time
DIVERGENCE_REDUCTIONS = ("batchmean", "mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = CHUNK,
) -> Tensor:
    """``cross_entropy(linear(input, weight, bias), target)`` without the logits.

    Args:
        input: [N, H] or [B, T, H] floating; under autocast it is cast to the autocast dtype.
        weight: [V, H] in the dtype of input or float32.
        target: [N] or [B, T] int64, classes or ignore_index.
        bias: [V] likewise, or None.
        label_smoothing, ignore_index, reduction: as in `torch.nn.functional.cross_entropy`; but where every label is
            ignored the mean is 0 with zero gradients.
        num_items: divides the sum in place of the number of labels, for means over several batches; only with "mean".
        logit_scale: multiplies the logits, before the cap.
        softcap: c of ``c tanh(logits / c)``.
        chunk_size: rows whose logits are made at a time.

    Returns:
        Scalar, or the shape of target for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit, labels out of range (noticed on the CPU), numbers out of range.
        TypeError: a weight or bias in a dtype that is neither that of input nor float32.
    """
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        _check.fail(op, "reduction", repr(reduction), "mean, sum or none")
    if not 0 <= label_smoothing <= 1:
        _check.fail(op, "label_smoothing", label_smoothing, "a number from 0 to 1")
    input = _linear.under_autocast(op, input)
    _check_rows(op, "input", input)
    _linear.check_parameters(op, input, input.shape[-1], weight=weight, bias=bias)
    _check_target(op, target, input)
    _check.check_same_device(op, input=input, weight=weight, target=target, bias=bias)
    options = Options(
        hard=1.0, smoothing=float(label_smoothing), scale=_positive(op, "logit_scale", logit_scale),
        cap=_cap(op, "softcap", softcap),
    )  # fmt: skip
    return _reduced(
        op, input, weight, bias, Teacher(*[None] * 6), target, options, ignore_index, 0, chunk_size,
        "batchmean" if reduction == "mean" else reduction, num_items,
    )  # fmt: skip


def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_square: bool = False,
    ce_weight: float = 0.0,
    jsd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student's head from a teacher's, plus cross entropy if wanted.

    With P = softmax(teacher / T), Q = softmax(student / T) and M = beta P + (1 - beta) Q, a row's loss is
    ``jsd_weight (beta KL(P || M) + (1 - beta) KL(Q || M)) + ce_weight CE(student, target)``; beta = 0 means KL(P || Q)
    and beta = 1 KL(Q || P), which are not the limits of the formula (those are 0). The cross entropy is at T = 1.

    Args:
        student_input: [N, Hs] or [B, T, Hs] floating; under autocast it is cast to the autocast dtype.
        student_weight: [V, Hs] in the dtype of student_input or float32.
        teacher_input, teacher_weight: the same for the teacher, of its own width. No gradient.
        target: [N] or [B, T] int64. Rows of ignore_index count nowhere; without target all rows count.
        student_bias, teacher_bias: [V] or None.
        teacher_logits: [N, V] or [B, T, V] in place of the teacher's input and weight; finished. No gradient.
        beta: from 0 to 1.
        temperature: T > 0.
        t_square: multiply the divergence by T^2.
        ce_weight, jsd_weight: weights of the two terms; ce_weight needs target.
        reduction: as in `torch.nn.functional.kl_div`: "batchmean" sums over classes and divides by the rows that
            count, "mean" divides the divergence by the classes too (the cross entropy is averaged over rows in both),
            "sum", or "none" for the rows.
        num_items: divides the sum in place of the number of rows that count.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: of logits made here: ``c tanh(s (x W^T + b) / c)``.
        vocab_size: use the first classes only, where the two sides were padded differently.
        chunk_size: rows whose logits are made at a time.

    Returns:
        Scalar, or one value a row for "none"; float32 (float64 for float64 input). No row that counts: 0, no gradient.

    Raises:
        ValueError: shapes that do not fit, different numbers of classes, numbers out of range, a teacher that requires
            grad, labels out of range (noticed on the CPU).
        TypeError: parameters in a dtype that is neither that of their input nor float32.
    """
    return _divergence(
        "linear_jsd", student_input, student_weight, teacher_input, teacher_weight, target, student_bias, teacher_bias,
        teacher_logits, None, None, 0, beta, temperature, t_square, ce_weight, jsd_weight, ignore_index, reduction,
        num_items, logit_scale, softcap, teacher_logit_scale, teacher_softcap, vocab_size, chunk_size,
    )  # fmt: skip


def linear_kl(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    topk_mode: str = "tail",
    temperature: float = 1.0,
    t_square: bool = False,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK,
) -> Tensor:
    """KL(teacher || student) of two heads, plus cross entropy if wanted: `linear_jsd` with beta 0, or a top-k teacher.

    Args:
        topk_ids, topk_logprobs: [N, K] or [B, T, K], int64 and floating: all that is known of the teacher, K different
            classes a row and their log-probabilities at temperature 1. No gradient.
        topk_mode: "tail" puts what they leave of the probability into one more class, "raw" leaves it out, "renorm"
            divides it among the K.
        temperature: 1 with a top-k teacher.
        kl_weight: weight of the divergence, > 0.

    The other arguments, the result and the errors are those of `linear_jsd`.
    """
    if topk_mode not in MODES:
        _check.fail("linear_kl", "topk_mode", repr(topk_mode), "one of " + ", ".join(MODES))
    return _divergence(
        "linear_kl", student_input, student_weight, teacher_input, teacher_weight, target, student_bias, teacher_bias,
        teacher_logits, topk_ids, topk_logprobs, MODES.index(topk_mode), 0.0, temperature, t_square, ce_weight,
        kl_weight, ignore_index, reduction, num_items, logit_scale, softcap, teacher_logit_scale, teacher_softcap,
        vocab_size, chunk_size,
    )  # fmt: skip


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    chunk_size: int = CHUNK,
) -> Tensor:
    """`linear_jsd` under the name and with the defaults of Liger-Kernel's LigerFusedLinearJSD, as a drop-in.

    ``weight_hard_loss`` is its ce_weight, ``weight_soft_loss`` its jsd_weight. Result: float32 scalar.
    """
    if target is None and weight_hard_loss:
        _check.fail("fused_linear_jsd", "target", "None", "labels for weight_hard_loss > 0", "or weight_hard_loss=0")
    return linear_jsd(
        student_input, student_weight, teacher_input, teacher_weight, target, student_bias=student_bias,
        teacher_bias=teacher_bias, beta=beta, temperature=temperature, ce_weight=weight_hard_loss,
        jsd_weight=weight_soft_loss, ignore_index=ignore_index, chunk_size=chunk_size,
    )  # fmt: skip


def _divergence(
    op, x, weight, teacher_x, teacher_weight, target, bias, teacher_bias, teacher_logits, ids, logprobs, mode, beta,
    temperature, t_square, hard, soft, ignore_index, reduction, num_items, scale, cap, teacher_scale, teacher_cap,
    vocab_size, chunk_size,
) -> Tensor:  # fmt: skip
    if reduction not in DIVERGENCE_REDUCTIONS:
        _check.fail(op, "reduction", repr(reduction), "one of " + ", ".join(DIVERGENCE_REDUCTIONS))
    if not 0 <= beta <= 1:
        _check.fail(op, "beta", beta, "a number from 0 to 1")
    if ids is not None and temperature != 1:
        _check.fail(op, "temperature", temperature, "1 with a top-k teacher", "its probabilities are at temperature 1")
    if hard and target is None:
        _check.fail(op, "target", "None", "labels for the cross entropy", "or ce_weight=0")
    if not soft > 0:
        _check.fail(op, "weight of the divergence", soft, "a positive number", "linear_cross_entropy goes without it")
    x = _linear.under_autocast(op, x)
    _check_rows(op, "student_input", x)
    if vocab_size is not None:
        heads = (weight, bias, teacher_weight, teacher_bias)
        weight, bias, teacher_weight, teacher_bias = (None if t is None else t[:vocab_size] for t in heads)
        teacher_logits = None if teacher_logits is None else teacher_logits[..., :vocab_size]
    _linear.check_parameters(op, x, x.shape[-1], student_weight=weight, student_bias=bias)
    if target is not None:
        _check_target(op, target, x)
    teacher = _teacher(op, x, weight.shape[0], teacher_x, teacher_weight, teacher_bias, teacher_logits, ids, logprobs)
    _check.check_same_device(
        op, student_input=x, student_weight=weight, target=target, student_bias=bias, teacher_input=teacher.x,
        teacher_weight=teacher.weight, teacher_bias=teacher.bias, teacher_logits=teacher.logits, topk_ids=teacher.ids,
        topk_logprobs=teacher.logprobs,
    )  # fmt: skip
    temperature = _positive(op, "temperature", temperature)
    soft = float(soft) * (temperature**2 if t_square else 1.0)
    options = Options(
        hard=float(hard), soft=soft / weight.shape[0] if reduction == "mean" else soft, beta=float(beta),
        temperature=temperature, scale=_positive(op, "logit_scale", scale), cap=_cap(op, "softcap", cap),
        teacher_scale=_positive(op, "teacher_logit_scale", teacher_scale),
        teacher_cap=_cap(op, "teacher_softcap", teacher_cap),
    )  # fmt: skip
    return _reduced(
        op, x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size,
        "batchmean" if reduction == "mean" else reduction, num_items,
    )  # fmt: skip


def _teacher(op, x, classes, teacher_x, teacher_weight, teacher_bias, logits, ids, logprobs) -> Teacher:
    """Checks that there is one teacher and that it fits; rows flattened."""
    why = "a distillation loss must not train the teacher"
    given = dict(
        teacher_input=teacher_x, teacher_weight=teacher_weight, teacher_bias=teacher_bias, teacher_logits=logits,
        topk_ids=ids, topk_logprobs=logprobs,
    )  # fmt: skip
    for name, value in given.items():
        _check.check_no_grad(op, name, value, why)
    found = {name for name, value in given.items() if value is not None} - {"teacher_bias"}
    if found not in ({"teacher_input", "teacher_weight"}, {"teacher_logits"}, {"topk_ids", "topk_logprobs"}):
        forms = "teacher_input with teacher_weight, or teacher_logits" + (
            ", or topk_ids with topk_logprobs" if op == "linear_kl" else ""
        )
        _check.fail(op, "teacher", " and ".join(sorted(found)) or "nothing", f"one of: {forms}")
    rows = x.shape[:-1]
    if teacher_x is not None:
        teacher_x = _linear.under_autocast(op, teacher_x)
        _check_rows(op, "teacher_input", teacher_x, rows)
        _linear.check_parameters(
            op, teacher_x, teacher_x.shape[-1], teacher_weight=teacher_weight, teacher_bias=teacher_bias
        )
        _same_float64(op, "teacher_input", teacher_x, x)
        if teacher_weight.shape[0] != classes:
            _check.fail(
                op, "teacher_weight", f"{teacher_weight.shape[0]} classes", f"{classes} like the student",
                "for vocabularies that are padded differently pass vocab_size",
            )  # fmt: skip
        teacher_x = teacher_x.reshape(-1, teacher_x.shape[-1])
    elif teacher_bias is not None:
        _check.fail(op, "teacher_bias", "a bias without teacher_weight", "both or none")
    if logits is not None:
        _check.check_tensor(op, "teacher_logits", logits, x.ndim)
        _same_float64(op, "teacher_logits", logits, x)
        fix = "for vocabularies that are padded differently pass vocab_size"
        if tuple(logits.shape) != (*rows, classes):
            _check.fail(op, "teacher_logits", f"shape {tuple(logits.shape)}", f"{(*rows, classes)}", fix)
        logits = logits.reshape(-1, classes)
    if ids is not None:
        _check.check_tensor(op, "topk_ids", ids, x.ndim, (torch.int64,))
        _check.check_shape(op, "topk_ids", ids, (*rows, ids.shape[-1]), "with the rows of student_input")
        _check.check_tensor(op, "topk_logprobs", logprobs, x.ndim)
        _check.check_shape(op, "topk_logprobs", logprobs, tuple(ids.shape), "like topk_ids")
        if not 0 < ids.shape[-1] <= classes:
            _check.fail(op, "topk_ids", f"{ids.shape[-1]} classes a row", f"1 to {classes}")
        ids, logprobs = (t.reshape(-1, t.shape[-1]) for t in (ids, logprobs))
    return Teacher(teacher_x, teacher_weight, teacher_bias, logits, ids, logprobs)


def _reduced(op, x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size, reduction, num_items):
    if not (isinstance(chunk_size, int) and chunk_size > 0):
        _check.fail(op, "chunk_size", chunk_size, "a positive int")
    rows = x.shape[:-1]
    target = None if target is None else target.reshape(-1)
    if num_items is not None:
        if reduction != "batchmean":
            _check.fail(op, "num_items", num_items, "None with this reduction", "it is the divisor of a mean")
        reduction = "sum"
    loss = linear_loss(
        x.reshape(-1, x.shape[-1]), weight, bias, teacher, target, options, ignore_index, mode, chunk_size, reduction
    )
    if num_items is not None:
        return loss / num_items
    return loss.reshape(rows) if reduction == "none" else loss


def _check_rows(op: str, name: str, x: Tensor, rows: tuple[int, ...] | None = None) -> None:
    _check.check_tensor(op, name, x, 2 if x.ndim < 3 else 3)
    if rows is not None:
        _check.check_shape(op, name, x, (*rows, x.shape[-1]), "with the rows of student_input")


def _check_target(op: str, target: Tensor, x: Tensor) -> None:
    _check.check_tensor(op, "target", target, x.ndim - 1, (torch.int64,))
    _check.check_shape(op, "target", target, tuple(x.shape[:-1]), "one label a row")


def _same_float64(op: str, name: str, value: Tensor, x: Tensor) -> None:
    if (value.dtype == torch.float64) != (x.dtype == torch.float64):
        got = f"{value.dtype} with a student in {x.dtype}".replace("torch.", "")
        _check.fail(op, name, got, "float64 on both sides or on none", "cast one of them", TypeError)


def _positive(op: str, name: str, value: float) -> float:
    if not value > 0:
        _check.fail(op, name, value, "a positive number")
    return float(value)


def _cap(op: str, name: str, value: float | None) -> float:
    return 0.0 if value is None else _positive(op, name, value)


class _LinearLoss(torch.nn.Module):
    """Keeps the options of a function of this module."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LinearCrossEntropyLoss(_LinearLoss):
    """`linear_cross_entropy` as a module: its keyword arguments, ``forward(input, weight, target, bias=None)``."""

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(input, weight, target, bias, **self.options)


class LinearKLLoss(_LinearLoss):
    """`linear_kl` as a module: its options, then ``forward`` with its tensors."""

    def forward(self, student_input: Tensor, student_weight: Tensor, *tensors, **named) -> Tensor:
        return linear_kl(student_input, student_weight, *tensors, **named, **self.options)


class LinearJSDLoss(_LinearLoss):
    """`linear_jsd` as a module: its options, then ``forward`` with its tensors."""

    def forward(self, student_input: Tensor, student_weight: Tensor, *tensors, **named) -> Tensor:
        return linear_jsd(student_input, student_weight, *tensors, **named, **self.options)
