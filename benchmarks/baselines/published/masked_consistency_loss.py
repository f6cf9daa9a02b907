"""The weighted loss as the released code composes it: resize, cross entropy per pixel, weight, mean."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def published(
    student_logits: Tensor, label: Tensor, weight: Tensor | None = None, *, ignore_index: int = 255, size=None
) -> Tensor:
    if student_logits.ndim == 4 and student_logits.shape[2:] != label.shape[1:]:
        student_logits = F.interpolate(student_logits, size=label.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(student_logits, label.long(), reduction="none", ignore_index=ignore_index)
    return (loss if weight is None else weight.float() * loss).mean()
