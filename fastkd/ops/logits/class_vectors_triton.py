"""Triton kernels of `class_vector_kd` around its products: one program a row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .class_vectors import through


@triton.jit
def _unit_rows_kernel(x, out, norms, width, x_row, x_column, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_row + i * x_column, mask=i < width, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, axis=0))
    tl.store(norms + row, norm)
    tl.store(out + row * width + i, value * (scale / tl.maximum(norm, 1e-12)), mask=i < width)


@triton.jit
def _unit_rows_backward_kernel(grad, unit, norms, grad_x, width, inverse_square, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    g = tl.load(grad + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    u = tl.load(unit + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    norm = tl.load(norms + row)
    along = tl.where(norm < 1e-12, 0.0, tl.sum(u * g, axis=0) * inverse_square)
    tl.store(grad_x + row * width + i, (g - u * along) * (factor / tl.maximum(norm, 1e-12)), mask=i < width)


def _options(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True)


def unit_rows(x: torch.Tensor, scale: float, out: torch.Tensor, norms: torch.Tensor) -> None:
    """Fills out [N, D], contiguous, and norms [N]."""
    _unit_rows_kernel[(len(x),)](x, out, norms, x.shape[1], *x.stride(), scale, **_options(x.shape[1]))


def unit_rows_backward(grad, unit, norms, scale: float, factor: float, grad_x: torch.Tensor) -> None:
    """Fills grad_x [N, D]; everything is contiguous."""
    _unit_rows_backward_kernel[(len(grad),)](
        grad, unit, norms, grad_x, grad.shape[1], scale**-2, factor, **_options(grad.shape[1])
    )


fill = through("triton")
