"""Triton kernels of `residual_layer_norm`: rows in registers, each read and written once.

Bytes per number with a float32 residual stream and 16-bit delta and result: forward reads 4 + 2 and writes 4 + 2,
backward reads 4 (total) + 2 (grad_normed) + 4 (grad_total) and writes 4 + 2. Statistics are 8 bytes a row.

Threads hold runs of 4 numbers in either dtype (`_columns`): left alone, the compiler would take 16-bit rows in runs of
8, and every float32 row would pass through shared memory on its way to them.

The gradients of weight and bias are sums over all rows. A fixed number of programs walks over them, keeps its two sums
in registers and writes them once; `sums_triton.reduce` adds them up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sums_triton

PROGRAMS = 384  # of 8 warps and up to 80 registers a thread: three on each multiprocessor of a large GPU


@triton.jit
def _columns(BLOCK: tl.constexpr):
    return tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]


@triton.jit
def _forward_kernel(x, delta, weight, bias, total, stats, normed, rows, tokens, width, eps, x_b, x_t, delta_b, delta_t,
                    DELTA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = _columns(BLOCK)
    b, t = (row // tokens).to(tl.int64), row % tokens
    inside = (row < rows)[:, None] & (d < width)
    at = row[:, None].to(tl.int64) * width + d
    value = tl.load(x + (b * x_b + t * x_t)[:, None] + d, mask=inside, other=0).to(tl.float32)
    if DELTA:
        value += tl.load(delta + (b * delta_b + t * delta_t)[:, None] + d, mask=inside, other=0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + at, kept, mask=inside)
        value = kept.to(tl.float32)  # backward has nothing else: its h must be this one's
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(stats + 2 * row, mean, mask=row < rows)
    tl.store(stats + 2 * row + 1, scale, mask=row < rows)
    w = tl.load(weight + d, mask=d < width, other=0)
    result = centred * scale[:, None] * w + tl.load(bias + d, mask=d < width, other=0)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_total, grad_normed, total, weight, stats, grad_delta, grad_x, partial, rows, tokens, width,
                     programs, above_b, above_t, grad_b, grad_t, total_b, total_t, ABOVE: tl.constexpr,
                     DELTA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    d = _columns(BLOCK)
    w = tl.load(weight + d, mask=d < width, other=0)
    weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        b, t = (row // tokens).to(tl.int64), row % tokens
        inside = (row < rows)[:, None] & (d < width)
        at = row[:, None].to(tl.int64) * width + d
        g = tl.load(grad_normed + (b * grad_b + t * grad_t)[:, None] + d, mask=inside, other=0).to(tl.float32)
        value = tl.load(total + (b * total_b + t * total_t)[:, None] + d, mask=inside, other=0).to(tl.float32)
        mean = tl.load(stats + 2 * row, mask=row < rows, other=0)[:, None]
        scale = tl.load(stats + 2 * row + 1, mask=row < rows, other=0)[:, None]
        h = tl.where(inside, (value - mean) * scale, 0.0)
        weight_sums += g * h
        bias_sums += g
        y = g * w
        along = tl.sum(y * h, axis=1)[:, None] / width
        gradient = scale * (y - tl.sum(y, axis=1)[:, None] / width - h * along)
        if ABOVE:
            above = grad_total + (b * above_b + t * above_t)[:, None] + d
            gradient += tl.load(above, mask=inside, other=0).to(tl.float32)
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask=inside)
        if DELTA:
            tl.store(grad_delta + at, gradient.to(grad_delta.dtype.element_ty), mask=inside)
    to = partial + program.to(tl.int64) * 2 * width + tl.arange(0, BLOCK)
    tl.store(to, tl.sum(weight_sums, axis=0), mask=tl.arange(0, BLOCK) < width)
    tl.store(to + width, tl.sum(bias_sums, axis=0), mask=tl.arange(0, BLOCK) < width)


def _tile(width: int, share: int) -> dict:
    # 2048 numbers at a time, several rows where they are short, one where it is longer; `share` of them a thread.
    block = triton.next_power_of_2(width)
    rows = max(2048 // block, 1)
    return dict(ROWS=rows, BLOCK=block, num_warps=min(rows * block // (32 * share), 16), enable_fp_fusion=True)


def forward(x, delta, weight, bias, eps: float, total: Tensor, stats: Tensor, normed: Tensor) -> None:
    """Fills total (where there is a delta), stats and normed; x and delta have unit stride in D."""
    batch, tokens, width = x.shape
    tile = _tile(width, 16)
    given = x if delta is None else delta
    _forward_kernel[(triton.cdiv(batch * tokens, tile["ROWS"]),)](
        x, given, weight, bias, total, stats, normed, batch * tokens, tokens, width, eps, *x.stride()[:2],
        *given.stride()[:2], DELTA=delta is not None, **tile,
    )  # fmt: skip


def backward(grad_total, grad_normed, total, weight, stats, grad_weight, grad_bias, grad_delta, grad_x: Tensor) -> None:
    """Fills all gradients; grad_total, grad_normed and total have unit stride in D."""
    batch, tokens, width = total.shape
    rows, tile = batch * tokens, _tile(width, 8)  # two sums beside them leave registers for no more
    programs = min(max(triton.cdiv(rows, 2 * tile["ROWS"]), 1), PROGRAMS)
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=total.device)
    above = grad_normed if grad_total is None else grad_total
    _backward_kernel[(programs,)](
        above, grad_normed, total, weight, stats, grad_x if grad_delta is None else grad_delta, grad_x, partial, rows,
        tokens, width, programs, *above.stride()[:2], *grad_normed.stride()[:2], *total.stride()[:2],
        ABOVE=grad_total is not None, DELTA=grad_delta is not None, **tile,
    )  # fmt: skip
    sums_triton.reduce(partial, grad_weight, grad_bias)
