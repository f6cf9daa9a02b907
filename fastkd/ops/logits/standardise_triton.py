"""Triton kernels of `logit_standardization`: a program walks its row in tiles; one tile up to 4096 classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _moments(x, step, classes, BLOCK: tl.constexpr):
    # Mean and unbiased standard deviation of a row.
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + i.to(tl.int64) * step, mask=i < classes, other=0.0).to(tl.float32), axis=0)
    mean = total / classes
    squares = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i.to(tl.int64) * step, mask=i < classes, other=0.0).to(tl.float32)
        centred = tl.where(i < classes, value - mean, 0.0)
        squares += tl.sum(centred * centred, axis=0)
    return mean, tl.sqrt(squares / (classes - 1))


@triton.jit
def _forward_kernel(x, y, classes, x_n, x_c, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_n
    mean, deviation = _moments(x, x_c, classes, BLOCK)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i.to(tl.int64) * x_c, mask=i < classes, other=0.0).to(tl.float32)
        value = (value - mean) / (deviation + eps)
        tl.store(y + row * classes + i, value.to(y.dtype.element_ty), mask=i < classes)


@triton.jit
def _backward_kernel(grad_y, x, grad_x, classes, g_n, g_c, x_n, x_c, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_n
    grad_y += row * g_n
    mean, deviation = _moments(x, x_c, classes, BLOCK)
    total = tl.full((), 0.0, tl.float32)
    product = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i.to(tl.int64) * x_c, mask=i < classes, other=0.0).to(tl.float32)
        g = tl.load(grad_y + i.to(tl.int64) * g_c, mask=i < classes, other=0.0).to(tl.float32)
        total += tl.sum(g, axis=0)
        product += tl.sum(g * (value - mean), axis=0)
    factor = 1.0 / (deviation + eps)
    # Equal logits have no deviation: nothing to project out.
    along = tl.where(deviation > 0, product / (classes - 1) / deviation * factor, 0.0)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i.to(tl.int64) * x_c, mask=i < classes, other=0.0).to(tl.float32)
        g = tl.load(grad_y + i.to(tl.int64) * g_c, mask=i < classes, other=0.0).to(tl.float32)
        g = (g - total / classes - (value - mean) * along) * factor
        tl.store(grad_x + row * classes + i, g.to(grad_x.dtype.element_ty), mask=i < classes)


def _options(classes: int) -> dict:
    block = min(triton.next_power_of_2(classes), 4096)
    return dict(BLOCK=block, num_warps=min(max(block // 256, 1), 8), enable_fp_fusion=True)


def forward(x: torch.Tensor, eps: float, y: torch.Tensor) -> None:
    """Fills y, contiguous [N, C]."""
    if y.numel():
        _forward_kernel[(x.shape[0],)](x, y, x.shape[1], *x.stride(), eps, **_options(x.shape[1]))


def backward(grad_y: torch.Tensor, x: torch.Tensor, eps: float, grad_x: torch.Tensor) -> None:
    """Fills grad_x, contiguous [N, C]."""
    if grad_x.numel():
        _backward_kernel[(x.shape[0],)](
            grad_y, x, grad_x, x.shape[1], *grad_y.stride(), *x.stride(), eps, **_options(x.shape[1])
        )  # fmt: skip
