"""Similarity-preserving loss in its authors' steps: two Gram matrices, normalised, subtracted, squared, summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """Arguments of `fastkd.ops.sp_loss`."""
    count = student.shape[0]
    student, teacher = student.reshape(count, -1), teacher.reshape(count, -1)
    similar_s, similar_t = (F.normalize(torch.mm(f, torch.t(f))) for f in (student, teacher))
    difference = similar_t - similar_s
    return (difference * difference).view(-1, 1).sum(0).squeeze() / (count * count)
