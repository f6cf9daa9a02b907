"""Triton kernel of `crd_nce_loss`: a program takes a stretch of one sample's rows, for loss and gradient at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 512  # rows a program


@triton.jit
def _forward_kernel(feature, bank, index, shift, partial_loss, partial_grad, columns, n_data, width, inverse, scale,
                    STRETCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    c = tl.arange(0, WIDTH)
    f = tl.load(feature + n * width + c, mask=c < width, other=0.0).to(tl.float32)
    offset = tl.load(shift).to(tl.float32)
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    grad = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, STRETCH, ROWS):
        k = part * STRETCH + start + tl.arange(0, ROWS)
        row = tl.load(index + n * columns + k, mask=k < columns, other=0)
        inside = (k < columns) & (row >= 0) & (row < n_data)
        at = bank + row[:, None] * width + c[None, :]
        m = tl.load(at, mask=inside[:, None] & (c[None, :] < width), other=0.0).to(tl.float32)
        u = tl.sum(m * f[None, :], axis=1) * inverse - offset
        # softplus of u for negatives, of -u for the positive; its slope is a sigmoid
        sign = tl.where(k == 0, -1.0, 1.0)
        e = tl.exp(-tl.abs(u))
        loss += tl.where(k < columns, tl.maximum(u * sign, 0.0) + tl.log(1.0 + e), 0.0)
        slope = sign * tl.where(u * sign > 0.0, 1.0, e) / (1.0 + e)
        grad += tl.sum(tl.where(k < columns, slope, 0.0)[:, None] * m, axis=0)
    tl.store(partial_loss + n * parts + part, tl.sum(loss, axis=0) * scale)
    out = partial_grad + (part * tl.num_programs(0) + n) * width + c
    tl.store(out, grad * (scale * inverse), mask=c < width)


def forward(feature: Tensor, bank: Tensor, index: Tensor, shift: Tensor, temperature: float, constant: float,
            grad_feature: Tensor, loss: Tensor) -> None:  # fmt: skip
    """Fills loss and gradient from partial sums per stretch of rows, in a fixed order."""
    samples, width = feature.shape
    columns, device = index.shape[1], feature.device
    parts = triton.cdiv(columns, STRETCH)
    partial_loss = torch.empty(samples * parts, dtype=torch.float32, device=device)
    partial_grad = torch.empty((parts, samples, width), dtype=torch.float32, device=device)
    block = triton.next_power_of_2(width)
    _forward_kernel[(samples, parts)](
        feature, bank, index, shift, partial_loss, partial_grad, columns, bank.shape[0], width, 1.0 / temperature,
        1.0 / samples, STRETCH=STRETCH, ROWS=min(max(4096 // block, 1), 64), WIDTH=block, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    torch.sum(partial_grad, dim=0, out=grad_feature)
    torch.sum(partial_loss, dim=0, out=loss)
    loss.add_(constant)
