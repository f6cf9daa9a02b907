"""PromptKD's released loss (Li et al. 2024): norms without a floor, a summed divergence over all elements."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def published(
    student_feature: Tensor,
    text_features: Tensor,
    *,
    teacher_feature: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    logit_scale: float = 100.0,
    teacher_logit_scale: float = 100.0,
    temperature: float = 1.0,
    weight: float = 1.0,
    reduction: str = "mean_elements",
) -> Tensor:
    if teacher_logits is None:
        teacher_feature = teacher_feature / teacher_feature.norm(dim=-1, keepdim=True)
        teacher_logits = teacher_logit_scale * teacher_feature @ text_features.t()
    student_feature = student_feature / student_feature.norm(dim=-1, keepdim=True)
    student_logits = logit_scale * student_feature @ text_features.t()
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    p = F.softmax(teacher_logits / temperature, dim=1)
    total = F.kl_div(log_q, p, reduction="sum") * (temperature * temperature)
    return weight * (total / (student_logits.numel() if reduction == "mean_elements" else len(student_logits))).float()
