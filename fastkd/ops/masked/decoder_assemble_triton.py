"""Triton kernels of `decoder_assemble`: one pass over the output rows, ordered sums for the gradient of fill."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(tokens, fill, pos_embed, ids, out, rows, total, given, num_prefix, width,
                    tokens_b, tokens_t, ids_b, ids_k, PER_PATCH: tl.constexpr, POSITION: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, columns = row < rows, (d < width)[None, :]
    b, i = (row // total).to(tl.int64), row % total
    j = i - num_prefix
    patch = tl.load(ids + b * ids_b + j * ids_k, mask=inside & (j >= 0), other=0)
    is_token, is_fill, inside = (inside & (i < given))[:, None], (inside & (i >= given))[:, None], inside[:, None]
    fill_row = patch if PER_PATCH else patch * 0
    token = tl.load(tokens + (b * tokens_b + i * tokens_t)[:, None] + d[None, :], mask=is_token & columns, other=0)
    filled = tl.load(fill + fill_row[:, None] * width + d[None, :], mask=is_fill & columns, other=0)
    x = token.to(tl.float32) + filled.to(tl.float32)  # one of the two is 0
    if POSITION:
        place = tl.where(j < 0, i, num_prefix + patch)
        position = tl.load(pos_embed + place[:, None] * width + d[None, :], mask=inside & columns, other=0)
        x += position.to(tl.float32)
    to = out + row[:, None].to(tl.int64) * width + d[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=inside & columns)


@triton.jit
def _image_sums_kernel(grad_out, partial, given, total, width, grad_b, grad_t, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # partial[b] = sum of the filled rows of image b.
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(given, total, ROWS):
        i = start + tl.arange(0, ROWS)
        rows = grad_out + b * grad_b + i[:, None] * grad_t
        sums += tl.load(rows + d[None, :], mask=(i < total)[:, None] & (d < width)[None, :], other=0).to(tl.float32)
    tl.store(partial + b * width + d, tl.sum(sums, axis=0), mask=d < width)


@triton.jit
def _patch_sums_kernel(grad_out, place, grad_fill, batch, patches, width, grad_b, grad_t,
                       IMAGES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # grad_fill[l] = sum over images of row place[b, l], where there is one.
    patch = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([IMAGES, BLOCK], tl.float32)
    for start in range(0, batch, IMAGES):
        b = (start + tl.arange(0, IMAGES)).to(tl.int64)
        i = tl.load(place + b * patches + patch, mask=b < batch, other=-1)
        rows = grad_out + b[:, None] * grad_b + i[:, None] * grad_t
        sums += tl.load(rows + d[None, :], mask=(i >= 0)[:, None] & (d < width)[None, :], other=0).to(tl.float32)
    tl.store(grad_fill + patch * width + d, tl.sum(sums, axis=0).to(grad_fill.dtype.element_ty), mask=d < width)


def _block(width: int, most: int) -> int:
    return min(triton.next_power_of_2(width), most)


def forward(tokens, fill, pos_embed, ids, num_prefix: int, out: torch.Tensor) -> None:
    """Fills out [B, R + K, D]; tokens have unit stride in D, fill and pos_embed are contiguous."""
    batch, total, width = out.shape
    rows, block = batch * total, _block(width, 512)
    _forward_kernel[(triton.cdiv(rows, 4), triton.cdiv(width, block))](
        tokens, fill, fill if pos_embed is None else pos_embed, ids, out, rows, total, tokens.shape[1], num_prefix,
        width, *tokens.stride()[:2], *ids.stride(), PER_PATCH=len(fill) > 1, POSITION=pos_embed is not None, ROWS=4,
        BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def backward(grad_out, ids, given: int, num_prefix: int, grad_fill: torch.Tensor) -> None:
    """Fills grad_fill [1 or L, D]; grad_out has unit stride in D."""
    batch, total, width = grad_out.shape
    patches, block = len(grad_fill), _block(width, 128)
    columns, strides = triton.cdiv(width, block), grad_out.stride()[:2]
    if patches == 1:
        partial = torch.empty(batch, width, dtype=torch.float32, device=grad_out.device)
        _image_sums_kernel[(batch, columns)](
            grad_out, partial, given, total, width, *strides, ROWS=16, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
        grad_fill.copy_(partial.sum(0, keepdim=True))
        return
    # place[b, l]: the row of image b that is filled from fill row l, or -1.
    rows = torch.arange(given, total, dtype=torch.int32, device=ids.device).expand(batch, -1)
    place = torch.full((batch, patches), -1, dtype=torch.int32, device=ids.device)
    place.scatter_(1, ids[:, given - num_prefix :], rows)
    _patch_sums_kernel[(patches, columns)](
        grad_out, place, grad_fill, batch, patches, width, *strides, IMAGES=16, BLOCK=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
