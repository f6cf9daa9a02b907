"""Rows of logits to losses and gradients, for the chunks of `linear_loss`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._dispatch import Kernel


class Terms(NamedTuple):
    ce: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    smoothing: float = 0.0


def fill(z, v, target, scores, weight, row_weight, items, terms, ignore_index, fixed, loss, divisors, grad) -> None:
    classes, wide, terms = z.shape[1], z.dtype, Terms(*terms)
    total, g = z.new_zeros(len(z)), torch.zeros_like(z)
    if target is not None and terms.ce:
        labels = target.where(target != ignore_index, 0)
        lq, smooth = z.log_softmax(1), terms.smoothing
        total += terms.ce * ((1 - smooth) * F.nll_loss(lq, labels, reduction="none") - smooth * lq.mean(1))
        wanted = F.one_hot(labels, classes).to(wide) * (1 - smooth) + smooth / classes
        g += terms.ce * (lq.exp() - wanted)
    if v is not None:
        temperature, beta = terms.temperature, terms.beta
        lq, lp = (z / temperature).log_softmax(1), (v.to(wide) / temperature).log_softmax(1)
        p, q = lp.exp(), lq.exp()
        if terms.kl:
            loss_, d = (p * (lp - lq)).sum(1), q - p
        elif terms.reverse_kl:
            loss_ = (q * (lq - lp)).sum(1)
            d = q * (lq - lp - loss_[:, None])
        else:
            lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
            mine = (q * (lq - lm)).sum(1)
            loss_ = beta * (p * (lp - lm)).sum(1) + (1 - beta) * mine
            d = (1 - beta) * q * (lq - lm - mine[:, None])
        soft = terms.kl + terms.reverse_kl + terms.jsd
        total += soft * loss_
        g += soft / temperature * d
    if target is not None:
        valid = target != ignore_index
        total, g = torch.where(valid, total, 0), torch.where(valid[:, None], g, 0)
    total, g = total / fixed, g / fixed
    loss.copy_(total if loss.ndim else total.sum())
    if grad is not None:
        grad.copy_(g if row_weight is None else g * row_weight[:, None])


kernel = Kernel("linear_rows", reference=fill, cpp=fill, triton="fastkd.ops.logits.linear_rows:fill")
