"""Similarity-preserving distillation (Tung & Mori 2019, eq. 2 to 4): samples alike for the teacher are alike for the
student.

    G = F F^T of the flattened features, rows divided by their norm (at least 1e-12);  sum (G_t - G_s)^2 / N^2

All of the cost is in the matrix products, one a side and one in backward (`gram`); what follows works on N x N numbers
and is plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._spec import Case, OpSpec, register, tensor_bytes
from .gram import backward, forward, gram

OP = "sp_loss"
NORM_FLOOR = 1e-12


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving loss; usual weight 3000.

    Args:
        student: [N, ...], floating; everything behind the first dimension is one row.
        teacher: [N, ...] with other features per sample as it likes; floating. Must not require grad.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: other numbers of rows, nothing to compare, or a teacher that requires grad.
        TypeError: float64 on one side only.
    """
    student, teacher = check_rows(OP, student, teacher)
    similar = (F.normalize(gram(x), dim=1, eps=NORM_FLOOR) for x in (student, teacher))
    return F.mse_loss(*similar)


def check_rows(op: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as [N, D], checked."""
    rows = []
    for name, feature in (("student", student), ("teacher", teacher)):
        _check.check_tensor(op, name, feature, min(max(feature.ndim, 2), 5) if isinstance(feature, Tensor) else 2)
        if feature.numel() == 0:
            _check.fail(op, name, f"shape {tuple(feature.shape)}", "no empty dimension")
        rows.append(feature.flatten(1))
    _check.check_no_grad(op, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(op, student=student, teacher=teacher)
    if student.shape[0] != teacher.shape[0]:
        _check.fail(op, "student", f"{student.shape[0]} samples", f"{teacher.shape[0]} like teacher")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(op, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    return rows[0], rows[1]


class SPLoss(torch.nn.Module):
    """`sp_loss` as a module; ``forward(student, teacher)``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sp_loss(student, teacher)


def _reference(student: Tensor, teacher: Tensor) -> Tensor:
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = (x.flatten(1).to(wide) for x in (student, teacher))
    return F.mse_loss(F.normalize(student @ student.T), F.normalize(teacher @ teacher.T))


def build_rows(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    """Student and teacher of random rows, or of maps where the case has a size."""
    random = torch.Generator().manual_seed(case.get("seed", 0))
    size = case.get("size", ())
    student = torch.randn(case["batch"], case["width"], *size, generator=random)
    teacher = torch.randn(case["batch"], case.get("teacher_width", case["width"]), *size, generator=random) + 0.2
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    return dict(student=student.to(device, dtype), teacher=teacher.to(device, teacher_dtype))


def _law(kwargs: dict) -> None:
    """A rotated and scaled teacher is imitated perfectly."""
    teacher = kwargs["teacher"]
    assert sp_loss(-2 * teacher.flip(1), teacher) < 1e-10


SPEC = register(
    OpSpec(
        name=OP,
        function=sp_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=build_rows,
        differentiable=("student",),
        cases={
            "maps": dict(batch=4, width=6, teacher_width=9, size=(5, 3)),
            "rows": dict(batch=5, width=7, teacher_float32=True),
        },
        space=dict(
            batch=(2, 3, 9), width=(4, 17), teacher_width=(1, 30), size=((), (2, 3)), teacher_float32=(False, True),
            seed=tuple(range(3)),
        ),
        bench={"resnet_28": dict(batch=64, width=128, size=(28, 28))},
        bytes_moved=lambda k: 3 * tensor_bytes(k["student"]) + tensor_bytes(k["teacher"]),
        flops=lambda k: 2 * len(k["student"]) * (2 * k["student"].numel() + k["teacher"].numel()),
        golden="classic_kd_feature",
        law=_law,
    )
)  # fmt: skip
