"""Hint loss (FitNets, Romero et al. 2015, eq. 3): the student's feature, through a regressor, against the teacher's.

    l1, l2, smooth_l1    mean over all elements of |d|, d^2, smooth L1 of d = r(F_s) - F_t        (FitNets: l2)
    cosine               mean over feature vectors of 1 - cos

An element-wise loss does not ask for shapes: features of any shape are cut into rows of a convenient width and go
through the kernels of `feature_alignment_loss`, and so do feature vectors that are to be normalised. Forward reads both
features, backward reads them again and writes the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from .._spec import Case, OpSpec, register, tensor_bytes
from .feature_alignment import LOSSES, backward, feature_alignment_loss, forward

OP = "hint_loss"
WIDEST = 4096  # elements of a row, which a GPU kernel keeps in registers


def hint_loss(
    student: Tensor,
    teacher: Tensor,
    projector: nn.Module | None = None,
    loss: str = "l2",
    normalize: bool = False,
    *,
    beta: float = 1.0,
    channels: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Distance between a (projected) student feature and a teacher feature of the same shape.

    Args:
        student: any shape, floating: maps [N, C, H, W], tokens [B, T, D], vectors [N, D].
        teacher: the shape of the projected student; floating, its dtype may differ. Must not require grad.
        projector: applied to the student first: a `HintProjector`, a `torch.nn.Linear`, any module.
        loss: ``l2`` (FitNets; usual weight 100), ``l1``, ``smooth_l1`` or ``cosine``.
        normalize: divide each feature vector by its Euclidean norm (at least 1e-12) first. ``cosine`` always does.
        beta: where ``smooth_l1`` changes from squared to absolute, > 0.
        channels: dimension along which a feature vector lies, for normalisation; default 1 where there are 4 or 5
            dimensions (maps), else the last one (tokens).
        reduction: ``mean`` or ``sum``, over elements (``cosine``: over feature vectors).

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes that differ, nothing to compare, an unknown loss or reduction, beta <= 0, or a teacher that
            requires grad.
        TypeError: float64 on one side only.
    """
    if loss not in LOSSES:
        _check.fail(OP, "loss", repr(loss), "one of " + ", ".join(LOSSES))
    if reduction not in ("mean", "sum"):
        _check.fail(OP, "reduction", repr(reduction), "mean or sum")
    if loss == "smooth_l1" and not beta > 0:
        _check.fail(OP, "beta", beta, "a positive number", 'for beta = 0 use loss="l1"')
    if projector is not None:
        student = projector(student)
    for name, feature in (("student", student), ("teacher", teacher)):
        _check.check_tensor(OP, name, feature, getattr(feature, "ndim", 0))
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(OP, student=student, teacher=teacher)
    if student.shape != teacher.shape:
        fix = "give a projector, such as HintProjector(student_channels, teacher_channels, stride)"
        _check.fail(OP, "student", f"shape {tuple(student.shape)}", f"{tuple(teacher.shape)} like teacher", fix)
    if student.numel() == 0:
        _check.fail(OP, "student", f"shape {tuple(student.shape)}", "no empty dimension")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    vectors = normalize or loss == "cosine"
    if vectors:
        dim = _channel_dim(student, channels)
        student, teacher = (x.movedim(dim, -1).reshape(-1, x.shape[dim])[None] for x in (student, teacher))
    else:
        student, teacher = _in_rows(student, teacher)
    value = feature_alignment_loss(student, teacher, loss=loss, normalize=vectors, beta=beta)
    if reduction == "sum":
        value = value * (student.shape[1] if loss == "cosine" else student.numel())
    return value


def _channel_dim(feature: Tensor, channels: int | None) -> int:
    if feature.ndim == 0:
        _check.fail(OP, "student", "a scalar", "feature vectors to normalise")
    if channels is None:
        return 1 if feature.ndim in (4, 5) else -1
    if not -feature.ndim <= channels < feature.ndim:
        _check.fail(OP, "channels", channels, f"a dimension of {tuple(feature.shape)}")
    return channels


def _in_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [1, rows, width] in the student's memory order, as wide as divides their size."""
    if not student.is_contiguous() and student.ndim == 4 and student.is_contiguous(memory_format=torch.channels_last):
        student, teacher = student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)
    count = student.numel()
    width = next(w for w in range(min(WIDEST, count), 0, -1) if count % w == 0)
    return student.reshape(1, -1, width), teacher.reshape(1, -1, width)


class HintProjector(nn.Sequential):
    """The regressor of FitNets: convolution, batch normalisation, ReLU.

    Args:
        student_channels: channels that come in.
        teacher_channels: channels that go out.
        stride: 1 gives a 1 x 1 convolution; more gives a 3 x 3 one that halves (thirds ...) the map.
        relu: whether the teacher's feature is one after its ReLU.
    """

    def __init__(self, student_channels: int, teacher_channels: int, stride: int = 1, relu: bool = True) -> None:
        kernel = 1 if stride == 1 else 3
        conv = nn.Conv2d(student_channels, teacher_channels, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(teacher_channels), *([nn.ReLU()] if relu else []))


class HintLoss(nn.Module):
    """`hint_loss` as a module that owns its projector; ``forward(student, teacher)``. Train its parameters too."""

    def __init__(
        self,
        projector: nn.Module | None = None,
        loss: str = "l2",
        normalize: bool = False,
        *,
        beta: float = 1.0,
        channels: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.projector = projector
        self.options = dict(loss=loss, normalize=normalize, beta=beta, channels=channels, reduction=reduction)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hint_loss(student, teacher, self.projector, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(student: Tensor, teacher: Tensor, loss: str = "l2", normalize: bool = False) -> Tensor:
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(wide), teacher.to(wide)
    if normalize or loss == "cosine":
        dim = 1 if student.ndim == 4 else -1
        student, teacher = F.normalize(student, dim=dim), F.normalize(teacher, dim=dim)
        if loss == "cosine":
            return (1 - (student * teacher).sum(dim)).mean()
    return {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[loss](student, teacher)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    student, teacher = (torch.randn(case["batch"], *case["shape"], generator=random) for _ in range(2))
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    student, teacher = student.to(device, dtype), (2 * teacher).to(device, teacher_dtype)
    if case.get("channels_last"):
        student, teacher = (x.transpose(1, -1).contiguous().transpose(1, -1) for x in (student, teacher))
    return dict(student=student, teacher=teacher, loss=case["loss"], normalize=case.get("normalize", False))


SPEC = register(
    OpSpec(
        name=OP,
        function=hint_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student",),
        cases={
            "maps": dict(batch=2, shape=(5, 3, 4), loss="l2"),
            "channels_last": dict(batch=2, shape=(6, 3, 4), loss="smooth_l1", channels_last=True),
            "tokens": dict(batch=2, shape=(4, 9), loss="l1", teacher_float32=True),
            "normalized_maps": dict(batch=2, shape=(7, 2, 3), loss="l2", normalize=True),
            "cosine_tokens": dict(batch=2, shape=(3, 8), loss="cosine"),
        },
        space=dict(
            batch=(1, 3), shape=((9,), (5, 7), (8, 3, 5)), loss=LOSSES, normalize=(False, True),
            channels_last=(False, True), teacher_float32=(False, True), seed=tuple(range(3)),
        ),
        bench={
            "resnet_28": dict(batch=32, shape=(256, 28, 28), loss="l2"),
            "resnet_28_normalized": dict(batch=32, shape=(256, 28, 28), loss="l2", normalize=True),
        },
        bytes_moved=lambda k: 3 * tensor_bytes(k["student"]) + 2 * tensor_bytes(k["teacher"]),
        flops=lambda k: 8 * k["student"].numel(),
        golden="classic_kd_feature",
    )
)  # fmt: skip
