"""Dual-view feature mimicking (ScaleKD, Fan et al., NeurIPS 2024, section 3.3).

Student tokens s and teacher tokens t, [B, N, C] over N = H * W positions, are compared twice, with the unit vectors
u(x) = x / max(||x||_2, 1e-12) over the channels of a position:

    plain        = a0 / B * sum_bnc (u(s) - u(t))^2
    alternative  = a1 / B * sum_bnc (u(R s) - u(R t))^2         R x = x - mean_N(x), channel by channel

The sum runs over positions and channels, the division is by the batch alone. R removes the direct component: in the
authors' words a 2-D DCT whose [0, 0] coefficient is set to 0. That basis function is the constant, so the mean over the
positions is all that there is to subtract, for any H and W. R is its own adjoint: with d = u(x) - u(y), y the teacher's

    d plain / d s       = 2 a0 / B * (d - u (u . d)) / ||s||                 no projection where ||s|| < 1e-12
    d alternative / d s = R of the same expression at x = R s

Student means and norms are kept from forward for backward, [B, C] and [B, N] numbers. The teacher's serve every loss
against the same features: `dual_view_target` makes them once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "dual_view_loss"
LAYOUTS = ("tokens", "map")
NORM_FLOOR = 1e-12


class DualViewTarget(NamedTuple):
    """Teacher features with what every loss against them needs; made by `dual_view_target`.

    Attributes:
        tokens: [B, N, C], a view of what was given.
        mean: [B, C] over positions, float32 (float64 for float64 features).
        inverse_norms: [2, B, N], 1 / max(norm, 1e-12) of the plain and of the centred tokens, in the dtype of mean.
    """

    tokens: Tensor
    mean: Tensor
    inverse_norms: Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inverse_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(NORM_FLOOR).reciprocal()


def _fill_target(teacher, mean, inverse_norms) -> None:
    tokens = teacher.to(mean.dtype)
    mean.copy_(tokens.mean(1))
    inverse_norms[0] = _inverse_norm(tokens)
    inverse_norms[1] = _inverse_norm(tokens - mean[:, None])


def _units(plain, alt, teacher, teacher_mean, teacher_inverse, mean, inverse) -> list[tuple[Tensor, Tensor]]:
    """Unit vectors of student and teacher, view by view."""
    wide = teacher_mean.dtype
    plain, alt, teacher = plain.to(wide), (plain if alt is None else alt).to(wide), teacher.to(wide)
    pairs = (plain, teacher), (alt - mean[:, None], teacher - teacher_mean[:, None])
    return [(s * inverse[view, :, :, None], t * teacher_inverse[view, :, :, None]) for view, (s, t) in enumerate(pairs)]


def _fill_forward(
    plain, alt, teacher, teacher_mean, teacher_inverse, alpha_plain, alpha_alt, mean, rows, losses
) -> None:
    _fill_target(plain if alt is None else alt, mean, rows[0])
    rows[0, 0] = _inverse_norm(plain.to(mean.dtype))
    views = _units(plain, alt, teacher, teacher_mean, teacher_inverse, mean, rows[0])
    for view, ((u, v), alpha) in enumerate(zip(views, (alpha_plain, alpha_alt))):
        difference = u - v
        losses[view] = difference.square().sum() * (alpha / len(plain))
        # Below the floor the divisor is a constant: nothing to project out.
        rows[1, view] = (u * difference).sum(-1) * (rows[0, view] < 1 / NORM_FLOOR)


def _fill_backward(
    grad_losses, plain, alt, teacher, teacher_mean, teacher_inverse, mean, rows, alpha_plain, alpha_alt, grad_alt,
    grad_plain,
) -> None:  # fmt: skip
    gradients = []
    views = _units(plain, alt, teacher, teacher_mean, teacher_inverse, mean, rows[0])
    for view, ((u, v), alpha) in enumerate(zip(views, (alpha_plain, alpha_alt))):
        inverse, along = rows[:, view, :, :, None]
        gradients.append((u - v - u * along) * inverse * (grad_losses[view] * (2 * alpha / len(plain))))
    gradients[1] = gradients[1] - gradients[1].mean(1, keepdim=True)
    if grad_alt is None:
        grad_plain.copy_(gradients[0] + gradients[1])
    else:
        grad_plain.copy_(gradients[0])
        grad_alt.copy_(gradients[1])


_TRITON = "fastkd.ops.features.dual_view_triton"
target = Kernel("dual_view_target", reference=_fill_target, triton=f"{_TRITON}:target")
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


def _statistics(tokens: Tensor, *kinds: int) -> tuple[Tensor, Tensor]:
    batch, positions, channels = tokens.shape
    mean = torch.empty(batch, channels, dtype=_wide(tokens.dtype), device=tokens.device)
    return mean, torch.empty(*kinds, 2, batch, positions, dtype=mean.dtype, device=tokens.device)


@custom_op("dual_view_target")
def _op_target(teacher: Tensor) -> tuple[Tensor, Tensor]:
    statistics = _statistics(teacher)
    target(teacher, *statistics)
    return statistics


@_op_target.register_fake
def _(teacher):
    return _statistics(teacher)


@custom_op("dual_view_loss")
def _op(
    plain: Tensor, alt: Tensor | None, teacher: Tensor, teacher_mean: Tensor, teacher_inverse: Tensor,
    alpha_plain: float, alpha_alt: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rows = _statistics(plain, 2)  # inverse norms, and u . d
    losses = torch.empty(2, dtype=mean.dtype, device=plain.device)
    forward(plain, alt, teacher, teacher_mean, teacher_inverse, alpha_plain, alpha_alt, mean, rows, losses)
    return losses, mean, rows


@_op.register_fake
def _(plain, alt, teacher, teacher_mean, teacher_inverse, alpha_plain, alpha_alt):
    mean, rows = _statistics(plain, 2)
    return torch.empty(2, dtype=mean.dtype, device=plain.device), mean, rows


@custom_op("dual_view_loss_backward")
def _op_backward(
    grad_losses: Tensor, plain: Tensor, alt: Tensor | None, teacher: Tensor, teacher_mean: Tensor,
    teacher_inverse: Tensor, mean: Tensor, rows: Tensor, alpha_plain: float, alpha_alt: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_plain, grad_alt = _gradients(plain, alt)
    backward(
        grad_losses.contiguous(), plain, alt, teacher, teacher_mean, teacher_inverse, mean, rows, alpha_plain,
        alpha_alt, None if alt is None else grad_alt, grad_plain,
    )  # fmt: skip
    return grad_plain, grad_alt


def _gradients(plain: Tensor, alt: Tensor | None) -> tuple[Tensor, Tensor]:
    like = plain if alt is None else alt
    grad_alt = torch.empty((0,) if alt is None else alt.shape, dtype=like.dtype, device=plain.device)
    return torch.empty(plain.shape, dtype=plain.dtype, device=plain.device), grad_alt


@_op_backward.register_fake
def _(grad_losses, plain, alt, *_constants):
    return _gradients(plain, alt)


def _setup_context(ctx, inputs, output) -> None:
    plain, alt, *teacher, ctx.alpha_plain, ctx.alpha_alt = inputs
    _losses, mean, rows = output
    ctx.save_for_backward(plain, alt, *teacher, mean, rows)
    ctx.mark_non_differentiable(mean, rows)


def _autograd(ctx, grad_losses: Tensor, _grad_mean, _grad_rows):
    grad_plain, grad_alt = _op_backward(grad_losses, *ctx.saved_tensors, ctx.alpha_plain, ctx.alpha_alt)
    return grad_plain, None if ctx.saved_tensors[1] is None else grad_alt, *[None] * 5


_op.register_autograd(_autograd, setup_context=_setup_context)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        _check.fail(OP, "layout", repr(layout), "'tokens' for [B, N, C] or 'map' for [B, C, H, W]")


def _as_tokens(argument: str, x: Tensor, is_map: bool) -> Tensor:
    """[B, N, C] view of tokens or of a [B, C, H, W] map."""
    _check.check_tensor(OP, argument, x, 4 if is_map else 3)
    return x.flatten(2).transpose(1, 2) if is_map else x


def remove_dc(x: Tensor, layout: str = "tokens") -> Tensor:
    """Features without their direct component: the mean over positions is subtracted, channel by channel.

    The same as a 2-D DCT-II, zero at coefficient [0, 0], inverse DCT (ScaleKD, section 3.3), for any height and width.
    `dual_view_loss` does it inside its kernels.

    Args:
        x: [B, N, C] for ``tokens``, [B, C, H, W] for ``map``; floating.
        layout: ``tokens`` or ``map``.

    Returns:
        Shape and dtype of x; the mean is taken and subtracted in float32 (float64 for float64).

    Raises:
        ValueError: an unknown layout or another number of dimensions. TypeError: not floating.
    """
    _check_layout(layout)
    _check.check_tensor(OP, "x", x, 4 if layout == "map" else 3)
    wide = x.to(_wide(x.dtype))
    return (wide - wide.mean((2, 3) if layout == "map" else 1, keepdim=True)).to(x.dtype)


def dual_view_target(teacher: Tensor) -> DualViewTarget:
    """What `dual_view_loss` needs of the teacher, made once for several losses against the same features.

    Args:
        teacher: tokens [B, N, C] or a map [B, C, H, W], floating, any strides. Must not require grad.

    Returns:
        `DualViewTarget`, to be passed in the teacher's place.

    Raises:
        ValueError: another number of dimensions, no values, or a teacher that requires grad. TypeError: not floating.
    """
    is_map = isinstance(teacher, Tensor) and teacher.ndim == 4
    tokens = _as_tokens("teacher", teacher, is_map)
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    if tokens.numel() == 0:
        _check.fail(OP, "teacher", f"shape {tuple(teacher.shape)}", "at least one image, position and channel")
    return DualViewTarget(tokens, *_op_target(tokens))


def dual_view_loss(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Tensor | DualViewTarget,
    *,
    alpha: tuple[float, float] = (0.08, 0.06),
    layout: str = "tokens",
) -> tuple[Tensor, Tensor]:
    """Squared distance of unit feature vectors, once as they are and once without their direct component.

    Args:
        student: [B, N, C] for ``tokens``, token index h * W + w, or [B, C, H, W] for ``map``; floating, any strides.
            Or a pair of such, one for each loss, as ScaleKD's two projectors make them.
        teacher: features of the same size, tokens [B, N, C] or a map [B, C, H, W] whatever the student's layout; the
            dtype may differ from the student's. Must not require grad. Or what `dual_view_target` made of them.
        alpha: factors of the two losses.
        layout: the student's, ``tokens`` or ``map``.

    Returns:
        (loss_plain, loss_alt): scalars, float32 (float64 for float64 features), summed over positions and channels
        and divided by the batch, so between 0 and 4 * N * alpha.

    Raises:
        ValueError: shapes that do not fit, no values, an unknown layout, or a teacher that requires grad.
        TypeError: not floating, or float64 on one side only.

    Source: ScaleKD, section 3.3; the factors are those of the released configurations.
    """
    _check_layout(layout)
    students = tuple(student) if isinstance(student, (tuple, list)) else (student,)
    if len(students) not in (1, 2):
        _check.fail(OP, "student", f"{len(students)} tensors", "one, or a pair: for the plain loss, for the other")
    goal = teacher if isinstance(teacher, DualViewTarget) else dual_view_target(teacher)
    size = teacher.shape[2:] if isinstance(teacher, Tensor) and teacher.ndim == 4 else None
    tokens = []
    for x in students:
        tokens.append(_as_tokens("student", x, layout == "map"))
        if layout == "map" and size not in (None, x.shape[2:]):
            _check.fail(OP, "student", f"a map of {tuple(x.shape[2:])}", f"{tuple(size)} like the teacher's")
        _check_student(tokens[-1], goal.tokens)
    losses, _mean, _rows = _op(tokens[0], tokens[1] if len(tokens) == 2 else None, *goal, *map(float, alpha))
    return losses.unbind()


def _check_student(student: Tensor, teacher: Tensor) -> None:
    _check.check_same_device(OP, student=student, teacher=teacher)
    if student.shape != teacher.shape:
        fix = "" if student.shape[:2] != teacher.shape[:2] else "project it, see fastkd.nn.CrossAttentionProjector"
        _check.fail(
            OP, "student", f"shape {tuple(student.shape)}", f"{tuple(teacher.shape)} [B, N, C] like the teacher", fix
        )
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)


class DualViewLoss(torch.nn.Module):
    """`dual_view_loss` as a module; ``forward(student, teacher) -> (loss_plain, loss_alt)``."""

    def __init__(self, alpha: tuple[float, float] = (0.08, 0.06), layout: str = "tokens") -> None:
        super().__init__()
        _check_layout(layout)
        self.alpha, self.layout = alpha, layout

    def forward(
        self, student: Tensor | tuple[Tensor, Tensor], teacher: Tensor | DualViewTarget
    ) -> tuple[Tensor, Tensor]:
        return dual_view_loss(student, teacher, alpha=self.alpha, layout=self.layout)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, layout={self.layout!r}"


def _reference(student, teacher, *, alpha=(0.08, 0.06), layout="tokens") -> tuple[Tensor, Tensor]:
    pair = student if isinstance(student, tuple) else (student, student)
    wide = _wide(pair[0].dtype)
    teacher = _as_tokens("teacher", teacher, teacher.ndim == 4).to(wide)
    plain, alt = (_as_tokens("student", x, layout == "map").to(wide) for x in pair)
    losses = []
    for s, t, factor in zip((plain, remove_dc(alt)), (teacher, remove_dc(teacher)), alpha):
        u, v = (F.normalize(x, dim=-1, eps=NORM_FLOOR) for x in (s, t))
        losses.append((u - v).square().sum() * (factor / len(s)))
    return tuple(losses)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    shape = case["batch"], case["grid"][0] * case["grid"][1], case["channels"]
    student = torch.randn(shape, generator=random) + 0.3
    teacher = 3 * torch.randn(shape, generator=random) + torch.randn(shape[2], generator=random)
    if case.get("zero_row") and shape[0]:
        teacher[0, 0] = 0
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    student, teacher = student.to(device, dtype), teacher.to(device, teacher_dtype)

    def as_map(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().unflatten(2, case["grid"])

    if case.get("teacher_map"):
        teacher = as_map(teacher)
    layout = case.get("layout", "tokens")
    return dict(student=as_map(student) if layout == "map" else student, teacher=teacher, layout=layout)


def _law(kwargs: dict) -> None:
    """Equal features give 0; a scale of either side is not seen; the second view sees no constant."""
    student, teacher, layout = kwargs["student"], kwargs["teacher"], kwargs["layout"]
    same = dual_view_loss(student, student, layout=layout)
    assert max(same) < 1e-9, same
    plain = dual_view_loss(student, teacher, layout=layout)
    scaled = dual_view_loss(4 * student, teacher / 2, layout=layout)  # powers of 2: exact in every dtype
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)
    moved = dual_view_loss(student + 1, teacher, layout=layout)[1]
    torch.testing.assert_close(moved, plain[1], rtol=1e-3, atol=1e-5)


def _bytes_moved(kwargs: dict) -> int:
    # Both passes read the student and the teacher, backward writes a gradient.
    return 3 * tensor_bytes(kwargs["student"]) + 2 * tensor_bytes(kwargs["teacher"])


SPEC = register(
    OpSpec(
        name=OP,
        function=dual_view_loss,
        reference=_reference,
        kernels=(target, forward, backward),
        build=_build,
        differentiable=("student",),
        cases={
            "tokens": dict(batch=2, grid=(3, 3), channels=24),
            "teacher_map": dict(batch=2, grid=(2, 3), channels=33, teacher_map=True),
            "maps": dict(batch=2, grid=(4, 5), channels=17, teacher_map=True, layout="map"),
            "wide": dict(batch=1, grid=(3, 7), channels=300),
            "one_position": dict(batch=2, grid=(1, 1), channels=8),
            "mixed": dict(batch=2, grid=(2, 2), channels=16, zero_row=True, teacher_float32=True),
        },
        space=dict(
            batch=(1, 2, 3), grid=((1, 1), (1, 2), (3, 3), (5, 4), (3, 11)), channels=(2, 8, 31, 64, 130),
            layout=LAYOUTS, teacher_map=(False, True), zero_row=(False, True), teacher_float32=(False, True),
            seed=tuple(range(5)),
        ),
        bench={
            "swin_large_224": dict(batch=64, grid=(7, 7), channels=1536),
            "beit_large_224": dict(batch=32, grid=(14, 14), channels=1024),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 60 * k["student"].numel(),
        golden="scalekd_dfm",
        law=_law,
    )
)  # fmt: skip
