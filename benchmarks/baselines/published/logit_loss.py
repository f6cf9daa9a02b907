"""KD and DKD in the order of mdistiller's code, the generalised JSD in that of TRL's GKDTrainer, NKD in that of cls_KD:
softmaxes and their logarithms one after the other, masks that are multiplied or select, one reduction each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    ce: float = 0.0,
    kl: float = 0.0,
    jsd: float = 0.0,
    dkd: Sequence[float] = (0.0, 0.0),
    nkd: Sequence[float] = (0.0, 0.0),
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    pair, parts = (student_logits, teacher_logits), []
    if ce:
        parts.append(ce * F.cross_entropy(student_logits, target))
    if kl:
        parts.append(kl * hinton(*pair, temperature))
    if jsd:
        parts.append(jsd * generalised_jsd(*pair, temperature, beta) * temperature**2)
    if any(dkd):
        parts.append(decoupled(*pair, target, *dkd, temperature))
    if any(nkd):
        parts.append(normalised(*pair, target, *nkd, temperature))
    return sum(parts).float()


def hinton(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def generalised_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    share = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
    log_m = torch.logsumexp(torch.stack([log_q + torch.log(1 - share), log_p + torch.log(share)]), dim=0)
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (share * of_teacher + (1 - share) * of_student).sum() / len(student)


def two_classes(probabilities: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([(probabilities * first).sum(1, keepdim=True), (probabilities * second).sum(1, keepdim=True)], 1)


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    at = target.reshape(-1, 1)
    is_target = torch.zeros_like(student).scatter_(1, at, 1).bool()
    is_other = torch.ones_like(student).scatter_(1, at, 0).bool()
    q, p = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    log_pair = torch.log(two_classes(q, is_target, is_other))
    first = F.kl_div(log_pair, two_classes(p, is_target, is_other), reduction="sum") * temperature**2 / len(target)
    rest = F.softmax(teacher / temperature - 1000.0 * is_target, dim=1)
    log_rest = F.log_softmax(student / temperature - 1000.0 * is_target, dim=1)
    second = F.kl_div(log_rest, rest, reduction="sum") * temperature**2 / len(target)
    return alpha * first + beta * second


def normalised(
    student: Tensor, teacher: Tensor, target: Tensor, first: float, gamma: float, temperature: float
) -> Tensor:
    rows, classes = student.shape
    at = target.view(-1, 1)
    log_q, p = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    of_target = -(p.gather(1, at).detach() * log_q.gather(1, at)).mean()
    other = torch.ones_like(student).scatter_(1, at, 0).bool()
    rest, teacher_rest = student[other].reshape(rows, classes - 1), teacher[other].reshape(rows, classes - 1)
    log_rest = F.log_softmax(rest / temperature, dim=1)
    of_rest = -(F.softmax(teacher_rest / temperature, dim=1) * log_rest).sum(1).mean()
    return first * of_target + gamma * temperature**2 * of_rest
