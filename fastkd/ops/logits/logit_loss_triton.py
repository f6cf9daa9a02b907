"""Triton kernels of `logit_loss`.

Rows that fit into registers take one kernel, which reads them once; a program has one row, or several short ones.
Longer rows are split: a program a part, partial statistics, combined in a fixed order by whoever needs them, and the
gradient from the logits read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .logit_row_triton import (
    NOTHING,
    centred,
    combined,
    cross_entropy,
    distillation,
    exponentials,
    gradient_numbers,
    ratio,
    row_numbers,
    sums,
    target_slope,
)  # fmt: skip
from .terms import Terms

COUNT_ROWS = 4096  # rows that a program counts
PART = 4096  # classes of a part of a split row
IN_REGISTERS = 32768  # values of a row that one program can keep


@triton.jit
def _count_kernel(index, weight, counts, rows, classes, ignore_index, parts, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    # counts[0, p], counts[1, p]: rows that count, and the sum of their classes' weights.
    part = tl.program_id(0)
    row = part * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(index + row, mask=row < rows, other=-1)
    counted = (row < rows) & (y != ignore_index) & (y >= 0) & (y < classes)
    w = tl.where(counted, 1.0, 0.0)
    tl.store(counts + part, tl.sum(w, axis=0))
    if WEIGHT:
        w = tl.load(weight + y, mask=counted, other=0.0)
    tl.store(counts + parts + part, tl.sum(w, axis=0))


@triton.jit
def _scales(counts, items, fixed, parts, divisors, first, ITEMS: tl.constexpr, PARTS: tl.constexpr,
            HALF: tl.constexpr):  # fmt: skip
    # What multiplies the distillation terms, ce, and (float16: see _fill_backward) the loss alone.
    if ITEMS:
        count = tl.load(items)
        ce_count = count
    elif PARTS > 0:
        p = tl.arange(0, PARTS)
        count = tl.sum(tl.load(counts + p, mask=p < parts, other=0.0), axis=0)
        ce_count = tl.sum(tl.load(counts + parts + p, mask=p < parts, other=0.0), axis=0)
    else:
        count = fixed
        ce_count = fixed
    each, ce_each = ratio(1.0, count), ratio(1.0, ce_count)
    if first:
        tl.store(divisors, each)
        tl.store(divisors + 1, ce_each)
    if HALF:
        return each * 0.0 + 1.0, ratio(ce_each, each), each
    else:
        return each, ce_each, each * 0.0 + 1.0


@triton.jit
def _rows(index, row, rows, classes, ignore_index, INDEX: tl.constexpr):
    # The target class (-1: none), whether the row counts, and whether its class exists.
    given = row < rows
    known = given
    y = tl.zeros_like(row) - 1
    if INDEX:
        y = tl.load(index + row, mask=given, other=0)
        given = given & (y != ignore_index)
        known = given & (y >= 0) & (y < classes)
        y = tl.where(known, y, -1)
    return y, given, known


@triton.jit
def _logits(x, row, column, y, given, classes, x_r, x_c, INDEX: tl.constexpr):
    mask = given[:, None] & (column < classes)[None, :]
    logits = tl.load(x + row[:, None] * x_r + column[None, :].to(tl.int64) * x_c, mask=mask, other=NOTHING)
    logits = logits.to(tl.float32)
    if INDEX:
        logits = tl.where(column[None, :] == y[:, None], NOTHING, logits)
    return logits


@triton.jit
def _at_target(x, row, y, x_r, x_c):
    return tl.load(x + row * x_r + y * x_c, mask=y >= 0, other=NOTHING).to(tl.float32)


@triton.jit
def _targets(scores, weight, row, column, y, given, classes, s_r, s_c, smooth, SCORES: tl.constexpr,
             WEIGHT: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    # Weights of the classes in ce, but for the target class: [rows, classes].
    mask = given[:, None] & (column < classes)[None, :]
    if INDEX:
        mask = mask & (column[None, :] != y[:, None])
    t = tl.where(mask, smooth / classes, 0.0)
    if SCORES:
        place = scores + row[:, None] * s_r + column[None, :].to(tl.int64) * s_c
        t += (1.0 - smooth) * tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if WEIGHT:
        t *= tl.load(weight + column, mask=column < classes, other=0.0)[None, :]
    return t


@triton.jit
def _target_weight(scores, weight, row, y, classes, s_r, s_c, smooth, CE: tl.constexpr, SCORES: tl.constexpr,
                   WEIGHT: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    # That of the target class.
    t = tl.where(y >= 0, 0.0, 0.0)
    if CE and INDEX:
        t += 1.0
        if SCORES:
            t = tl.load(scores + row * s_r + y * s_c, mask=y >= 0, other=0.0).to(tl.float32)
        t = (1.0 - smooth) * t + smooth / classes
        if WEIGHT:
            t *= tl.load(weight + y, mask=y >= 0, other=0.0)
        t = tl.where(y >= 0, t, 0.0)
    return t


@triton.jit
def _store(losses, loss, row, rows, given, known):
    # Ignored rows are 0, rows with a class that does not exist NaN.
    tl.store(losses + row, tl.where(given, tl.where(known, loss, float("nan")), 0.0), mask=row < rows)


@triton.jit
def _store_gradient(grad, exps, slope, t, numbers, ce, row, column, rows, classes, y, given, known,
                    TEACHER: tl.constexpr, HOT: tl.constexpr, CENTRED: tl.constexpr, SOFT: tl.constexpr,
                    INDEX: tl.constexpr):  # fmt: skip
    a, e, f, hot, back = exps
    of_e, of_f, of_hot, of_slope, target = numbers
    g = e * of_e[:, None]
    if TEACHER:
        g += f * of_f[:, None]
    if HOT:
        g += hot * of_hot[:, None]
    if CENTRED:
        g += e * slope * of_slope[:, None]
    if SOFT:
        g -= t * ce
    if INDEX:
        g = tl.where(column[None, :] == y[:, None], target[:, None], g)
        g = tl.where(given[:, None], tl.where(known[:, None], g, float("nan")), 0.0)
    mask = (row < rows)[:, None] & (column < classes)[None, :]
    tl.store(grad + row[:, None] * classes + column[None, :], g.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _whole_kernel(student, teacher, index, scores, weight, sample_weight, items, counts, losses, divisors, grad,
                  rows, classes, z_r, z_c, v_r, v_c, s_r, s_c, ignore_index, parts, fixed,
                  k_ce, k_kl, k_reverse, k_jsd, k_tvd, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, cold, beta, smooth,
                  TEACHER: tl.constexpr, HOT: tl.constexpr, HOT_TEACHER: tl.constexpr, CE: tl.constexpr,
                  SOFT: tl.constexpr, SCORES: tl.constexpr, WEIGHT: tl.constexpr, SAMPLE: tl.constexpr,
                  INDEX: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr,
                  REVERSE: tl.constexpr, JSD: tl.constexpr, TVD: tl.constexpr, GRAD: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    CENTRED: tl.constexpr = REVERSE or JSD or TVD
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    y, given, known = _rows(index, row, rows, classes, ignore_index, INDEX)
    z = _logits(student, row, column, y, given, classes, z_r, z_c, INDEX)
    z_y = _at_target(student, row, y, z_r, z_c)
    v, v_y, t = z, z_y, z
    if TEACHER:
        v = _logits(teacher, row, column, y, given, classes, v_r, v_c, INDEX)
        v_y = _at_target(teacher, row, y, v_r, v_c)
    if SOFT:
        t = _targets(scores, weight, row, column, y, given, classes, s_r, s_c, smooth, SCORES, WEIGHT, INDEX)
    t_y = _target_weight(scores, weight, row, y, classes, s_r, s_c, smooth, CE, SCORES, WEIGHT, INDEX)
    z_base, v_base = tl.max(z, axis=1), tl.max(v, axis=1)
    exps = exponentials(z, v, z_base, v_base, cold, TEACHER, HOT)
    total = sums(z, v, t, z_base, v_base, exps, TEACHER, HOT, HOT_TEACHER, SOFT)
    numbers = row_numbers(total, z_base, v_base, z_y, v_y, cold, TEACHER, HOT, HOT_TEACHER)
    scale, ce, later = _scales(counts, items, fixed, parts, divisors, program == 0, ITEMS, PARTS, HALF)
    if SAMPLE:
        w = tl.load(sample_weight + row, mask=row < rows, other=0.0)
        scale, ce = w * scale, w * ce
    ce *= k_ce
    loss = distillation(total, numbers, k_kl, k_reverse, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, TEACHER)
    mean, slope_y, slope = loss, loss, z
    if CENTRED:
        a, e, f, hot, back = exps
        q_of_e, p_of_f = ratio(numbers[0][1], total[0])[:, None], ratio(numbers[1][1], total[1])[:, None]
        losses_of, slope = centred(e, f, back, q_of_e, p_of_f, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)
        loss_y, slope_y = target_slope(numbers, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)
        loss += tl.sum(losses_of, axis=1) + loss_y
        mean = ratio(tl.sum(e * slope, axis=1), total[0])
    loss *= scale
    if CE:
        loss += ce * cross_entropy(total, numbers, t_y)
    _store(losses, loss * later, row, rows, given, known)
    if GRAD:
        of = gradient_numbers(total, numbers, t_y, mean, slope_y, scale, ce, k_kl, k_dkd, k_dkd_rest, k_nkd,
                              k_nkd_rest, cold, TEACHER, HOT, CENTRED)  # fmt: skip
        if SOFT and SAMPLE:
            ce = ce[:, None]
        _store_gradient(grad, exps, slope, t, of, ce, row, column, rows, classes, y, given, known, TEACHER, HOT,
                        CENTRED, SOFT, INDEX)  # fmt: skip


@triton.jit
def _part_kernel(student, teacher, index, scores, weight, partial, at_target, rows, classes, z_r, z_c, v_r, v_c, s_r,
                 s_c, ignore_index, splits, cold, smooth,
                 TEACHER: tl.constexpr, HOT: tl.constexpr, HOT_TEACHER: tl.constexpr, SOFT: tl.constexpr,
                 SCORES: tl.constexpr, WEIGHT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # partial[row, k, split]: both bases and the sums of a part. at_target[row]: the target's logits, which a gradient
    # in their place will overwrite.
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = split * BLOCK + tl.arange(0, BLOCK)
    y, given, known = _rows(index, row, rows, classes, ignore_index, INDEX)
    z = _logits(student, row, column, y, given, classes, z_r, z_c, INDEX)
    v, t = z, z
    if TEACHER:
        v = _logits(teacher, row, column, y, given, classes, v_r, v_c, INDEX)
    if SOFT:
        t = _targets(scores, weight, row, column, y, given, classes, s_r, s_c, smooth, SCORES, WEIGHT, INDEX)
    z_base, v_base = tl.max(z, axis=1), tl.max(v, axis=1)
    exps = exponentials(z, v, z_base, v_base, cold, TEACHER, HOT)
    total = sums(z, v, t, z_base, v_base, exps, TEACHER, HOT, HOT_TEACHER, SOFT)
    place = partial + row * 11 * splits + split
    tl.store(place, z_base)
    tl.store(place + splits, v_base)
    for k in tl.static_range(9):
        tl.store(place + (k + 2) * splits, total[k])
    if split == 0:
        tl.store(at_target + row * 2, _at_target(student, row, y, z_r, z_c))
        if TEACHER:
            tl.store(at_target + row * 2 + 1, _at_target(teacher, row, y, v_r, v_c))


@triton.jit
def _row_of_parts(partial, at_target, row, splits, cold, TEACHER: tl.constexpr, HOT: tl.constexpr,
                  HOT_TEACHER: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    part = tl.arange(0, SPLITS)[None, :]
    inside = part < splits
    place = partial + (row * 11 * splits)[:, None] + part
    z_bases = tl.load(place, mask=inside, other=NOTHING)
    v_bases = tl.load(place + splits, mask=inside, other=NOTHING)
    z_base, v_base, total = combined(
        z_bases, v_bases,
        tl.load(place + 2 * splits, mask=inside, other=0.0), tl.load(place + 3 * splits, mask=inside, other=0.0),
        tl.load(place + 4 * splits, mask=inside, other=0.0), tl.load(place + 5 * splits, mask=inside, other=0.0),
        tl.load(place + 6 * splits, mask=inside, other=0.0), tl.load(place + 7 * splits, mask=inside, other=0.0),
        tl.load(place + 8 * splits, mask=inside, other=0.0), tl.load(place + 9 * splits, mask=inside, other=0.0),
        tl.load(place + 10 * splits, mask=inside, other=0.0), cold,
    )  # fmt: skip
    z_y = tl.load(at_target + row * 2)
    v_y = z_y
    if TEACHER:
        v_y = tl.load(at_target + row * 2 + 1)
    numbers = row_numbers(total, z_base, v_base, z_y, v_y, cold, TEACHER, HOT, HOT_TEACHER)
    return z_base, v_base, total, numbers


@triton.jit
def _slope_kernel(student, teacher, index, partial, at_target, slopes, rows, classes, z_r, z_c, v_r, v_c, ignore_index,
                  splits, k_reverse, k_jsd, k_tvd, cold, beta,
                  INDEX: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, TVD: tl.constexpr,
                  SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # slopes[row, 0, split], slopes[row, 1, split]: what a part adds to the losses of `centred` and to sum e G.
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = split * BLOCK + tl.arange(0, BLOCK)
    y, given, known = _rows(index, row, rows, classes, ignore_index, INDEX)
    z_base, v_base, total, numbers = _row_of_parts(partial, at_target, row, splits, cold, True, False, False, SPLITS)
    z = _logits(student, row, column, y, given, classes, z_r, z_c, INDEX)
    v = _logits(teacher, row, column, y, given, classes, v_r, v_c, INDEX)
    a, e, f, hot, back = exponentials(z, v, z_base, v_base, cold, True, False)
    q_of_e, p_of_f = ratio(numbers[0][1], total[0])[:, None], ratio(numbers[1][1], total[1])[:, None]
    loss, slope = centred(e, f, back, q_of_e, p_of_f, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)
    tl.store(slopes + row * 2 * splits + split, tl.sum(loss, axis=1))
    tl.store(slopes + row * 2 * splits + splits + split, tl.sum(e * slope, axis=1))


@triton.jit
def _split_kernel(student, teacher, index, scores, weight, sample_weight, items, counts, partial, at_target, slopes,
                  losses, divisors, grad, rows, classes, z_r, z_c, v_r, v_c, s_r, s_c, ignore_index, parts, splits,
                  fixed, k_ce, k_kl, k_reverse, k_jsd, k_tvd, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, cold, beta, smooth,
                  TEACHER: tl.constexpr, HOT: tl.constexpr, HOT_TEACHER: tl.constexpr, CE: tl.constexpr,
                  SOFT: tl.constexpr, SCORES: tl.constexpr, WEIGHT: tl.constexpr, SAMPLE: tl.constexpr,
                  INDEX: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr,
                  REVERSE: tl.constexpr, JSD: tl.constexpr, TVD: tl.constexpr, GRAD: tl.constexpr,
                  SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # The loss of a row (by its first part) and the gradient of each part.
    CENTRED: tl.constexpr = REVERSE or JSD or TVD
    program, split = tl.program_id(0), tl.program_id(1)
    row = program.to(tl.int64) + tl.arange(0, 1)
    y, given, known = _rows(index, row, rows, classes, ignore_index, INDEX)
    z_base, v_base, total, numbers = _row_of_parts(
        partial, at_target, row, splits, cold, TEACHER, HOT, HOT_TEACHER, SPLITS
    )
    t_y = _target_weight(scores, weight, row, y, classes, s_r, s_c, smooth, CE, SCORES, WEIGHT, INDEX)
    first = (program == 0) & (split == 0)
    scale, ce, later = _scales(counts, items, fixed, parts, divisors, first, ITEMS, PARTS, HALF)
    if SAMPLE:
        w = tl.load(sample_weight + row)
        scale, ce = w * scale, w * ce
    ce *= k_ce
    loss = distillation(total, numbers, k_kl, k_reverse, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, TEACHER)
    mean, slope_y = loss, loss
    if CENTRED:
        part = tl.arange(0, SPLITS)[None, :]
        place = slopes + (row * 2 * splits)[:, None] + part
        loss_y, slope_y = target_slope(numbers, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)
        loss += tl.sum(tl.load(place, mask=part < splits, other=0.0), axis=1) + loss_y
        mean = ratio(tl.sum(tl.load(place + splits, mask=part < splits, other=0.0), axis=1), total[0])
    loss *= scale
    if CE:
        loss += ce * cross_entropy(total, numbers, t_y)
    if split == 0:
        _store(losses, loss * later, row, rows, given, known)
    if GRAD:
        column = split * BLOCK + tl.arange(0, BLOCK)
        z = _logits(student, row, column, y, given, classes, z_r, z_c, INDEX)
        v, slope, t = z, z, z
        if TEACHER:
            v = _logits(teacher, row, column, y, given, classes, v_r, v_c, INDEX)
        if SOFT:
            t = _targets(scores, weight, row, column, y, given, classes, s_r, s_c, smooth, SCORES, WEIGHT, INDEX)
        exps = exponentials(z, v, z_base, v_base, cold, TEACHER, HOT)
        if CENTRED:
            a, e, f, hot, back = exps
            q_of_e, p_of_f = ratio(numbers[0][1], total[0])[:, None], ratio(numbers[1][1], total[1])[:, None]
            unused, slope = centred(e, f, back, q_of_e, p_of_f, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)
        of = gradient_numbers(total, numbers, t_y, mean, slope_y, scale, ce, k_kl, k_dkd, k_dkd_rest, k_nkd,
                              k_nkd_rest, cold, TEACHER, HOT, CENTRED)  # fmt: skip
        if SOFT and SAMPLE:
            ce = ce[:, None]
        _store_gradient(grad, exps, slope, t, of, ce, row, column, rows, classes, y, given, known, TEACHER, HOT,
                        CENTRED, SOFT, INDEX)  # fmt: skip


@triton.jit
def _scale_kernel(grad_loss, saved, divisors, grad, size, classes, EACH: tl.constexpr, HALF: tl.constexpr,
                  IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    later = 1.0
    if HALF:
        later = tl.load(divisors)
    if EACH:
        factor = tl.load(grad_loss + i // classes, mask=i < size, other=0.0).to(tl.float32) * later
        g = tl.load(saved + i, mask=i < size, other=0.0).to(tl.float32) * factor
        tl.store(grad + i, g.to(grad.dtype.element_ty), mask=i < size)
    else:
        factor = tl.load(grad_loss).to(tl.float32) * later
        # In place a factor of 1 leaves nothing to do, and nobody but the device has to know it.
        if (factor != 1.0) | (not IN_PLACE):
            g = tl.load(saved + i, mask=i < size, other=0.0).to(tl.float32) * factor
            tl.store(grad + i, g.to(grad.dtype.element_ty), mask=i < size)


def forward(
    student, teacher, index, scores, weight, sample_weight, items, terms, ignore_index, fixed, loss, divisors, grad
) -> None:
    """Fills loss (a scalar, or one number a row), the inverse divisors [2] and grad [N, C], where it is given."""
    rows, classes = student.shape
    t = Terms(*terms)
    each = loss.ndim == 1
    losses = loss if each else torch.empty(rows, dtype=torch.float32, device=student.device)
    cold = 1.0 / t.temperature if teacher is not None else 1.0
    hot = cold != 1 and bool(t.ce or t.nkd_target)
    flags = dict(
        TEACHER=teacher is not None, HOT=hot, HOT_TEACHER=hot and bool(t.nkd_target), CE=bool(t.ce),
        SOFT=bool(t.ce) and (scores is not None or bool(t.smoothing)), SCORES=scores is not None,
        WEIGHT=weight is not None, INDEX=index is not None,
    )  # fmt: skip
    centre = dict(REVERSE=bool(t.reverse_kl), JSD=bool(t.jsd), TVD=bool(t.tvd))
    counts, parts = None, 0
    if items is None and fixed <= 0:
        parts = max(triton.cdiv(rows, COUNT_ROWS), 1)
        counts = torch.empty(2, parts, dtype=torch.float32, device=student.device)
        counted = weight if scores is None else None
        _count_kernel[(parts,)](
            index, counted if counted is not None else counts, counts, rows, classes, ignore_index, parts,
            WEIGHT=counted is not None, BLOCK=COUNT_ROWS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    common = dict(
        SAMPLE=sample_weight is not None, ITEMS=items is not None, PARTS=triton.next_power_of_2(parts) if parts else 0,
        HALF=grad is not None and grad.dtype == torch.float16, GRAD=grad is not None, **flags, **centre,
        enable_fp_fusion=True,
    )  # fmt: skip
    # Arguments that are not there are never read.
    teacher, scores, grad = (student if x is None else x for x in (teacher, scores, grad))
    index, weight, sample_weight, items, counts = (
        losses if x is None else x for x in (index, weight, sample_weight, items, counts)
    )
    inputs = (student, teacher, index, scores, weight)
    shape = (rows, classes, *student.stride(), *teacher.stride(), *scores.stride(), ignore_index)
    numbers = (*t[:9], cold, t.beta, t.smoothing)
    width = triton.next_power_of_2(classes)
    # Vectors of a row that live at once: e, f, e at T = 1, G or a - b, targets.
    live = 1 + flags["TEACHER"] + hot + 2 * any(centre.values()) + flags["SOFT"]
    if width * live <= IN_REGISTERS:
        tile = max(512 // width, 1)  # of more rows the numbers alone would fill the registers
        _whole_kernel[(triton.cdiv(rows, tile),)](
            *inputs, sample_weight, items, counts, losses, divisors, grad, *shape, parts, fixed, *numbers, **common,
            ROWS=tile, BLOCK=width, num_warps=4 if tile > 1 else min(max(width // 512, 2), 16),
        )  # fmt: skip
    else:
        _split_rows(inputs, sample_weight, items, counts, losses, divisors, grad, shape, parts, fixed, numbers, common)
    if not each:
        torch.sum(losses, dim=0, out=loss)


def _split_rows(
    inputs, sample_weight, items, counts, losses, divisors, grad, shape, parts, fixed, numbers, common
) -> None:
    rows, classes = shape[:2]
    splits = triton.cdiv(classes, PART)
    grid = (rows, splits)
    partial, at_target, slopes = (
        torch.empty(rows, n, dtype=torch.float32, device=losses.device) for n in (11 * splits, 2, 2 * splits)
    )
    options = dict(BLOCK=PART, num_warps=8, enable_fp_fusion=True)
    cold, beta, smooth = numbers[9:]
    flags = ("TEACHER", "HOT", "HOT_TEACHER", "SOFT", "SCORES", "WEIGHT", "INDEX")
    _part_kernel[grid](
        *inputs, partial, at_target, *shape, splits, cold, smooth, **{name: common[name] for name in flags}, **options
    )
    several = dict(SPLITS=triton.next_power_of_2(splits), BLOCK=PART, num_warps=8)
    centre = {name: common[name] for name in ("REVERSE", "JSD", "TVD")}
    if any(centre.values()):
        _slope_kernel[grid](
            *inputs[:3], partial, at_target, slopes, *shape[:6], shape[8], splits, *numbers[2:5], cold, beta,
            INDEX=common["INDEX"], **centre, **several, enable_fp_fusion=True,
        )  # fmt: skip
    _split_kernel[grid if common["GRAD"] else (rows, 1)](
        *inputs, sample_weight, items, counts, partial, at_target, slopes, losses, divisors, grad, *shape, parts,
        splits, fixed, *numbers, **common, **several,
    )  # fmt: skip


def backward(grad_loss, saved, divisors, grad) -> None:
    """Fills grad [N, C], which may be saved itself, with saved times the upstream gradient."""
    size, block = saved.numel(), 2048
    if not size:
        return
    _scale_kernel[(triton.cdiv(size, block),)](
        grad_loss, saved, divisors, grad, size, saved.shape[1], EACH=grad_loss.ndim == 1,
        HALF=saved.dtype == torch.float16, IN_PLACE=grad.data_ptr() == saved.data_ptr(), BLOCK=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
