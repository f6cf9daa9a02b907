"""Attention transfer in the steps of the common distillation libraries: a power map of feature size, then its mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(student: Tensor, teacher: Tensor, p: float = 2.0, mode: str = "mean") -> Tensor:
    """Arguments of `fastkd.ops.at_loss`; maps of one size."""

    def attention(feature: Tensor) -> Tensor:
        power = feature.pow(2) if p == 2 else feature.abs().pow(p)
        return F.normalize(power.mean(1).reshape(feature.size(0), -1))

    difference = attention(student) - attention(teacher)
    return difference.pow(2).mean() if mode == "mean" else torch.norm(difference, dim=1).mean()
