"""Target and loss of one layer in the sequence of tensor operations of the published MaskAlign code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student: Tensor,
    teacher: Tensor,
    ids_keep: Tensor,
    norm: str = "whiten",
    loss: str = "smooth_l1",
    num_prefix: int = 1,
) -> Tensor:
    """The teacher's tokens are normalised, all of them; then the visible ones are gathered, and CLS joins them."""
    width = teacher.shape[-1]
    if norm == "whiten":
        teacher = F.layer_norm(teacher, (width,), eps=1e-5)
    elif norm == "l2":
        teacher = F.normalize(teacher, dim=-1)
    elif norm == "bn":
        teacher = (teacher - teacher.mean()) / (teacher.var() + 1e-6) ** 0.5
    prefix, patches = teacher[:, :num_prefix], teacher[:, num_prefix:]
    visible = torch.gather(patches, 1, ids_keep.unsqueeze(-1).repeat(1, 1, width))
    target = torch.cat([prefix[:, : student.shape[1] - ids_keep.shape[1]], visible], dim=1)
    if loss == "smooth_l1":
        return 2 * F.smooth_l1_loss(student, target)
    return F.mse_loss(student, target) if loss == "l2" else F.l1_loss(student, target)
