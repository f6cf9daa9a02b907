"""Triton kernel of `random_masking`: one program ranks BLOCK patches of one image against all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _store_ranks(rank, mine, valid, out, keep, ids_shuffle, ids_restore, mask):
    tl.store(ids_restore + out + mine, rank.to(tl.int64), mask=valid)
    tl.store(ids_shuffle + out + rank, mine.to(tl.int64), mask=valid)
    tl.store(mask + out + mine, (rank >= keep).to(tl.float32), mask=valid)


@triton.jit
def _rank_kernel(
    noise, ids_shuffle, ids_restore, mask, patches, keep, stride_b, stride_l,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = mine < patches
    # Upcast right after each load; NaN sorts last, as in argsort.
    x = tl.load(noise + image * stride_b + mine * stride_l, mask=valid, other=0.0).to(WIDE)
    x = tl.where(x != x, float("inf"), x)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, patches, OTHERS):
        j = start + tl.arange(0, OTHERS)
        y = tl.load(noise + image * stride_b + j * stride_l, mask=j < patches, other=0.0).to(WIDE)
        y = tl.where(y != y, float("inf"), y)
        before = (y[None, :] < x[:, None]) | ((y[None, :] == x[:, None]) & (j[None, :] < mine[:, None]))
        rank += tl.sum((before & (j < patches)[None, :]).to(tl.int32), axis=1)
    _store_ranks(rank, mine, valid, image * patches, keep, ids_shuffle, ids_restore, mask)


@triton.jit
def _draw(key, patch):
    """24 bits of noise in an int32: the first word of Philox for the counter (patch, 0, 0, 0)."""
    word, _, _, _ = tl.randint4x(key, patch)
    return (word.to(tl.uint32, bitcast=True) >> 8).to(tl.int32)


@triton.jit
def _draw_rank_kernel(
    keys, ids_shuffle, ids_restore, mask, patches, keep, stride, BLOCK: tl.constexpr, OTHERS: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + image * stride)
    x = _draw(key, mine)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, patches, OTHERS):
        j = start + tl.arange(0, OTHERS)
        y = _draw(key, j)
        before = (y[None, :] < x[:, None]) | ((y[None, :] == x[:, None]) & (j[None, :] < mine[:, None]))
        rank += tl.sum((before & (j < patches)[None, :]).to(tl.int32), axis=1)
    _store_ranks(rank, mine, mine < patches, image * patches, keep, ids_shuffle, ids_restore, mask)


def random_masking(
    noise: torch.Tensor, keep: int, ids_shuffle: torch.Tensor, ids_restore: torch.Tensor, mask: torch.Tensor
) -> None:
    """Fills ids_shuffle, ids_restore and mask, all [B, L] contiguous, from noise [B, L]."""
    batch, patches = noise.shape
    block = 64
    _rank_kernel[(batch, triton.cdiv(patches, block))](
        noise, ids_shuffle, ids_restore, mask, patches, keep, noise.stride(0), noise.stride(1),
        WIDE=tl.float64 if noise.dtype == torch.float64 else tl.float32, BLOCK=block, OTHERS=64,
        enable_fp_fusion=True,
    )  # fmt: skip


def random_masking_keyed(
    keys: torch.Tensor, keep: int, ids_shuffle: torch.Tensor, ids_restore: torch.Tensor, mask: torch.Tensor
) -> None:
    """The same from keys [B] int64; every program draws the noise of its image for itself."""
    batch, patches = mask.shape
    block = 64
    _draw_rank_kernel[(batch, triton.cdiv(patches, block))](
        keys, ids_shuffle, ids_restore, mask, patches, keep, keys.stride(0), BLOCK=block, OTHERS=64,
        enable_fp_fusion=True,
    )  # fmt: skip
