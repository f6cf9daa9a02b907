"""Student tokens against those of a teacher that saw the whole picture (MaskAlign, Xue et al., CVPR 2023, section 3).

The student has C prefix tokens (CLS) and n visible patches, the teacher P prefix tokens and all L patches. Student row
y at place k meets teacher row k for k < C, and row P + ids_keep[k - C] after them. With t that row and d = y - N(t):

    N(t)   whiten  (t - mean(t)) / sqrt(var(t) + 1e-5)     layer norm without affine, biased variance
           l2      t / max(||t||_2, 1e-12)
           bn      (t - m) / sqrt(v + 1e-6)                m, v (unbiased): of all tokens of the whole batch
           none    t

    loss, mean over all elements                           gradient of an element, before the mean
    smooth_l1  d^2 where |d| < 1, else 2 |d| - 1           2 clamp(d, -1, 1)      twice torch's, as published
    l2         d^2                                         2 d
    l1         |d|                                         sign(d), 0 at 0

A norm by rows does not see other rows, so only the gathered ones are read and normalised, in registers: features are
stored neither gathered nor normalised. Backward reads both sides again; no gradient is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "gather_whiten_smooth_l1"
NORMS = ("whiten", "l2", "none", "bn")  # kernels get the index
LOSSES = ("smooth_l1", "l2", "l1")  # kernels get the index
WHITEN_EPS, NORM_FLOOR, BATCH_EPS = 1e-5, 1e-12, 1e-6


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(teacher: Tensor, ids: Tensor, tokens: int, num_prefix: int) -> Tensor:
    """Teacher rows in the student's order: [B, tokens, D]."""
    rows = teacher.gather(1, (ids + num_prefix)[:, :, None].expand(-1, -1, teacher.shape[2]))
    return torch.cat([teacher[:, : tokens - ids.shape[1]], rows], 1)


def _normalized(rows: Tensor, norm: int, statistics: Tensor | None) -> Tensor:
    if NORMS[norm] == "whiten":
        return F.layer_norm(rows, rows.shape[-1:], eps=WHITEN_EPS)
    if NORMS[norm] == "l2":
        return F.normalize(rows, dim=-1, eps=NORM_FLOOR)
    return rows if statistics is None else (rows - statistics[0]) * statistics[1]


def _statistics(teacher: Tensor, norm: int) -> Tensor | None:
    """For ``bn``: [2], mean and 1 / deviation over all elements."""
    if NORMS[norm] != "bn":
        return None
    variance, mean = torch.var_mean(teacher.to(_wide(teacher.dtype)), correction=1)
    return torch.stack([mean, (variance + BATCH_EPS).rsqrt()])


def _difference(student, teacher, ids, statistics, norm, num_prefix) -> Tensor:
    wide = _wide(student.dtype)
    rows = _gather(teacher, ids, student.shape[1], num_prefix).to(wide)
    return student.to(wide) - _normalized(rows, norm, statistics)


def _distance(d: Tensor, kind: int) -> Tensor:
    if LOSSES[kind] == "smooth_l1":
        return 2 * F.smooth_l1_loss(d, torch.zeros_like(d))
    return d.square().mean() if LOSSES[kind] == "l2" else d.abs().mean()


def _fill_forward(student, teacher, ids, statistics, norm, kind, num_prefix, loss) -> None:
    loss.copy_(_distance(_difference(student, teacher, ids, statistics, norm, num_prefix), kind))


def _fill_backward(grad_loss, student, teacher, ids, statistics, norm, kind, num_prefix, grad_student) -> None:
    d = _difference(student, teacher, ids, statistics, norm, num_prefix)
    slope = d.sign() if LOSSES[kind] == "l1" else 2 * (d.clamp(-1, 1) if LOSSES[kind] == "smooth_l1" else d)
    grad_student.copy_(slope * (grad_loss / d.numel()))


_TRITON = "fastkd.ops.features.gather_whiten_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


@custom_op(OP)
def _op(
    student: Tensor, teacher: Tensor, ids: Tensor, statistics: Tensor | None, norm: int, kind: int, num_prefix: int
) -> Tensor:
    loss = torch.empty((), dtype=_wide(student.dtype), device=student.device)
    forward(student, teacher, ids, statistics, norm, kind, num_prefix, loss)
    return loss


@_op.register_fake
def _(student, teacher, ids, statistics, norm, kind, num_prefix):
    return torch.empty((), dtype=_wide(student.dtype), device=student.device)


@custom_op(f"{OP}_backward")
def _op_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, ids: Tensor, statistics: Tensor | None, norm: int, kind: int,
    num_prefix: int,
) -> Tensor:  # fmt: skip
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    backward(grad_loss, student, teacher, ids, statistics, norm, kind, num_prefix, grad_student)
    return grad_student


@_op_backward.register_fake
def _(grad_loss, student, teacher, ids, statistics, norm, kind, num_prefix):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, ids, statistics, *ctx.constants = inputs
    ctx.save_for_backward(student, teacher, ids, statistics)


def _autograd(ctx, grad_loss: Tensor):
    return _op_backward(grad_loss, *ctx.saved_tensors, *ctx.constants), *[None] * 6


_op.register_autograd(_autograd, setup_context=_setup_context)


def gather_whiten_smooth_l1(
    student: Tensor,
    teacher: Tensor,
    ids_keep: Tensor | None = None,
    norm: str = "whiten",
    loss: str = "smooth_l1",
    *,
    num_prefix: int = 1,
) -> Tensor:
    """Distance between the student's tokens and the teacher's, normalised, at the same places of the picture.

    Args:
        student: [B, C + n, D] predictions of teacher features, floating, any strides.
        teacher: [B, P + L, D] features of the intact picture; floating, its dtype may differ. Must not require grad.
        ids_keep: [B, n] int64 patches 0 .. L - 1 that the student saw, in the order of its tokens; on the CPU ids
            outside raise, on a GPU they are not checked. None: the teacher's rows already stand in the student's order.
        norm: of each teacher row: ``whiten``, ``l2``, ``none``; ``bn``: by one mean and deviation of all of `teacher`.
        loss: ``smooth_l1`` (twice torch's with beta = 1, as MaskAlign has it), ``l2`` or ``l1``.
        num_prefix: P, the teacher's prefix tokens (CLS, registers); the student's C <= P meet the first of them.

    Returns:
        Scalar, float32 (float64 for float64 features): the mean over all B (C + n) D elements.

    Raises:
        ValueError: shapes that do not fit, no rows, an unknown name, or a teacher that requires grad.
        TypeError: float64 on one side only, or ids that are not int64.
    """
    for name, value, known in (("norm", norm, NORMS), ("loss", loss, LOSSES)):
        if value not in known:
            _check.fail(OP, name, repr(value), "one of " + ", ".join(known))
    _check.check_tensor(OP, "student", student, 3)
    _check.check_tensor(OP, "teacher", teacher, 3)
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(OP, student=student, teacher=teacher, ids_keep=ids_keep)
    batch, tokens, width = student.shape
    if student.numel() == 0:
        shape = f"shape {tuple(student.shape)}"
        _check.fail(OP, "student", shape, "at least one row", "the mean of nothing is undefined")
    if ids_keep is None:
        _check.check_shape(OP, "teacher", teacher, student.shape, "like student, where ids_keep is not given")
        ids_keep, num_prefix = torch.arange(tokens, device=student.device).expand(batch, tokens), 0
    _check.check_tensor(OP, "ids_keep", ids_keep, 2, (torch.int64,))
    _check.check_shape(OP, "ids_keep", ids_keep, (batch, ids_keep.shape[1]), "(images, visible patches)")
    if (batch, width) != (teacher.shape[0], teacher.shape[2]):
        _check.fail(
            OP, "student", f"shape {tuple(student.shape)}", f"{teacher.shape[0]} images and width {teacher.shape[2]}",
            "project it to the teacher's width",
        )  # fmt: skip
    if not 0 <= tokens - ids_keep.shape[1] <= num_prefix <= teacher.shape[1]:
        sizes = f"{ids_keep.shape[1]} patches for {tokens} tokens of the student and {teacher.shape[1]} of the teacher"
        _check.fail(OP, "ids_keep", sizes, f"0 to num_prefix = {num_prefix} tokens of the student before its patches")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    index = NORMS.index(norm)
    return _op(student, teacher, ids_keep, _statistics(teacher, index), index, LOSSES.index(loss), num_prefix)


def teacher_targets(
    hidden_states: Sequence[Tensor], ids_keep: Tensor, norm: str = "whiten", *, num_prefix: int = 1
) -> list[Tensor]:
    """Normalised teacher features at the student's places, as tensors; `gather_whiten_smooth_l1` needs no such step.

    Args:
        hidden_states: [B, P + L, D] features of the intact picture, one per layer (without the embedding's output).
        ids_keep: [B, n] int64 patches that the student saw.
        norm: ``whiten``, ``l2``, ``none`` or ``bn``.
        num_prefix: P; all prefix tokens come first in the result.

    Returns:
        [B, P + n, D] per layer, in its dtype; normalised in float32 (float64).
    """
    if norm not in NORMS:
        _check.fail("teacher_targets", "norm", repr(norm), "one of " + ", ".join(NORMS))
    index, targets = NORMS.index(norm), []
    for hidden in hidden_states:
        rows = _gather(hidden, ids_keep, num_prefix + ids_keep.shape[1], num_prefix).to(_wide(hidden.dtype))
        targets.append(_normalized(rows, index, _statistics(hidden, index)).to(hidden.dtype))
    return targets


class GatherWhitenSmoothL1Loss(torch.nn.Module):
    """`gather_whiten_smooth_l1` as a module; ``forward(student, teacher, ids_keep=None)``."""

    def __init__(self, norm: str = "whiten", loss: str = "smooth_l1", *, num_prefix: int = 1) -> None:
        super().__init__()
        self.options = dict(norm=norm, loss=loss, num_prefix=num_prefix)

    def forward(self, student: Tensor, teacher: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        return gather_whiten_smooth_l1(student, teacher, ids_keep, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(student, teacher, ids_keep, norm="whiten", loss="smooth_l1", *, num_prefix=1) -> Tensor:
    index = NORMS.index(norm)
    difference = _difference(student, teacher, ids_keep, _statistics(teacher, index), index, num_prefix)
    return _distance(difference, LOSSES.index(loss))


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, patches, visible, width = case["batch"], case["patches"], case["visible"], case["width"]
    prefix = case.get("prefix", 1)
    student = 1.5 * torch.randn(batch, case.get("student_prefix", prefix) + visible, width, generator=random)
    teacher = 3 * torch.randn(batch, prefix + patches, width, generator=random) + 0.5
    if case.get("zero_row"):
        teacher[:, 0] = 0
    ids = torch.rand(batch, patches, generator=random).argsort(1)[:, :visible]
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    return dict(
        student=student.to(device, dtype), teacher=teacher.to(device, teacher_dtype), ids_keep=ids.to(device),
        norm=case["norm"], loss=case["loss"], num_prefix=prefix,
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """The targets themselves have no loss, and whitened targets do not see scale and shift of the teacher's rows."""
    teacher, ids, norm, prefix = (kwargs[name] for name in ("teacher", "ids_keep", "norm", "num_prefix"))
    (targets,) = teacher_targets([teacher], ids, norm, num_prefix=prefix)
    zero = gather_whiten_smooth_l1(**(kwargs | dict(student=targets)))
    assert abs(zero) < 1e-5, zero
    if norm == "whiten" and teacher.shape[2] > 8:
        moved = gather_whiten_smooth_l1(**(kwargs | dict(teacher=2 * teacher + 1)))
        torch.testing.assert_close(moved, gather_whiten_smooth_l1(**kwargs), rtol=1e-3, atol=1e-3)


SPEC = register(
    OpSpec(
        name=OP,
        function=gather_whiten_smooth_l1,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student",),
        cases={
            "whiten": dict(batch=2, patches=9, visible=4, width=12, norm="whiten", loss="smooth_l1"),
            "l2_l1": dict(batch=1, patches=6, visible=5, width=33, norm="l2", loss="l1", zero_row=True),
            "bn_l2": dict(batch=2, patches=4, visible=2, width=16, norm="bn", loss="l2", teacher_float32=True),
            "none": dict(batch=2, patches=3, visible=1, width=97, norm="none", loss="smooth_l1"),
            "registers": dict(
                batch=1, patches=5, visible=3, width=8, prefix=5, student_prefix=1, norm="whiten", loss="l1"
            ),
            "no_class_token": dict(batch=1, patches=4, visible=3, width=1, prefix=0, norm="none", loss="l2"),
        },
        space=dict(
            batch=(1, 3), patches=(5, 9), visible=(1, 5), width=(1, 8, 33, 130), prefix=(1, 2),
            student_prefix=(0, 1), norm=NORMS, loss=LOSSES, zero_row=(False, True), teacher_float32=(False, True),
            seed=tuple(range(5)),
        ),
        bench={
            "vit_base_70": dict(batch=16, patches=196, visible=58, width=768, norm="whiten", loss="smooth_l1"),
        },
        bytes_moved=lambda k: 3 * tensor_bytes(k["student"]) + 2 * k["student"].numel() * k["teacher"].element_size(),
        flops=lambda k: 20 * k["student"].numel(),
        golden="maskalign_align_loss",
        law=_law,
    )
)  # fmt: skip
