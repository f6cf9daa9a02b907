"""Alignment of student features with those of a frozen teacher (DMAE, Bai et al. 2023, section 3; FitNets and kin).

Per token row s (student, after the projection) and t (teacher), both D wide, with u(x) = x / max(||x||_2, 1e-12), or
u(x) = x where normalize is off, and d = u(s) - u(t):

    l1         mean over all elements of |d|
    l2         mean over all elements of d^2
    smooth_l1  mean over all elements of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2
    cosine     mean over rows of 1 - u(s) . u(t); always normalised

    g = d loss / d u(s)                                sign(0) = 0
    d loss / d s = (g - u (u . g)) / ||s||             u = u(s)
    d loss / d s = g / 1e-12 where ||s|| < 1e-12       no projection: there the divisor is a constant

The two reductions and the normalised rows live in registers. Backward reads both inputs again instead of saving a
gradient: the same five feature-sized transfers in all, but no buffer between the passes, and the gradient is scaled by
the upstream one before it is rounded to a 16-bit type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "feature_alignment_loss"
LOSSES = ("l1", "l2", "smooth_l1", "cosine")  # kernels get the index
NORM_FLOOR = 1e-12


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prepared(student: Tensor, teacher: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    wide = _wide(student.dtype)
    student, teacher = student.to(wide), teacher.to(wide)
    if normalize:
        student, teacher = (F.normalize(x, dim=-1, eps=NORM_FLOOR) for x in (student, teacher))
    return student, teacher


def _loss(student: Tensor, teacher: Tensor, kind: int, normalize: bool, beta: float) -> Tensor:
    s, t = _prepared(student, teacher, normalize)
    if LOSSES[kind] == "l1":
        return F.l1_loss(s, t)
    if LOSSES[kind] == "l2":
        return F.mse_loss(s, t)
    if LOSSES[kind] == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=beta)
    return (1 - (s * t).sum(-1)).mean()


def _fill_forward(student, teacher, kind, normalize, beta, loss) -> None:
    loss.copy_(_loss(student, teacher, kind, normalize, beta))


def _fill_backward(grad_loss, student, teacher, kind, normalize, beta, grad_student) -> None:
    u, t = _prepared(student, teacher, normalize)
    scale = grad_loss / u.numel()
    if LOSSES[kind] == "l1":
        g = (u - t).sign() * scale
    elif LOSSES[kind] == "l2":
        g = (u - t) * (2 * scale)
    elif LOSSES[kind] == "smooth_l1":
        g = ((u - t) / beta).clamp(-1, 1) * scale
    else:
        g = t * (-scale * u.shape[-1])
    if normalize:
        norm = torch.linalg.vector_norm(student.to(u.dtype), dim=-1, keepdim=True)
        tangent = g - u * (u * g).sum(-1, keepdim=True)
        g = torch.where(norm < NORM_FLOOR, g, tangent) / norm.clamp_min(NORM_FLOOR)
    grad_student.copy_(g)


_TRITON = "fastkd.ops.features.feature_alignment_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward", cuda=True)
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward", cuda=True)


@custom_op("feature_alignment_loss")
def _op(student: Tensor, teacher: Tensor, kind: int, normalize: bool, beta: float) -> Tensor:
    loss = torch.empty((), dtype=_wide(student.dtype), device=student.device)
    forward(student, teacher, kind, normalize, beta, loss)
    return loss


@_op.register_fake
def _(student, teacher, kind, normalize, beta):
    return torch.empty((), dtype=_wide(student.dtype), device=student.device)


@custom_op("feature_alignment_loss_backward")
def _op_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, kind: int, normalize: bool, beta: float
) -> Tensor:
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    backward(grad_loss, student, teacher, kind, normalize, beta, grad_student)
    return grad_student


@_op_backward.register_fake
def _(grad_loss, student, teacher, kind, normalize, beta):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, *ctx.constants = inputs
    ctx.save_for_backward(student, teacher)


def _autograd(ctx, grad_loss: Tensor):
    grad_student = _op_backward(grad_loss, *ctx.saved_tensors, *ctx.constants)
    return grad_student, *[None] * 4


_op.register_autograd(_autograd, setup_context=_setup_context)


def feature_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    loss: str = "l1",
    normalize: bool = True,
    *,
    beta: float = 1.0,
) -> Tensor:
    """Distance between (projected) student features and teacher features, row by row.

    Args:
        student: [B, T, Ds] or [N, Ds], floating, any strides (``x[:, 1:]`` is read in place).
        teacher: [B, T, Dt] or [N, Dt] with as many rows; floating, its dtype may differ from the student's. Must not
            require grad.
        weight: [Dt, Ds] projection of the student, as in `torch.nn.functional.linear`; without it Ds must be Dt.
        bias: [Dt], only with weight.
        loss: ``l1``, ``l2``, ``smooth_l1`` (all: mean over all elements) or ``cosine`` (mean over rows of 1 - cos).
        normalize: divide each row by its Euclidean norm (at least 1e-12) first. ``cosine`` always does.
        beta: where ``smooth_l1`` changes from squared to absolute, > 0; an element of a normalised row is about
            1 / sqrt(Dt).

    Returns:
        Scalar, float32 (float64 for float64 features), mean reduction.

    Raises:
        ValueError: shapes that do not fit, no rows, an unknown loss, beta <= 0, or a teacher that requires grad.
        TypeError: float64 on one side only, or a weight of another dtype than the student outside autocast.
    """
    if loss not in LOSSES:
        _check.fail(OP, "loss", repr(loss), "one of " + ", ".join(LOSSES))
    if loss == "smooth_l1" and not beta > 0:
        _check.fail(OP, "beta", beta, "a positive number", 'for beta = 0 use loss="l1"')
    ndim = 2 if isinstance(student, Tensor) and student.ndim == 2 else 3
    _check.check_tensor(OP, "student", student, ndim)
    _check.check_tensor(OP, "teacher", teacher, ndim)
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(OP, student=student, teacher=teacher, weight=weight, bias=bias)
    if weight is not None:
        student = _project(student, teacher, weight, bias)
    elif bias is not None:
        _check.fail(OP, "bias", "a bias without weight", "both or none")
    if student.shape != teacher.shape:
        fix = "" if student.shape[:-1] != teacher.shape[:-1] else "pass a projection weight [Dt, Ds]"
        _check.fail(OP, "student", f"shape {tuple(student.shape)}", f"{tuple(teacher.shape)} like teacher", fix)
    if student.numel() == 0:
        _check.fail(
            OP, "student", f"shape {tuple(student.shape)}", "at least one row", "the mean of nothing is undefined"
        )
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    if ndim == 2:
        student, teacher = student[None], teacher[None]
    kind = LOSSES.index(loss)
    return _op(student, teacher, kind, normalize or loss == "cosine", beta)


def _project(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check.check_tensor(OP, "weight", weight, 2)
    _check.check_shape(OP, "weight", weight, (teacher.shape[-1], student.shape[-1]), "(teacher width, student width)")
    if bias is not None:
        _check.check_tensor(OP, "bias", bias, 1)
        _check.check_shape(OP, "bias", bias, (weight.shape[0],), "(teacher width,)")
    if weight.dtype != student.dtype and not torch.is_autocast_enabled(student.device.type):
        got = f"{weight.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "weight", got, "the student's dtype", "cast it, or run under torch.autocast", TypeError)
    return F.linear(student, weight, bias)


class FeatureAlignmentLoss(torch.nn.Module):
    """`feature_alignment_loss` as a module; ``forward(student, teacher, weight=None, bias=None)``."""

    def __init__(self, loss: str = "l1", normalize: bool = True, *, beta: float = 1.0) -> None:
        super().__init__()
        self.options = dict(loss=loss, normalize=normalize, beta=beta)

    def forward(
        self, student: Tensor, teacher: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        return feature_alignment_loss(student, teacher, weight, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(student, teacher, weight=None, bias=None, loss="l1", normalize=True, *, beta=1.0) -> Tensor:
    if weight is not None:
        student = F.linear(student, weight, bias)
    return _loss(student, teacher, LOSSES.index(loss), normalize or loss == "cosine", beta)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, tokens, width = case["batch"], case["tokens"], case["width"]
    narrow = case.get("student_width", width)
    student = torch.randn(batch, tokens + 1, narrow, generator=random)
    teacher = 3 * torch.randn(batch, tokens + 1, width, generator=random) + 0.5
    if case.get("zero_row"):
        teacher[0, 1] = 0
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    student, teacher = student.to(device, dtype), teacher.to(device, teacher_dtype)
    if case.get("strided"):  # without the first token; the teacher's channels are not dense either
        teacher = teacher.transpose(1, 2).contiguous().transpose(1, 2)
        student, teacher = student[:, 1:], teacher[:, 1:]
    else:
        student, teacher = student[:, 1:].contiguous(), teacher[:, 1:].contiguous()
    kwargs = dict(student=student, teacher=teacher)
    if narrow != width:
        kwargs["weight"] = (torch.randn(width, narrow, generator=random) / narrow**0.5).to(device, dtype)
        kwargs["bias"] = (0.1 * torch.randn(width, generator=random)).to(device, dtype)
    return dict(kwargs, loss=case["loss"], normalize=case["normalize"], beta=case.get("beta", 1.0))


def _law(kwargs: dict) -> None:
    """Equal inputs give 0 (cosine: up to rounding); a normalised loss does not see the scale of either side."""
    options = {name: kwargs[name] for name in ("loss", "normalize", "beta")}
    teacher = kwargs["teacher"]
    zero = feature_alignment_loss(teacher, teacher, **options)
    empty_rows = (teacher == 0).all(-1).float().mean() if options["loss"] == "cosine" else 0  # 1 - 0 . 0
    assert abs(zero - empty_rows) < 1e-6, zero
    student = teacher.roll(1, -1)
    if options["normalize"] or options["loss"] == "cosine":
        plain = feature_alignment_loss(student, teacher, **options)
        scaled = feature_alignment_loss(4 * student, teacher / 2, **options)  # powers of 2: exact in every dtype
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-7)


def _bytes_moved(kwargs: dict) -> int:
    grad = kwargs["teacher"].numel() * kwargs["student"].element_size()
    return 2 * tensor_bytes(kwargs["teacher"]) + 3 * grad


SPEC = register(
    OpSpec(
        name=OP,
        function=feature_alignment_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student", "weight", "bias"),
        cases={
            "l1": dict(batch=3, tokens=5, width=32, loss="l1", normalize=True),
            "l2": dict(batch=2, tokens=4, width=48, loss="l2", normalize=True),
            "smooth_l1": dict(batch=2, tokens=3, width=33, loss="smooth_l1", normalize=True, beta=0.1),
            "cosine": dict(batch=2, tokens=3, width=24, loss="cosine", normalize=True),
            "raw_l1": dict(batch=2, tokens=3, width=16, loss="l1", normalize=False),
            "raw_l2": dict(batch=2, tokens=3, width=16, loss="l2", normalize=False),
            "raw_smooth_l1": dict(batch=2, tokens=3, width=16, loss="smooth_l1", normalize=False),
            "projected": dict(batch=2, tokens=5, width=32, student_width=24, loss="l1", normalize=True),
            "strided": dict(batch=3, tokens=4, width=40, loss="l1", normalize=True, strided=True),
            "odd_width": dict(batch=1, tokens=3, width=97, loss="l2", normalize=True),
            "one_token": dict(batch=1, tokens=1, width=8, loss="l1", normalize=True),
            "one_channel": dict(batch=2, tokens=2, width=1, loss="l2", normalize=False),
            "zero_teacher_row": dict(batch=2, tokens=3, width=16, loss="l1", normalize=True, zero_row=True),
            "teacher_float32": dict(batch=2, tokens=3, width=64, loss="cosine", normalize=True, teacher_float32=True),
        },
        space=dict(
            batch=(1, 2, 5), tokens=(1, 2, 7), width=(1, 8, 15, 64, 130), loss=LOSSES, normalize=(False, True),
            beta=(0.05, 1.0), strided=(False, True), zero_row=(False, True), teacher_float32=(False, True),
            seed=tuple(range(5)),
        ),
        bench={
            "vit_large_75": dict(batch=128, tokens=50, width=1024, loss="l1", normalize=True),
            "vit_large_95": dict(batch=128, tokens=10, width=1024, loss="l1", normalize=True),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 20 * k["teacher"].numel(),
        golden="dmae_distill_loss",
        law=_law,
    )
)  # fmt: skip
