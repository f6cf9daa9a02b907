"""Triton kernels of `uskd_loss`: a program walks its row in tiles.

Rows, then scores of all classes in float64, then loss and both gradients. Up to COUNTED classes the last kernel finds
ranks itself, by counting larger scores; beyond, torch sorts them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .uskd import RANK_EPS, SMOOTHING, harmonic

COUNTED = 256
_EPS, _SMOOTHING = tl.constexpr(RANK_EPS), tl.constexpr(SMOOTHING)
# Columns of the first pass, in the order of COLUMNS in uskd.py.
_SQUARE, _LABEL, _VALUE, _STUDENT, _WEAK = (tl.constexpr(i) for i in (1, 3, 5, 7, 11))
_COLUMNS = tl.constexpr(15)


@triton.jit
def _largest(x, step, classes, skip, BLOCK: tl.constexpr):
    # The largest value of a row but that at `skip`, and where it is first found.
    best = tl.full((), float("-inf"), tl.float32)
    at = tl.full((), -1, tl.int32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i.to(tl.int64) * step, mask=(i < classes) & (i != skip), other=float("-inf"))
        value = value.to(tl.float32)
        top = tl.max(value, axis=0)
        first = tl.min(tl.where(value == top, i, classes), axis=0)
        at = tl.where(top > best, first, at)
        best = tl.maximum(best, top)
    return best, at


@triton.jit
def _log_sums(x, step, classes, first, second, out, BLOCK: tl.constexpr):
    # Stores maximum and logarithm of the sum of exponentials, over all classes and without two (-1: none).
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = (i < classes) & (i != first) & (i != second)
        value = tl.load(x + i.to(tl.int64) * step, mask=keep, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), axis=0)
        top = higher
    a = tl.load(x + first.to(tl.int64) * step, mask=first >= 0, other=float("-inf")).to(tl.float32)
    b = tl.load(x + second.to(tl.int64) * step, mask=second >= 0, other=float("-inf")).to(tl.float32)
    every = tl.maximum(tl.maximum(a, b), top)
    log_sum = tl.log(total * tl.exp(top - every) + tl.exp(a - every) + tl.exp(b - every))
    tl.store(out, every)
    tl.store(out + 1, log_sum)
    tl.store(out + 2, top)
    tl.store(out + 3, tl.log(total))
    return every, log_sum


@triton.jit
def _rows_kernel(student, weak, target, stats, classes, z_n, z_c, u_n, u_c, t_n, t_c, ignore_index,
                 SCORES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z, y, out = student + row * z_n, target + row * t_n, stats + row * _COLUMNS
    if SCORES:
        value_0, label_0 = _largest(y, t_c, classes, -1, BLOCK)
        value_1, label_1 = _largest(y, t_c, classes, label_0, BLOCK)
        valid, known = True, True
    else:
        label = tl.load(y)
        valid = label != ignore_index
        known = (label >= 0) & (label < classes)
        label_0 = tl.where(known, label, 0).to(tl.int32)
        label_1 = label_0 * 0 - 1
        value_0, value_1 = 1.0, 0.0
    removed_0 = tl.where(value_0 > 0, label_0, -1)
    removed_1 = tl.where(value_1 > 0, label_1, -1)
    top, log_sum = _log_sums(z, z_c, classes, removed_0, removed_1, out + _STUDENT, BLOCK)
    _log_sums(weak + row * u_n, u_c, classes, removed_0, removed_1, out + _WEAK, BLOCK)
    a = tl.load(z + label_0.to(tl.int64) * z_c).to(tl.float32)
    b = tl.load(z + label_1.to(tl.int64) * z_c, mask=label_1 >= 0, other=float("-inf")).to(tl.float32)
    square = tl.where(known, tl.exp(2.0 * (a - top - log_sum)), float("nan"))  # no such class
    tl.store(out, tl.where(valid, 1.0, 0.0))
    tl.store(out + _SQUARE, tl.where(valid, square, 0.0))
    tl.store(out + _SQUARE + 1, tl.where(valid, tl.exp(2.0 * (b - top - log_sum)), 0.0))
    tl.store(out + _LABEL, label_0.to(tl.float32))
    tl.store(out + _LABEL + 1, label_1.to(tl.float32))
    tl.store(out + _VALUE, value_0)
    tl.store(out + _VALUE + 1, value_1)


@triton.jit
def _targets(stats):
    # Removed classes (-1: none) of a row and their scores.
    value_0, value_1 = tl.load(stats + _VALUE), tl.load(stats + _VALUE + 1)
    label_0 = tl.where(value_0 > 0, tl.load(stats + _LABEL), -1.0).to(tl.int32)
    label_1 = tl.where(value_1 > 0, tl.load(stats + _LABEL + 1), -1.0).to(tl.int32)
    return label_0, label_1, value_0, value_1


@triton.jit
def _log_at(x, step, label, stats):
    # Log-probability of a class, 0 for none.
    value = tl.load(x + label.to(tl.int64) * step, mask=label >= 0, other=0.0).to(tl.float32)
    return tl.where(label >= 0, value - tl.load(stats) - tl.load(stats + 1), 0.0)


@triton.jit
def _scores_kernel(student, weak, stats, scores, classes, z_n, z_c, u_n, u_c, PROB: tl.constexpr, BLOCK: tl.constexpr):
    # In float64, so that rounding does not swap neighbours.
    row = tl.program_id(0).to(tl.int64)
    line = stats + row * _COLUMNS
    of_z, of_u = line + _STUDENT, line + _WEAK
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(student + row * z_n + i.to(tl.int64) * z_c, mask=i < classes, other=0.0).to(tl.float64)
    u = tl.load(weak + row * u_n + i.to(tl.int64) * u_c, mask=i < classes, other=0.0).to(tl.float64)
    share = tl.exp(((tl.load(of_u + 2) - tl.load(of_u)) + (tl.load(of_u + 3) - tl.load(of_u + 1))).to(tl.float64))
    score = tl.exp((u - tl.load(of_u)) - tl.load(of_u + 1)) / (share + _EPS)
    log_q = (z - tl.load(of_z)) - tl.load(of_z + 1)
    if PROB:
        share = tl.exp(((tl.load(of_z + 2) - tl.load(of_z)) + (tl.load(of_z + 3) - tl.load(of_z + 1))).to(tl.float64))
        score += tl.exp(log_q) / (share + _EPS)
    else:
        label_0, label_1, _, _ = _targets(line)
        taken = _log_at(student + row * z_n, z_c, label_0, of_z) + _log_at(student + row * z_n, z_c, label_1, of_z)
        score += log_q / (1.0 - taken.to(tl.float64) + _EPS)
    tl.store(scores + row * classes + i, score, mask=i < classes)


@triton.jit
def _rank_of(scores, label, classes, BLOCK: tl.constexpr):
    # How many classes come before one.
    own = tl.load(scores + label, mask=label >= 0, other=0.0)
    rank = tl.full((), 0, tl.int32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        other = tl.load(scores + i, mask=i < classes, other=float("-inf"))
        rank += tl.sum(((other > own) | ((other == own) & (i < label))).to(tl.int32), axis=0)
    return rank


@triton.jit
def _loss_kernel(student, weak, target, stats, sums, means, ranks, grad_student, grad_weak, partial, classes,
                 z_n, z_c, u_n, u_c, t_n, t_c, alpha, beta, mu, ce_weight, harmonic, SCORES: tl.constexpr,
                 COUNT: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = stats + row * _COLUMNS
    of_z, of_u = line + _STUDENT, line + _WEAK
    z_max, z_log, rest_max, rest_log = tl.load(of_z), tl.load(of_z + 1), tl.load(of_z + 2), tl.load(of_z + 3)
    u_max, u_log = tl.load(of_u), tl.load(of_u + 1)
    z_row, u_row, y_row, ranks_row = student + row * z_n, weak + row * u_n, target + row * t_n, ranks + row * classes
    valid = tl.load(line) != 0
    label_0, label_1, value_0, value_1 = _targets(line)
    count = tl.maximum(tl.load(means), 1.0)
    p_0 = tl.where(label_0 >= 0, tl.load(line + _SQUARE) + value_0 - tl.load(means + 1) / count, 0.0)
    p_1 = tl.where(label_1 >= 0, tl.load(line + _SQUARE + 1) + value_1 - tl.load(means + 2) / count, 0.0)
    loss = -alpha * (p_0 * _log_at(z_row, z_c, label_0, of_z) + p_1 * _log_at(z_row, z_c, label_1, of_z))

    # What Zipf labels of the other classes sum up to.
    if COUNT:
        rank_0 = _rank_of(ranks_row, label_0, classes, BLOCK)
        rank_1 = _rank_of(ranks_row, label_1, classes, BLOCK)
    else:
        rank_0 = tl.load(ranks_row + label_0, mask=label_0 >= 0, other=0)
        rank_1 = tl.load(ranks_row + label_1, mask=label_1 >= 0, other=0)
    rest_sum = harmonic - tl.where(label_0 >= 0, 1.0 / (1 + rank_0).to(tl.float32), 0.0)
    rest_sum -= tl.where(label_1 >= 0, 1.0 / (1 + rank_1).to(tl.float32), 0.0)

    score_sum = tl.full((), 1.0, tl.float32)
    if SCORES:
        score_sum = tl.full((), 0.0, tl.float32)
        for start in range(0, classes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            y = tl.load(y_row + i.to(tl.int64) * t_c, mask=i < classes, other=0.0).to(tl.float32)
            score_sum += tl.sum(y, axis=0)

    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < classes
        rest = inside & (i != label_0) & (i != label_1)
        z = tl.load(z_row + i.to(tl.int64) * z_c, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_row + i.to(tl.int64) * u_c, mask=inside, other=0.0).to(tl.float32)
        if SCORES:
            y = tl.load(y_row + i.to(tl.int64) * t_c, mask=inside, other=0.0).to(tl.float32)
        else:
            y = tl.where(i == label_0, 1.0, 0.0)
        if COUNT:
            own = tl.load(ranks_row + i, mask=inside, other=0.0)
            rank = tl.zeros([BLOCK], tl.int32)
            for first in range(0, classes, STEP):
                j = first + tl.arange(0, STEP)
                other = tl.load(ranks_row + j, mask=j < classes, other=float("-inf"))
                tie = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
                rank += tl.sum(((other[None, :] > own[:, None]) | tie).to(tl.int32), axis=1)
        else:
            rank = tl.load(ranks_row + i, mask=inside, other=0)
        zeta = tl.where(rest, 1.0 / ((1 + rank).to(tl.float32) * rest_sum), 0.0)
        log_q, log_rest, log_w = (z - z_max) - z_log, (z - rest_max) - rest_log, (u - u_max) - u_log
        smooth = (1.0 - _SMOOTHING) * y + _SMOOTHING / classes
        each = beta * zeta * log_rest + mu * smooth * log_w + ce_weight * y * log_q
        loss -= tl.sum(tl.where(inside, each, 0.0), axis=0)
        if WITH_GRAD:
            gradient = tl.exp(log_q) * (alpha * (p_0 + p_1) + ce_weight * score_sum) - ce_weight * y
            gradient += beta * (tl.exp(tl.where(rest, log_rest, float("-inf"))) - zeta)
            gradient -= alpha * (tl.where(i == label_0, p_0, 0.0) + tl.where(i == label_1, p_1, 0.0))
            of_weak = tl.exp(log_w) * ((1.0 - _SMOOTHING) * score_sum + _SMOOTHING) - smooth
            gradient, of_weak = tl.where(valid, gradient, 0.0), tl.where(valid, mu * of_weak, 0.0)
            tl.store(grad_student + row * classes + i, gradient.to(grad_student.dtype.element_ty), mask=inside)
            tl.store(grad_weak + row * classes + i, of_weak.to(grad_weak.dtype.element_ty), mask=inside)
    tl.store(partial + row, tl.where(valid, loss / tl.maximum(tl.load(sums), 1.0), 0.0))


def _shape(student, weak, target) -> tuple[bool, int, tuple[int, ...], dict]:
    two = target.is_floating_point()
    block = min(triton.next_power_of_2(student.shape[1]), 2048)
    strides = (*student.stride(), *weak.stride(), *(target.stride() if two else (target.stride(0), 0)))
    return two, block, strides, dict(num_warps=min(max(block // 256, 1), 8), enable_fp_fusion=True)


def rows(student, weak, target, ignore_index: int, stats) -> None:
    """Fills stats [N, 15]."""
    two, block, strides, options = _shape(student, weak, target)
    batch, classes = student.shape
    _rows_kernel[(batch,)](
        student, weak, target, stats, classes, *strides, ignore_index, SCORES=two, BLOCK=block, **options
    )  # fmt: skip


def forward(
    student, weak, target, stats, sums, means, alpha, beta, mu, ce_weight, rank_score, grad_student, grad_weak, loss
) -> None:
    """Fills both gradients, where they are not empty, and the loss; partial sums in a fixed order (no atomics)."""
    two, block, strides, options = _shape(student, weak, target)
    batch, classes = student.shape
    ranks = torch.empty(batch, classes, dtype=torch.float64, device=student.device)
    _scores_kernel[(batch, triton.cdiv(classes, block))](
        student, weak, stats, ranks, classes, *strides[:4], PROB=rank_score == 1, BLOCK=block, **options
    )  # fmt: skip
    counted = classes <= COUNTED
    if counted:
        options["num_warps"] = min(max(block // 32, 1), 8)  # for a tile of comparisons
    else:
        order = torch.sort(ranks, dim=1, descending=True, stable=True)[1]
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(classes, device=order.device).expand_as(order))
    with_grad = grad_student.numel() > 0
    partial = torch.empty(batch, dtype=torch.float32, device=student.device)
    grads = (grad_student, grad_weak) if with_grad else (partial, partial)
    _loss_kernel[(batch,)](
        student, weak, target, stats, sums, means, ranks, *grads, partial, classes, *strides, alpha, beta, mu,
        ce_weight, harmonic(classes), SCORES=two, COUNT=counted, WITH_GRAD=with_grad, BLOCK=block, STEP=min(block, 16),
        **options,
    )  # fmt: skip
    torch.sum(partial, dim=0, out=loss)
