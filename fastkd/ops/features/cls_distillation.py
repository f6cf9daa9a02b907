"""Distance of class tokens (Self-Distillation for Further Pre-training, Lee et al. 2023, their second phase).

    loss = 1/B sum_b || h_S(b) - h_T(b) ||^2            summed over channels, mean over the batch
    d loss / d h_S = 2/B (h_S - h_T)

That is D times the mean square of `feature_alignment_loss`, whose kernels make loss and gradient, so it has none of its
own. D times `torch.nn.functional.mse_loss` is part of the method, whose weight is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .feature_alignment import feature_alignment_loss

OP = "cls_distillation_loss"


def cls_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Euclidean distance between a student's vectors and those of a frozen teacher, mean over vectors.

    Args:
        student: [B, D] class tokens, or [B, T, D] all tokens (then the mean is over B and T), floating.
        teacher: like student; its dtype may differ. Must not require grad.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes that differ, an empty batch, or a teacher that requires grad.
    """
    _check.check_tensor(OP, "student", student, 3 if getattr(student, "ndim", 2) == 3 else 2)
    _check.check_tensor(OP, "teacher", teacher, student.ndim)
    _check.check_shape(OP, "teacher", teacher, student.shape, "like student; the method has no projector")
    return student.shape[-1] * feature_alignment_loss(student, teacher, loss="l2", normalize=False)


class CLSDistillationLoss(torch.nn.Module):
    """`cls_distillation_loss` as a module; ``forward(student, teacher)``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cls_distillation_loss(student, teacher)
