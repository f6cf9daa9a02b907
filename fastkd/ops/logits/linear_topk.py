"""Rows of logits against the teacher's k most probable classes: stored of it are k ids and log-probabilities.

For q = softmax(z), p the k stored probabilities, S = sum p, Q = sum of q over the k ids (Liger-Kernel issue 441,
MaxText; temperature 1):

    raw      sum_k p (log p - log q)                        dz_j = S q_j - p_j
    renorm   raw with p / S in place of p                   dz_j = q_j - p_j / S
    tail     raw + p_r (log p_r - log q_r)                  dz_j = q_j - p_j on the ids, q_j (1 - p_r / q_r) elsewhere
             p_r = 1 - S, q_r = 1 - Q, both at least 1e-12  (p_j = 0 off the ids)

`raw` is the full divergence without what the teacher leaves out, `tail` puts that into one class of its own. A row
needs its log-sum-exp, k logits and one pass that overwrites them with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dispatch import Kernel

MODES = ("raw", "renorm", "tail")
FLOOR = 1e-12


def coefficients(lq: Tensor, lp: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From log q and log p [n, k]: the losses [n], what multiplies q off and on the ids [n, 1], and p [n, k]."""
    p, q = lp.exp(), lq.exp()
    if MODES[mode] == "renorm":
        total = p.sum(1, keepdim=True)
        p, lp = p / total, lp - total.log()
    mass = p.sum(1, keepdim=True)
    loss = torch.where(p > 0, p * (lp - lq), 0).sum(1)
    if MODES[mode] != "tail":
        return loss, mass, mass, p
    theirs, mine = (1 - mass).clamp_min(FLOOR), (1 - q.sum(1, keepdim=True))
    loss += (theirs * (theirs.log() - mine.clamp_min(FLOOR).log())).squeeze(1)
    slope = torch.where(mine > FLOOR, theirs / mine.clamp_min(FLOOR), 0)  # the floor itself has no slope
    return loss, mass - slope * (1 - mine), mass + slope * mine, p


# z [n, V] contiguous, ids and logprobs [n, k], target [n] or None, row_weight [n] or None, losses [n]; grad [n, V] may
# be z itself, and is None where no gradient is wanted.


def through(log_sum_exp: Callable[[Tensor], Tensor], softmax: Callable[..., None]) -> Callable[..., None]:
    """The rows on two passes: log_sum_exp(z) -> [n, 1]; softmax(z, lse, factor, grad): grad = factor exp(z - lse)."""

    def fill(z, ids, logprobs, target, hard, soft, mode, ignore_index, row_weight, losses, grad) -> None:
        lse = log_sum_exp(z)
        lq = z.gather(1, ids) - lse
        loss, off, on, p = coefficients(lq, logprobs.to(z.dtype), mode)
        weight = torch.full_like(lse, soft) if row_weight is None else soft * row_weight[:, None]
        loss *= soft
        if target is not None:
            valid = target != ignore_index
            labels = target.where(valid, 0)[:, None]
            loss = torch.where(valid, loss + hard * (lse - z.gather(1, labels)).squeeze(1), 0)
            weight = torch.where(valid[:, None], weight, 0)
        losses.copy_(loss)
        if grad is None:
            return
        extra = weight * (hard / soft) if target is not None else 0  # of the cross entropy, whose softmax is the same
        softmax(z, lse, weight * off + extra, grad)
        grad.scatter_(1, ids, (weight * on + extra) * lq.exp() - weight * p)
        if target is not None:
            grad.scatter_add_(1, labels, -extra)

    return fill


def _softmax(z: Tensor, lse: Tensor, factor: Tensor, grad: Tensor) -> None:
    torch.sub(z, lse, out=grad).exp_().mul_(factor)


def _cpp_log_sum_exp(z: Tensor) -> Tensor:
    lse = z.new_empty(len(z), 1)
    torch.ops.fastkd_cpu.row_log_sum_exp(z, lse)
    return lse


def _cpp_softmax(z: Tensor, lse: Tensor, factor: Tensor, grad: Tensor) -> None:
    torch.ops.fastkd_cpu.row_softmax(z, lse, factor, grad)


kernel = Kernel(
    "linear_topk_rows", reference=through(lambda z: z.logsumexp(1, keepdim=True), _softmax),
    cpp=through(_cpp_log_sum_exp, _cpp_softmax), triton="fastkd.ops.logits.linear_topk_triton:fill",
)  # fmt: skip
