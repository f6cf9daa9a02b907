"""Triton kernels of `visible_patch_embed`: pixels go from the image through registers into the matrix product.

Forward is one kernel: gather, normalise, multiply, add bias and position, put the prefix rows in. The gradient of the
weight gathers the pixels again; the rows are split over programs, whose shares are added in a fixed order.

A product does not depend on the order of its terms: pixels of dense channels-last images are taken as (row, column,
channel), so that they load in wide vectors, and the weight is brought into the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._dispatch import triton_interpreted

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@triton.jit
def _corners(ids, b, j, inside, columns, ids_b, ids_k, img_b, img_h, img_w, PH: tl.constexpr, PW: tl.constexpr):
    # Patch ids[b, j] of each row, and the offset of its first pixel.
    b = b.to(tl.int64)
    patch = tl.load(ids + b * ids_b + j * ids_k, mask=inside, other=0)
    return patch, b * img_b + (patch // columns) * (PH * img_h) + (patch % columns) * (PW * img_w)


@triton.jit
def _pixels(images, affine, corners, inside, k, img_c, img_h, img_w, C: tl.constexpr, PH: tl.constexpr,
            PW: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    # Tile [rows, k] of normalised pixels, 0 outside; k runs over (row, column, channel) if LAST.
    valid = k < C * PH * PW
    if LAST:
        c = k % C
        offsets = k // (PW * C) * img_h + k % (PW * C)
    else:
        c = k // (PH * PW)
        offsets = c * img_c + (k // PW) % PH * img_h + k % PW * img_w
    tile = tl.load(images + corners[:, None] + offsets[None, :], mask=inside[:, None] & valid[None, :], other=0)
    scale = tl.load(affine + c, mask=valid, other=0.0)
    shift = tl.load(affine + C + c, mask=valid, other=0.0)
    return tl.where(inside[:, None], tile.to(tl.float32) * scale[None, :] + shift[None, :], 0.0).to(DOT)


@triton.jit
def _forward_kernel(images, ids, weight, bias, pos_embed, prefix, affine, out, rows, tokens, num_prefix, width, columns,
                    ids_b, ids_k, img_b, img_c, img_h, img_w, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                    BIAS: tl.constexpr, POSITION: tl.constexpr, PREFIX: tl.constexpr, LAST: tl.constexpr,
                    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    # Rows are those of the output; a prefix row multiplies zeros.
    P: tl.constexpr = C * PH * PW
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, i = m // tokens, m % tokens
    j = i - num_prefix
    inside = (m < rows) & (j >= 0)
    patch, corners = _corners(ids, b, j, inside, columns, ids_b, ids_k, img_b, img_h, img_w, PH, PW)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _pixels(images, affine, corners, inside, k, img_c, img_h, img_w, C, PH, PW, LAST, DOT)
        w = tl.load(weight + d[None, :] * P + k[:, None], mask=(d < width)[None, :] & (k < P)[:, None], other=0.0)
        sums = tl.dot(x, w.to(DOT), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    if POSITION:
        place = pos_embed + patch[:, None] * width + d[None, :]
        sums += tl.load(place, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    if PREFIX:
        head = (m < rows) & (j < 0)
        place = prefix + i[:, None] * width + d[None, :]
        token = tl.load(place, mask=head[:, None] & (d < width)[None, :], other=0.0)
        sums = tl.where(head[:, None], token.to(tl.float32), sums)
    to = out + m[:, None].to(tl.int64) * width + d[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (d < width)[None, :])


@triton.jit
def _weight_kernel(grad_out, images, ids, affine, partial, rows, share, visible, num_prefix, width, columns,
                   grad_b, grad_t, ids_b, ids_k, img_b, img_c, img_h, img_w, C: tl.constexpr, PH: tl.constexpr,
                   PW: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    # partial[s] = grad_out^T @ pixels over rows [s * share, (s + 1) * share).
    P: tl.constexpr = C * PH * PW
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    end = tl.minimum((split + 1) * share, rows)
    sums = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for start in range(split * share, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        b, j = m // visible, m % visible
        inside = m < end
        _, corners = _corners(ids, b, j, inside, columns, ids_b, ids_k, img_b, img_h, img_w, PH, PW)
        x = _pixels(images, affine, corners, inside, k, img_c, img_h, img_w, C, PH, PW, LAST, DOT)
        row = grad_out + b.to(tl.int64) * grad_b + (num_prefix + j) * grad_t
        g = tl.load(row[None, :] + d[:, None], mask=inside[None, :] & (d < width)[:, None], other=0.0)
        sums = tl.dot(g.to(DOT), x, sums, input_precision="ieee")
    to = partial + split.to(tl.int64) * (width * P) + d[:, None] * P + k[None, :]
    tl.store(to, sums, mask=(d < width)[:, None] & (k < P)[None, :])


def _dot(dtype: torch.dtype) -> tl.dtype:
    # 16-bit operands with float32 sums on tensor cores; the interpreter multiplies them wrongly and gets float32.
    if triton_interpreted() or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _options(images: torch.Tensor, patch: tuple[int, int], dtype: torch.dtype) -> dict:
    channels = images.shape[1]
    return dict(
        C=channels, PH=patch[0], PW=patch[1], LAST=images.stride(1) == 1 and images.stride(3) == channels,
        DOT=_dot(dtype), enable_fp_fusion=True, num_warps=8, num_stages=3 if images.element_size() < 4 else 2,
    )  # fmt: skip


def forward(images, ids, weight, bias, pos_embed, prefix, affine, out: torch.Tensor) -> None:
    """Fills out [B, R + n, D]; weight, bias, pos_embed and prefix are contiguous."""
    batch, tokens, width = out.shape
    rows, patch = batch * tokens, tuple(weight.shape[2:])
    options = _options(images, patch, out.dtype)
    if options["LAST"]:
        weight = weight.permute(0, 2, 3, 1).contiguous()
    wide = out.dtype == torch.float32
    block_n, block_k = (64, 32) if wide else (128, 64)
    columns = triton.cdiv(width, block_n)
    block_m = 64 if wide or triton.cdiv(rows, 128) * columns < PROGRAMS // 2 else 128
    _forward_kernel[(triton.cdiv(rows, block_m), columns)](
        images, ids, weight, *(weight if t is None else t for t in (bias, pos_embed, prefix)), affine, out,
        rows, tokens, tokens - ids.shape[1], width, images.shape[3] // patch[1], *ids.stride(), *images.stride(),
        BIAS=bias is not None, POSITION=pos_embed is not None, PREFIX=prefix is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **options,
    )  # fmt: skip


def backward(grad_out, images, ids, affine, grad_weight, grad_bias, grad_prefix) -> None:
    """Fills the three contiguous gradients; grad_out [B, R + n, D] has unit stride in D."""
    width, channels, *patch = grad_weight.shape
    rows, pixels, num_prefix = ids.numel(), channels * patch[0] * patch[1], len(grad_prefix)
    options = _options(images, patch, grad_out.dtype)
    block_d, block_k, block_m = (64, 64, 16) if grad_out.dtype == torch.float32 else (128, 128, 64)
    block_m = min(block_m, 128 // images.element_size())  # a step's pixels have to fit into registers
    tiles = triton.cdiv(width, block_d), triton.cdiv(pixels, block_k)
    # Enough programs to fill the device, each with four steps or more.
    splits = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), rows // (4 * block_m)))
    partial = torch.empty(splits, width, pixels, dtype=torch.float32, device=grad_out.device)
    _weight_kernel[(*tiles, splits)](
        grad_out, images, ids, affine, partial, rows, triton.cdiv(rows, splits), ids.shape[1], num_prefix, width,
        images.shape[3] // patch[1], *grad_out.stride()[:2], *ids.stride(), *images.stride(),
        BLOCK_D=block_d, BLOCK_K=block_k, BLOCK_M=block_m, **options,
    )  # fmt: skip
    total = partial.sum(0)
    if options["LAST"]:
        total = total.view(width, *patch, channels).permute(0, 3, 1, 2)
    grad_weight.copy_(total.reshape(grad_weight.shape))
    grad_bias.copy_(grad_out[:, num_prefix:].sum((0, 1), dtype=torch.float32))
    grad_prefix.copy_(grad_out[:, :num_prefix].sum(0, dtype=torch.float32))
