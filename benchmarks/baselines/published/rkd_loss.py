"""Relational distillation in its authors' steps: distances from a Gram matrix, angles from N x N x D differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distances(feature: Tensor, squared: bool, eps: float = 1e-12) -> Tensor:
    square, product = feature.pow(2).sum(dim=1), feature @ feature.t()
    found = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * product).clamp(min=eps)
    found = found if squared else found.sqrt()
    found = found.clone()
    found[range(len(feature)), range(len(feature))] = 0
    return found / found[found > 0].mean()


def angles(feature: Tensor) -> Tensor:
    edges = F.normalize(feature.unsqueeze(0) - feature.unsqueeze(1), p=2, dim=2)
    return torch.bmm(edges, edges.transpose(1, 2)).view(-1)


def published(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0, squared: bool = False
) -> Tensor:
    """Arguments of `fastkd.ops.rkd_loss`."""
    student, teacher = student.float(), teacher.float()
    with torch.no_grad():
        goal = distances(teacher, squared)
    loss = distance_weight * F.smooth_l1_loss(distances(student, squared), goal)
    with torch.no_grad():
        goal = angles(teacher)
    return loss + angle_weight * F.smooth_l1_loss(angles(student), goal)
