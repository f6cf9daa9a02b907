"""Cosine of student and teacher logits, row by row: ``mean over the rows that count of 1 - cos(z_n, v_n)``.

Plain PyTorch: three small sums a row that torch.compile fuses; a row is not normalised by softmax, so nothing needs
the care that the other logit losses take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .terms import wide

OP = "logit_cosine_loss"


def logit_cosine_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    eps: float = 1e-8,
    teacher_grad: bool = False,
) -> Tensor:
    """One minus the cosine between the logits of student and teacher, mean over the rows.

    Args:
        student_logits, teacher_logits: [..., C], floating. The teacher must not require grad.
        target: int64 [...]: rows of `ignore_index` count nowhere, neither in the sum nor in its divisor.
        eps: least norm of a row.
        teacher_grad: lets the teacher's logits require grad, and gives them one.

    Returns:
        Scalar, float32 (float64 for float64 logits); 0 where all rows are ignored.

    Raises:
        ValueError: shapes that do not fit, no rows, or a teacher that requires grad.
        TypeError: not floating logits, or a target that is not int64.
    """
    _check.check_tensor(OP, "student_logits", student_logits, max(getattr(student_logits, "ndim", 2), 1))
    _check.check_tensor(OP, "teacher_logits", teacher_logits, student_logits.ndim)
    _check.check_shape(OP, "teacher_logits", teacher_logits, tuple(student_logits.shape), "like student_logits")
    if not teacher_grad:
        _check.check_no_grad(OP, "teacher_logits", teacher_logits, "a distillation loss must not train the teacher")
    if student_logits.numel() == 0:
        shape = f"shape {tuple(student_logits.shape)}"
        _check.fail(OP, "student_logits", shape, "at least one row", "the mean of nothing is undefined")
    student, teacher = (x.to(wide(student_logits.dtype)) for x in (student_logits, teacher_logits))
    row = 1 - F.cosine_similarity(student, teacher, dim=-1, eps=eps)
    if target is None:
        return row.mean()
    _check.check_tensor(OP, "target", target, student_logits.ndim - 1, (torch.int64,))
    _check.check_shape(OP, "target", target, tuple(student_logits.shape[:-1]), "like the rows of student_logits")
    valid = target != ignore_index
    return torch.where(valid, row, 0).sum() / valid.sum().clamp_min(1)


class LogitCosineLoss(torch.nn.Module):
    """`logit_cosine_loss` as a module; ``forward(student_logits, teacher_logits, target=None)``."""

    def __init__(self, *, ignore_index: int = -100, eps: float = 1e-8, teacher_grad: bool = False) -> None:
        super().__init__()
        self.options = dict(ignore_index=ignore_index, eps=eps, teacher_grad=teacher_grad)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return logit_cosine_loss(student_logits, teacher_logits, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
