"""Two heads in full, then the divergence as mdistiller and RepDistiller write it (Hinton et al. 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = F.linear(student_input, student_weight, student_bias)
    with torch.no_grad():
        teacher = F.linear(teacher_input, teacher_weight)
    log_q = F.log_softmax(logits / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean().float()
