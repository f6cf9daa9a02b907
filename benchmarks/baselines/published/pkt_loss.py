"""Probabilistic knowledge transfer in its authors' steps."""

from __future__ import annotations

import torch
from torch import Tensor


def published(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Arguments of `fastkd.ops.pkt_loss`."""

    def neighbours(feature: Tensor) -> Tensor:
        norm = torch.sqrt(torch.sum(feature**2, dim=1, keepdim=True))
        unit = feature / (norm + eps)
        unit[unit != unit] = 0
        similar = (torch.mm(unit, unit.transpose(0, 1)) + 1.0) / 2.0
        return similar / torch.sum(similar, dim=1, keepdim=True)

    of_s, of_t = neighbours(student), neighbours(teacher)
    return torch.mean(of_t * torch.log((of_t + eps) / (of_s + eps)))
