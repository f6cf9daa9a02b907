"""Triton kernel of `mask_image`: one program per block of rows (of any channel and image) and of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _mask_kernel(images, keep, out, rows, channels, height, width, cells_y, cells_x, scale_y, scale_x,
                 s_b, s_c, s_h, s_w, k_b, k_h, k_w, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y = row % height
    c, b = (row // height) % channels, row // height // channels
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (x < width)[None, :]
    # A product alone, so that no fusion can change the rounding of PyTorch's nearest interpolation.
    cell_y = tl.minimum((y.to(tl.float32) * scale_y).to(tl.int32), cells_y - 1)
    cell_x = tl.minimum((x.to(tl.float32) * scale_x).to(tl.int32), cells_x - 1)
    kept = tl.load(keep + (b * k_b + cell_y * k_h)[:, None] + (cell_x * k_w)[None, :], mask=inside, other=0) != 0
    at = (b * s_b + c * s_c + y * s_h)[:, None] + (x.to(tl.int64) * s_w)[None, :]
    pixel = tl.load(images + at, mask=inside & kept, other=0.0)
    tl.store(out + (row * width)[:, None] + x[None, :], pixel, mask=inside)


def mask_image(images: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out, contiguous [B, C, H, W]."""
    batch, channels, height, width = images.shape
    cells, total = keep.shape[2:], batch * channels * height
    block = min(triton.next_power_of_2(width), 512)
    rows = max(1024 // block, 1)
    _mask_kernel[(triton.cdiv(total, rows), triton.cdiv(width, block))](
        images, keep.view(torch.uint8), out, total, channels, height, width, *cells, cells[0] / height,
        cells[1] / width, *images.stride(), keep.stride(0), *keep.stride()[2:],
        ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
