"""Triton kernel of `linear_pixel_loss`: a program per predicted patch turns its row into the residual, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .linear_pixel_loss import backward_through
from .masked_pixel_loss_triton import _pixels

backward = backward_through("triton")


@triton.jit
def _residual_kernel(residual, bias, images, ids, affine, partial, rows, columns, unit, eps,
                     ids_b, ids_k, img_b, img_c, img_h, img_w,
                     C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, k = row // rows, row % rows
    i = tl.arange(0, BLOCK)
    P: tl.constexpr = C * PH * PW
    valid = i < P
    target = _pixels(images, ids, affine, row, k, valid, columns, C, PH, PW, ids_b, ids_k, img_b, img_c, img_h, img_w,
                     b, NORM, eps, BLOCK)  # fmt: skip
    x = tl.load(residual + row * P + i, mask=valid, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + i, mask=valid, other=0.0)
    difference = tl.where(valid, x - target, 0.0)
    tl.store(partial + row, tl.sum(difference * difference, axis=0) / P)
    tl.debug_barrier()  # where threads share elements, all have read before one writes
    tl.store(residual + row * P + i, (difference * unit).to(residual.dtype.element_ty), mask=valid)


def forward(x, weight, bias, images, ids, affine, patch, norm_pix, eps, unit, loss, residual) -> None:
    """Fills residual [B * K, P] and the scalar loss: one product, one pass over it, one ordered sum (no atomics)."""
    torch.mm(x, weight.to(x.dtype).t(), out=residual)
    rows, pixels = residual.shape
    partial = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(pixels)
    _residual_kernel[(rows,)](
        residual, partial if bias is None else bias, images, ids, affine, partial, ids.shape[1],
        images.shape[3] // patch[1], unit, eps, *ids.stride(), *images.stride(), C=images.shape[1], PH=patch[0],
        PW=patch[1], NORM=norm_pix, BIAS=bias is not None, BLOCK=block, num_warps=min(max(block // 256, 1), 16),
        enable_fp_fusion=True,
    )  # fmt: skip
    torch.mean(partial, dim=0, out=loss)
