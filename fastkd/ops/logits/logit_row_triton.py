"""The maths of one row of `logit_loss` in Triton; `terms.py` has the formulas, ``csrc/logit_loss.h`` the same in C++.

The target class y is left out of every sum and added as a scalar. With e = exp((z - m) / T), m the largest of the
*other* logits, the probabilities of the others are e times a number of the row, at any distance of the target; so are
those of their softmax among themselves. Tiles are [rows, classes]; what belongs to a row is [rows].
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def log1p(x):
    # The approximate logarithm of the hardware has no relative accuracy near 1. For x > -1; x is cut at -1 + 2^-24.
    x = tl.where(x < -0.99999994, -0.99999994, x)
    u = 1.0 + x
    lost = x - (u - 1.0)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2): the mantissa comes to [0.7, 1.4)
    n = (shifted >> 23).to(tl.float32)
    r = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2 * r - 1.1514610310e-1
    p = p * r + 1.1676998740e-1
    p = p * r - 1.2420140846e-1
    p = p * r + 1.4249322787e-1
    p = p * r - 1.6668057665e-1
    p = p * r + 2.0000714765e-1
    p = p * r - 2.4999993993e-1
    p = p * r + 3.3333331174e-1
    low = (p * r - 0.5) * r * r - n * 2.12194440e-4 + lost / u
    return n * 0.693359375 + (r + low)


@triton.jit
def log_of_sum(x):
    return tl.where(x == 0.0, NOTHING, log1p(x - 1.0))


@triton.jit
def finite(base):
    # What is subtracted: 0 where every logit is -inf.
    return tl.where(base == NOTHING, 0.0, base)


@triton.jit
def weighted(p, x):
    # 0 * inf = 0. Here and below `!= 0`, not `> 0`: NaN must stay.
    return tl.where(p != 0.0, p * x, 0.0)


@triton.jit
def ratio(x, total):
    return tl.where(total != 0.0, x / tl.where(total != 0.0, total, 1.0), 0.0)


@triton.jit
def odds(x):
    # A probability and the rest, and their logarithms, from the log-odds; no cancellation. -inf: nothing and all.
    size = tl.abs(x)
    small = tl.exp(-size)
    both = log1p(small)
    big = 1.0 / (1.0 + small)
    leads = x > 0
    p = tl.where(leads, big, small * big)
    rest = tl.where(leads, small * big, big)
    return p, rest, tl.where(leads, -both, -size - both), tl.where(leads, -size - both, -both)


@triton.jit
def exponentials(z, v, z_base, v_base, cold, TEACHER: tl.constexpr, HOT: tl.constexpr):
    # e, f, e at T = 1, and a - b where both sides are there; [rows, classes], of logits without the target.
    dz = z - finite(z_base)[:, None]
    a = dz * cold
    e = tl.exp(a)
    hot = e
    if HOT:
        hot = tl.exp(dz)
    f = e
    back = a
    if TEACHER:
        b = (v - finite(v_base)[:, None]) * cold
        f = tl.exp(b)
        back = a - b
    return a, e, f, hot, back


@triton.jit
def sums(z, v, t, z_base, v_base, exps, TEACHER: tl.constexpr, HOT: tl.constexpr, HOT_TEACHER: tl.constexpr,
         SOFT: tl.constexpr):  # fmt: skip
    # Of e, f, f (b - a), f a, e (a - b), hot e, hot f, t, t (z - base): nine numbers a row.
    a, e, f, hot, back = exps
    e_sum = tl.sum(e, axis=1)
    none = tl.zeros_like(e_sum)
    f_sum, f_gap, f_a, e_gap, hot_f, t_sum, t_z = none, none, none, none, none, none, none
    if TEACHER:
        f_sum = tl.sum(f, axis=1)
        f_gap = tl.sum(tl.where(f != 0.0, -f * back, 0.0), axis=1)
        f_a = tl.sum(tl.where(f != 0.0, f * a, 0.0), axis=1)
        e_gap = tl.sum(tl.where(e != 0.0, e * back, 0.0), axis=1)
    hot_e = e_sum
    if HOT:
        hot_e = tl.sum(hot, axis=1)
    if HOT_TEACHER:
        hot_f = tl.sum(tl.exp(v - finite(v_base)[:, None]), axis=1)
    if SOFT:
        t_sum = tl.sum(t, axis=1)
        t_z = tl.sum(tl.where(t != 0.0, t * (z - finite(z_base)[:, None]), 0.0), axis=1)
    return e_sum, f_sum, f_gap, f_a, e_gap, hot_e, hot_f, t_sum, t_z


@triton.jit
def combined(z_base, v_base, e, f, f_gap, f_a, e_gap, hot_e, hot_f, t, t_z, cold):
    # The same numbers of a row from those of its parts, [1, parts]; padding has bases of -inf and sums of 0.
    z_all, v_all = tl.max(z_base, axis=1), tl.max(v_base, axis=1)
    dz = tl.where(z_base == z_all[:, None], 0.0, z_base - z_all[:, None])
    dv = tl.where(v_base == v_all[:, None], 0.0, v_base - v_all[:, None])
    da, db = dz * cold, dv * cold
    se, sf = tl.exp(da), tl.exp(db)
    f_gap = tl.where(f != 0.0, (f_gap + f * (db - da)) * sf, 0.0)
    f_a = tl.where(f != 0.0, (f_a + f * da) * sf, 0.0)
    e_gap = tl.where(e != 0.0, (e_gap + e * (da - db)) * se, 0.0)
    t_z += tl.where(t != 0.0, t * dz, 0.0)
    together = (
        tl.sum(e * se, axis=1), tl.sum(f * sf, axis=1), tl.sum(f_gap, axis=1), tl.sum(f_a, axis=1),
        tl.sum(e_gap, axis=1), tl.sum(hot_e * tl.exp(dz), axis=1), tl.sum(hot_f * tl.exp(dv), axis=1),
        tl.sum(t, axis=1), tl.sum(t_z, axis=1),
    )  # fmt: skip
    return z_all, v_all, together


@triton.jit
def row_numbers(sums, z_base, v_base, z_y, v_y, cold, TEACHER: tl.constexpr, HOT: tl.constexpr,
                HOT_TEACHER: tl.constexpr):  # fmt: skip
    # z_y, v_y: the target's logits, -inf without a target.
    e, f, hot_e, hot_f = sums[0], sums[1], sums[5], sums[6]
    log_e = log_of_sum(e)
    dz = z_y - finite(z_base)
    q = odds(dz * cold - log_e)
    hot = q
    log_hot = log_e
    if HOT:
        log_hot = log_of_sum(hot_e)
        hot = odds(dz - log_hot)
    p = q
    log_f = log_e
    confidence = q[0]
    if TEACHER:
        log_f = log_of_sum(f)
        dv = v_y - finite(v_base)
        p = odds(dv * cold - log_f)
        confidence = p[0]
        if HOT_TEACHER:
            confidence = odds(dv - log_of_sum(hot_f))[0]
    return q, p, hot, log_e, log_f, log_hot, confidence


@triton.jit
def centred(e, f, back, q_of_e, p_of_f, k_reverse, k_jsd, k_tvd, beta, REVERSE: tl.constexpr, JSD: tl.constexpr,
            TVD: tl.constexpr):  # fmt: skip
    # Terms whose gradient is q (G - mean of G): their losses, class by class, and G. Any shapes that fit.
    q = e * q_of_e
    p = f * p_of_f
    loss = tl.zeros_like(q)
    slope = loss
    if REVERSE:
        slope = tl.where(e != 0.0, k_reverse * back, 0.0)
    if TVD:
        loss += tl.abs(q - p) * (0.5 * k_tvd)
        slope += tl.where(q > p, 0.5 * k_tvd, tl.where(q < p, -0.5 * k_tvd, 0.0))
    if JSD:
        rest = 1.0 - beta
        mixture = beta * p + rest * q
        share = (q - p) / tl.where(mixture < 1.17549435e-38, 1.17549435e-38, mixture)
        log_q = log1p(beta * share)  # log q / m
        loss += k_jsd * (weighted(beta * p, log1p(-rest * share)) + weighted(rest * q, log_q))
        slope += k_jsd * rest * log_q
    return loss, slope


@triton.jit
def target_slope(numbers, k_reverse, k_jsd, k_tvd, beta, REVERSE: tl.constexpr, JSD: tl.constexpr, TVD: tl.constexpr):
    # The same of the target class.
    q, p, hot, log_e, log_f, log_hot, confidence = numbers
    back = (q[2] - p[2]) - (log_f - log_e + q[3] - p[3])  # the G of the other classes lack this constant
    return centred(q[0], p[0], back, 1.0, 1.0, k_reverse, k_jsd, k_tvd, beta, REVERSE, JSD, TVD)


@triton.jit
def distillation(sums, numbers, k_kl, k_reverse, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, TEACHER: tl.constexpr):
    # Without the losses of `centred`, save reverse KL.
    q, p, hot, log_e, log_f, log_hot, confidence = numbers
    e, f, f_gap, f_a, e_gap = sums[0], sums[1], sums[2], sums[3], sums[4]
    loss = tl.zeros_like(log_e)
    if TEACHER:
        rest = tl.where(f != 0.0, ratio(f_gap, f) - log_f + log_e, 0.0)
        target = weighted(p[0], p[2] - q[2]) + weighted(p[1], p[3] - q[3])
        gap = tl.where(e != 0.0, ratio(e_gap, e) - log_e + log_f, 0.0)
        reverse = weighted(q[1], gap + q[3] - p[3]) + weighted(q[0], q[2] - p[2])
        # A term that may be infinite does not count where its weight is 0.
        loss = weighted(k_kl, target + weighted(p[1], rest)) + weighted(k_dkd, target) + weighted(k_dkd_rest, rest)
        loss += weighted(k_nkd_rest, log_e - ratio(f_a, f)) + weighted(k_reverse, reverse)
        loss += weighted(k_nkd * confidence, -hot[2])
    return loss


@triton.jit
def cross_entropy(sums, numbers, t_y):
    q, p, hot, log_e, log_f, log_hot, confidence = numbers
    t, t_z = sums[7], sums[8]
    return weighted(t_y, -hot[2]) + tl.where(t != 0.0, t * (log_hot - hot[3]) - t_z, 0.0)


@triton.jit
def gradient_numbers(sums, numbers, t_y, mean, slope_y, scale, ce, k_kl, k_dkd, k_dkd_rest, k_nkd, k_nkd_rest, cold,
                     TEACHER: tl.constexpr, HOT: tl.constexpr, CENTRED: tl.constexpr):  # fmt: skip
    # The gradient of a class is of_e e + of_f f + of_hot hot + of_slope e G - ce t; that of the target a number.
    # scale, ce: of the row's terms and of its cross-entropy; mean: sum e G / sum e.
    q, p, hot, log_e, log_f, log_hot, confidence = numbers
    e, f, hot_e, t = sums[0], sums[1], sums[5], sums[7]
    nkd = k_nkd * scale * confidence
    # From the rest's probability: where the target's is nearly 1, 1 - p has no digits left.
    target = ce * (t * hot[0] - t_y * hot[1]) - nkd * hot[1]
    of_hot = (ce * (t + t_y) + nkd) * ratio(hot[1], hot_e)
    of_e = of_hot
    if HOT:
        of_e = tl.zeros_like(of_hot)
    of_f = tl.zeros_like(of_e)
    of_slope = of_f
    if TEACHER:
        q_of_e, p_of_f = ratio(q[1], e), ratio(p[1], f)
        k = scale * cold
        excess = tl.where(q[0] + p[0] > 1.0, p[1] - q[1], q[0] - p[0])  # of the target's probability
        among = k * (k_dkd_rest + k_nkd_rest)
        dkd = k * k_dkd * excess
        of_e += k * k_kl * q_of_e + ratio(among - dkd, e)
        of_f = -k * k_kl * p_of_f - ratio(among, f)
        target += k * k_kl * excess + dkd
        if CENTRED:
            lead = tl.where(q[0] != 0.0, slope_y - mean, 0.0)
            of_slope = k * q_of_e
            of_e -= of_slope * (mean + q[0] * lead)
            target += k * q[0] * q[1] * lead
    return of_e, of_f, of_hot, of_slope, target
