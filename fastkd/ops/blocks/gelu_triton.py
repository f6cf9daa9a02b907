"""Triton kernels of `gelu`, and of what `mlp` does between its matrix products.

Bytes per number of 16 bit: forward reads 2 and writes 2; backward reads 4 and writes 2. With `rows_backward` the same
pass over [N, F] also writes the activation again (2 bytes more), so that forward need not keep it, and adds up the
gradient's columns, which are the gradient of the bias before the GELU: neither is read a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sums_triton

BLOCK = 2048  # 16 numbers a thread with 4 warps: two 16-byte loads of 16-bit data in flight


@triton.jit
def _gaussian(x):
    # Phi(x), and exp(-x^2 / 2) which it shares with the density: erf by Abramowitz and Stegun 7.1.26, absolute error
    # 1.5e-7. Half the instructions of an erf and an exponential apart, which would cost more time than the bytes.
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = 1.061405429 * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = p * t + 0.254829592
    bell = tl.exp(-z * z)
    tail = 0.5 * p * t * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def _slope(x, phi, bell):
    return phi + x * bell * 0.3989422804014327


@triton.jit
def _forward_kernel(x, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0).to(tl.float32)
    phi, _ = _gaussian(value)
    tl.store(out + i, (value * phi).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _backward_kernel(grad_out, x, grad_x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0).to(tl.float32)
    grad = tl.load(grad_out + i, mask=i < size, other=0).to(tl.float32)
    phi, bell = _gaussian(value)
    tl.store(grad_x + i, (grad * _slope(value, phi, bell)).to(grad_x.dtype.element_ty), mask=i < size)


@triton.jit
def _rows_backward_kernel(grad_out, x, grad_x, activation, partial, rows, width, parts, ACTIVATION: tl.constexpr,
                          SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    # The row tiles p, p + parts, ... of a block of columns; partial[p] is what their gradients add up to.
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * ROWS, rows, parts * ROWS):
        row = start + tl.arange(0, ROWS)
        i = row[:, None].to(tl.int64) * width + d[None, :]
        inside = (row < rows)[:, None] & (d < width)[None, :]
        value = tl.load(x + i, mask=inside, other=0).to(tl.float32)
        grad = tl.load(grad_out + i, mask=inside, other=0).to(tl.float32)
        phi, bell = _gaussian(value)
        if ACTIVATION:
            tl.store(activation + i, (value * phi).to(activation.dtype.element_ty), mask=inside)
        # What is summed is what the matrix products after this one read: the rounded gradient.
        grad = (grad * _slope(value, phi, bell)).to(grad_x.dtype.element_ty)
        tl.store(grad_x + i, grad, mask=inside)
        if SUMS:
            sums += grad.to(tl.float32)
    if SUMS:
        tl.store(partial + part.to(tl.int64) * width + d, tl.sum(sums, axis=0), mask=d < width)


def forward(x: Tensor, out: Tensor) -> None:
    """Fills out like x, both contiguous."""
    size = x.numel()
    _forward_kernel[(triton.cdiv(size, BLOCK),)](x, out, size, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)


def backward(grad_out: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """Fills grad_x like x, all contiguous."""
    size = x.numel()
    _backward_kernel[(triton.cdiv(size, BLOCK),)](
        grad_out, x, grad_x, size, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
    )


def rows_backward(grad_out: Tensor, x: Tensor, grad_x: Tensor, activation: Tensor | None, sums: Tensor | None) -> None:
    """Fills grad_x [N, F], and on request activation = gelu(x) [N, F] and sums [F] of grad_x over rows; contiguous.

    grad_x may be grad_out or x itself, and activation the other one: each number is read before it is written.
    """
    rows, width = x.shape
    columns, tile = sums_triton.COLUMNS, 16  # 16 numbers a thread with 4 warps
    parts = sums_triton.parts_of(rows, width)
    partial = torch.empty(parts, width, dtype=torch.float32, device=x.device) if sums is not None else grad_x
    _rows_backward_kernel[(triton.cdiv(width, columns), parts)](
        grad_out, x, grad_x, grad_x if activation is None else activation, partial, rows, width, parts,
        ACTIVATION=activation is not None, SUMS=sums is not None, ROWS=tile, COLUMNS=columns, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    if sums is not None:
        sums_triton.reduce(partial, sums)
