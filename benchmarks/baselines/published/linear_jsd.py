"""Two heads in full, then the generalised JSD as TRL and Liger-Kernel write it (GKD, Agarwal et al. 2024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    logits = F.linear(student_input, student_weight, student_bias)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_input, teacher_weight) / temperature, dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    if beta == 0:
        each = F.kl_div(student, teacher, reduction="none", log_target=True)
    elif beta == 1:
        each = F.kl_div(teacher, student, reduction="none", log_target=True)
    else:
        parts = torch.stack((student + math.log(1 - beta), teacher + math.log(beta)))
        mixture = torch.logsumexp(parts, dim=0)
        each = beta * F.kl_div(mixture, teacher, reduction="none", log_target=True)
        each = each + (1 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True)
    mask = target != ignore_index
    loss = each[mask].sum().float() / mask.sum()
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(logits.float(), target, ignore_index=ignore_index)
    return loss
