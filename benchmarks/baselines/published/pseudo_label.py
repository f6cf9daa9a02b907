"""Pseudo-labels as the released DAFormer and MIC make them: probabilities of full size, a count on the host."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    teacher_logits: Tensor, *, weight: str, threshold: float, scope: str = "batch", ignore_top: int = 0,
    ignore_bottom: int = 0, valid_mask: Tensor | None = None, size=None, label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if size is not None:
        teacher_logits = F.interpolate(teacher_logits, size=tuple(size), mode="bilinear", align_corners=False)
    probability, label = torch.max(torch.softmax(teacher_logits.detach(), dim=1), dim=1)
    if weight == "prob":
        return label, probability
    confident = probability.ge(threshold).long() == 1
    quality = torch.sum(confident).item() / np.size(np.array(label.cpu()))
    trust = quality * torch.ones(probability.shape, device=teacher_logits.device)
    if ignore_top > 0:
        trust[:, :ignore_top] = 0
    if ignore_bottom > 0:
        trust[:, -ignore_bottom:] = 0
    if valid_mask is not None:
        trust *= valid_mask.view(trust.shape)
    return label, trust
