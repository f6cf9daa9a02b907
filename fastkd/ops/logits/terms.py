"""The terms of `logit_loss`, row by row, in plain differentiable PyTorch.

One row has student logits z and teacher logits v over C classes. With q = softmax(z / T), p = softmax(v / T):

    ce          sum_c t_c (log sum exp z - z_c); t_c = w_c ((1 - e) o_c + e / C), smoothed by e, o the target row: given
                or one-hot (then, as in torch, the first term has w_y and the second w_c)
    kl          KL(p || q) = sum p (log p - log q)                          Hinton et al. 2015
    reverse_kl  KL(q || p)
    jsd         b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q      Agarwal et al. 2024 (GKD), eq. 1
    tvd         sum |p - q| / 2
    dkd         the divergence of (p_y, 1 - p_y), and that of the other classes among themselves, p^ and q^, which are
                softmaxes without class y. KL(p || q) = first + (1 - p_y) second.       Zhao et al. 2022 (DKD), eq. 7
    nkd         - softmax(v)_y log softmax(z)_y, with the teacher's factor held constant, and - sum p^ log q^
                                                                            Yang et al. 2023 (NKD), eq. 9

Derivatives by z_i (the first two factors of kl and its kin are 1 / T; e_y is 1 for i = y, the hat is 0 there):

    ce      softmax(z)_i sum_c t_c - t_i
    kl      q_i - p_i
    dkd     first: (q_y - p_y)(e_y - q^_i)           second: q^_i - p^_i
    nkd     first: softmax(v)_y (softmax(z)_i - e_y)     second: q^_i - p^_i
    reverse_kl, jsd, tvd     q_i (G_i - sum_c q_c G_c) with
            G = log q - log p, (1 - b)(log q - log m), sign(q - p) / 2 and sign(0) = 0

Nothing here overflows: logarithms of probabilities come from log-sum-exp, those of p_y and 1 - p_y from one number, the
distance of the target's logit from the log-sum-exp of the others. The published code of DKD, which takes the logarithm
of a sum of probabilities, is infinite from a distance of 104 on. A class that both sides exclude (logit -inf) counts 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = float("-inf")


class Terms(NamedTuple):
    """What multiplies each term (dkd and nkd: target part, rest), then the constants. Kernels take it as a list."""

    ce: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    tvd: float = 0.0
    dkd_target: float = 0.0
    dkd_rest: float = 0.0
    nkd_target: float = 0.0
    nkd_rest: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5  # of jsd, strictly between 0 and 1: the ends are the two divergences
    smoothing: float = 0.0


# Functions, not properties: torch.compile does not follow those of a named tuple before torch 2.11.
def need_teacher(terms: Terms) -> bool:
    return any(terms[1:9])


def need_index(terms: Terms) -> bool:
    """Whether a class index is needed whatever the target of ce."""
    return any(terms[5:9])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy(
    student: Tensor, index: Tensor | None, scores: Tensor | None, weight: Tensor | None, terms: Terms, ignore_index: int
) -> Tensor:
    """[N]; 0 in ignored rows."""
    target = index if scores is None else scores
    return F.cross_entropy(
        student, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=terms.smoothing
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) with 0 (log 0 - log 0) = 0."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p == MASKED, 0)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_p, log_q = (x.clamp_min(torch.finfo(x.dtype).min / 4) for x in (log_p, log_q))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)


def target_and_rest(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of the target's logit from the log-sum-exp of the others [N], and their log-softmax [N, C]."""
    at = index[:, None]
    rest = logits.scatter(1, at, MASKED)
    return logits.gather(1, at)[:, 0] - rest.logsumexp(1), rest.log_softmax(1)


def decoupled(student: Tensor, teacher: Tensor, index: Tensor, terms: Terms) -> Tensor:
    """Both parts of dkd and the second part of nkd, of logits over the temperature."""
    distance, log_q = target_and_rest(student, index)
    teacher_distance, log_p = target_and_rest(teacher, index)
    total = 0.0
    if terms.dkd_target:
        pair = torch.stack([F.logsigmoid(teacher_distance), F.logsigmoid(-teacher_distance)], -1)
        student_pair = torch.stack([F.logsigmoid(distance), F.logsigmoid(-distance)], -1)
        total = total + terms.dkd_target * divergence(pair, student_pair)
    if terms.dkd_rest:
        total = total + terms.dkd_rest * divergence(log_p, log_q)
    if terms.nkd_rest:
        entropy = (log_p.exp() * log_q.masked_fill(log_p == MASKED, 0)).sum(-1)
        total = total - terms.nkd_rest * entropy
    return total


def distillation(student: Tensor, teacher: Tensor, index: Tensor | None, terms: Terms, ignore_index: int) -> Tensor:
    """[N], every term that compares student and teacher; 0 in ignored rows."""
    total = student.new_zeros(len(student))
    z, v = student / terms.temperature, teacher / terms.temperature
    if any((terms.kl, terms.reverse_kl, terms.jsd, terms.tvd)):
        log_q, log_p = z.log_softmax(-1), v.log_softmax(-1)
        if terms.kl:
            total = total + terms.kl * divergence(log_p, log_q)
        if terms.reverse_kl:
            total = total + terms.reverse_kl * divergence(log_q, log_p)
        if terms.jsd:
            total = total + terms.jsd * jsd(log_p, log_q, terms.beta)
        if terms.tvd:
            total = total + terms.tvd * 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
    if index is None:
        return total
    valid = index != ignore_index
    if need_index(terms):
        index = index.where(valid, 0)
        if terms.dkd_target or terms.dkd_rest or terms.nkd_rest:
            total = total + decoupled(z, v, index, terms)
        if terms.nkd_target:
            at = index[:, None]
            confidence = teacher.detach().softmax(-1).gather(1, at)[:, 0]
            total = total - terms.nkd_target * confidence * student.log_softmax(-1).gather(1, at)[:, 0]
    return total.where(valid, 0)


def cross_entropy_gradient(
    student: Tensor, index: Tensor | None, scores: Tensor | None, weight: Tensor | None, terms: Terms, ignore_index: int
) -> Tensor:
    """[N, C], of `cross_entropy` by the student's logits."""
    smooth = terms.smoothing / student.shape[1]
    if scores is not None:
        target = (1 - terms.smoothing) * scores + smooth
        target = target if weight is None else target * weight
    else:
        valid = (index != ignore_index)[:, None]
        at = index[:, None].where(valid, 0)
        weight = student.new_ones(student.shape[1]) if weight is None else weight
        target = smooth * weight.expand(student.shape)
        target = target.scatter_add(1, at, (1 - terms.smoothing) * weight[at]).where(valid, 0)
    return student.softmax(-1) * target.sum(-1, keepdim=True) - target


def distillation_gradient(
    student: Tensor, teacher: Tensor, index: Tensor | None, terms: Terms, ignore_index: int
) -> Tensor:
    """[N, C], of `distillation` by the student's logits."""
    z, v = student / terms.temperature, teacher / terms.temperature
    log_q, log_p = z.log_softmax(-1), v.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    total = terms.kl * (q - p)
    if any((terms.reverse_kl, terms.jsd, terms.tvd)):
        slope = 0.5 * terms.tvd * (q - p).sign()
        if terms.reverse_kl:
            slope = slope + terms.reverse_kl * (log_q - log_p)
        if terms.jsd:
            log_m = torch.logaddexp(log_p + math.log(terms.beta), log_q + math.log1p(-terms.beta))
            slope = slope + terms.jsd * (1 - terms.beta) * (log_q - log_m)
        slope = slope.masked_fill(log_q == MASKED, 0)
        total = total + q * (slope - (q * slope).sum(-1, keepdim=True))
    if index is None:
        return total / terms.temperature
    valid = (index != ignore_index)[:, None]
    if not need_index(terms):
        return (total / terms.temperature).where(valid, 0)
    at = index[:, None].where(valid, 0)
    target = torch.zeros_like(z).scatter(1, at, 1.0)
    distance, rest = target_and_rest(z, at[:, 0])
    teacher_distance, teacher_rest = target_and_rest(v, at[:, 0])
    gap = (distance.sigmoid() - teacher_distance.sigmoid())[:, None]
    rest, teacher_rest = rest.exp(), teacher_rest.exp()
    total = total + terms.dkd_target * gap * (target - rest)
    total = (total + (terms.dkd_rest + terms.nkd_rest) * (rest - teacher_rest)) / terms.temperature
    if terms.nkd_target:
        total = total + terms.nkd_target * teacher.softmax(-1).gather(1, at) * (student.softmax(-1) - target)
    return total.where(valid, 0)
