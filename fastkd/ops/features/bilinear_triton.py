"""Bilinear interpolation inside Triton kernels; see `bilinear` for the rule."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def axis_taps(i, values, out):
    """(left, right, share of the right one) of output i (int32) along an axis of `values` that becomes `out`."""
    place = tl.maximum((2 * i + 1) * values - out, 0)
    left = place // (2 * out)
    share = (place - left * (2 * out)).to(tl.float32) / (2 * out)
    return left, tl.minimum(left + 1, values - 1), share


@triton.jit
def first_output(cell, values, out):
    """The first output whose left tap is `cell` or a later one."""
    return (tl.maximum(out * (2 * cell + 1) - values, 0) + 2 * values - 1) // (2 * values)


@triton.jit
def corners(y, x, h, w, height, width, s_h, s_w, RESIZE: tl.constexpr):
    """Offsets of the four logits around position (y, x) of the output, and the shares of the lower and right ones."""
    if RESIZE:
        top, bottom, down = axis_taps(y, h, height)
        left, right, across = axis_taps(x, w, width)
    else:
        top, bottom, down = y, y, 0.0
        left, right, across = x, x, 0.0
    upper, lower = top.to(tl.int64) * s_h, bottom.to(tl.int64) * s_h
    left, right = left.to(tl.int64) * s_w, right.to(tl.int64) * s_w
    return upper + left, upper + right, lower + left, lower + right, down, across


@triton.jit
def logit(plane, o00, o01, o10, o11, down, across, inside, RESIZE: tl.constexpr):
    """Logit of one class, float32; `plane` points to its map."""
    value = tl.load(plane + o00, mask=inside, other=0.0).to(tl.float32)
    if RESIZE:
        b = tl.load(plane + o01, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(plane + o10, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(plane + o11, mask=inside, other=0.0).to(tl.float32)
        upper = (1.0 - across) * value + across * b
        value = (1.0 - down) * upper + down * ((1.0 - across) * c + across * d)
    return value


@triton.jit
def add_exp(best, total, value):
    """Running maximum and sum of exponentials with one more value: total = sum exp(value - best)."""
    larger = value > best
    e = tl.where(value == best, 1.0, tl.exp(-tl.abs(value - best)))
    return tl.where(larger, value, best), tl.where(larger, total * e + 1.0, total + e), larger
