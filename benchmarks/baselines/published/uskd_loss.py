"""USKD in the steps in which the released code takes them: two sorts, two boolean selections, every softmax twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student_logits: Tensor, weak_logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 0.1,
    mu: float = 0.005, rank_score: str = "log", ce_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """Arguments of `fastkd.ops.uskd_loss`."""
    batch, classes = student_logits.shape
    if target.ndim == 2:
        scores, order = torch.sort(target, dim=1, descending=True)
        value, label = scores[:, :2], order[:, :2]
        smooth = 0.9 * target + 0.1 * torch.ones_like(student_logits) / classes
    else:
        label = target.view(batch, 1)
        value = torch.ones_like(label)
        smooth = 0.9 * torch.zeros_like(student_logits).scatter_(1, label, 1) + (
            0.1 * torch.ones_like(student_logits) / classes
        )
    chosen = torch.gather(F.softmax(student_logits, dim=1), 1, label) ** 2
    soft = chosen + value - chosen.mean(0, True)
    soft[value == 0] = 0
    soft = soft.detach()
    log_q = F.log_softmax(student_logits, dim=1)
    log_target = torch.gather(log_q, 1, label)
    loss_target = -(soft * log_target).sum(dim=1).mean()

    loss_weak = -(mu * smooth * F.log_softmax(weak_logits, dim=1)).sum(dim=1).mean()
    weak = F.softmax(weak_logits, dim=1)
    student, of_target = log_q, log_target
    if rank_score == "prob":
        student = F.softmax(student_logits, dim=1)
        of_target = torch.gather(student, 1, label)
    rank = weak / (1 - torch.gather(weak, 1, label).sum(1, True) + 1e-6)
    rank = rank + student / (1 - of_target.sum(1, True) + 1e-6)
    order = torch.argsort(rank, dim=1, descending=True)
    place = torch.argsort(order, dim=1)
    zipf = 1.0 / (place + 1)
    others = torch.ones_like(student_logits).scatter_(1, label, 0).bool()
    log_rest = F.log_softmax(student_logits[others].reshape(batch, -1), dim=1)
    zipf = zipf[others].reshape(batch, -1)
    zipf = (zipf / zipf.sum(dim=1, keepdim=True)).detach()
    loss_rest = -(zipf * log_rest).sum(dim=1).mean()
    loss = alpha * loss_target + beta * loss_rest + loss_weak
    return loss + ce_weight * F.cross_entropy(student_logits, target) if ce_weight else loss
