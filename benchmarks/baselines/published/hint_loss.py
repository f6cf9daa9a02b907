"""The hint loss as everybody writes it: torch's own loss, behind torch's own normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def published(student: Tensor, teacher: Tensor, loss: str = "l2", normalize: bool = False) -> Tensor:
    """Arguments of `fastkd.ops.hint_loss`."""
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[loss](student, teacher)
