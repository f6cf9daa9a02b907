"""Backward of `attention` for more keys than a tile has: queries and keys in blocks, scores never in memory.

One kernel per block of queries goes over the keys twice: the first round sums p and p dP, which gives the exact row sum
and the delta of backward (8 bytes a row and head, kept), the second adds up dQ. Another kernel per block of keys goes
over the queries and adds up dK and dV.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton import LOG2E, _load, _places, _scores, _store, warps


@triton.jit
def _grad_query_kernel(grad_out, q, key_value, lse, shifts, deltas, grad_q, heads, queries, keys, blocks, scale,
                       go_b, go_t, q_b, q_t, kv_b, kv_t, gq_b, gq_t, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                       DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    b, h = (program // (heads * blocks)).to(tl.int64), (program // blocks) % heads
    head, token = _places((program % blocks) * ROWS, h, ROWS, ROWS)
    query = _load(q + b * q_b, q_t, head, token, heads, queries, DIM, BLOCK, WIDE)
    above = _load(grad_out + b * go_b, go_t, head, token, heads, queries, DIM, BLOCK, WIDE)
    key_at = key_value + b * kv_b
    value_at = key_at + heads * DIM
    row = (b * heads + head) * queries + token
    shift = tl.load(lse + row, mask=token < queries, other=0) * LOG2E
    total = tl.zeros([ROWS], tl.float32)
    delta = tl.zeros([ROWS], tl.float32)
    for start in range(0, keys, COLUMNS):
        head_k, token_k = _places(start, h, COLUMNS, COLUMNS)
        key = _load(key_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        value = _load(value_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        p = tl.exp2(_scores(query, key, head, head_k, token_k, keys, scale * LOG2E) - shift[:, None])
        total += tl.sum(p, axis=1)
        delta += tl.sum(p * tl.dot(above, tl.trans(value), input_precision="ieee"), axis=1)
    shift += tl.log2(total)
    delta /= total
    tl.store(shifts + row, shift, mask=token < queries)
    tl.store(deltas + row, delta, mask=token < queries)
    grad_query = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, keys, COLUMNS):
        head_k, token_k = _places(start, h, COLUMNS, COLUMNS)
        key = _load(key_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        value = _load(value_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        p = tl.exp2(_scores(query, key, head, head_k, token_k, keys, scale * LOG2E) - shift[:, None])
        grad_p = tl.dot(above, tl.trans(value), input_precision="ieee")
        grad_scores = (p * (grad_p - delta[:, None]) * scale).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
    _store(grad_q + b * gq_b, gq_t, head, token, heads, queries, grad_query, DIM, BLOCK)


@triton.jit
def _grad_key_value_kernel(grad_out, q, key_value, shifts, deltas, grad_kv, heads, queries, keys, blocks, scale,
                           go_b, go_t, q_b, q_t, kv_b, kv_t, gkv_b, gkv_t, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    b, h = (program // (heads * blocks)).to(tl.int64), (program // blocks) % heads
    head_k, token_k = _places((program % blocks) * COLUMNS, h, COLUMNS, COLUMNS)
    value_at = heads * DIM
    key = _load(key_value + b * kv_b, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
    value = _load(key_value + b * kv_b + value_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
    grad_key = tl.zeros([COLUMNS, BLOCK], tl.float32)
    grad_value = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for start in range(0, queries, ROWS):
        head, token = _places(start, h, ROWS, ROWS)
        query = _load(q + b * q_b, q_t, head, token, heads, queries, DIM, BLOCK, WIDE)
        above = _load(grad_out + b * go_b, go_t, head, token, heads, queries, DIM, BLOCK, WIDE)
        row = (b * heads + head) * queries + token
        shift = tl.load(shifts + row, mask=token < queries, other=0)
        delta = tl.load(deltas + row, mask=token < queries, other=0)
        p = tl.exp2(_scores(query, key, head, head_k, token_k, keys, scale * LOG2E) - shift[:, None])
        grad_p = tl.dot(above, tl.trans(value), input_precision="ieee")
        grad_scores = (p * (grad_p - delta[:, None]) * scale).to(query.dtype)
        grad_value = tl.dot(tl.trans(p.to(above.dtype)), above, grad_value, input_precision="ieee")
        grad_key = tl.dot(tl.trans(grad_scores), query, grad_key, input_precision="ieee")
    _store(grad_kv + b * gkv_b, gkv_t, head_k, token_k, heads, keys, grad_key, DIM, BLOCK)
    _store(grad_kv + b * gkv_b + value_at, gkv_t, head_k, token_k, heads, keys, grad_value, DIM, BLOCK)


def backward(grad_out, q, key_value, lse, num_heads: int, grad_q: Tensor, grad_key_value: Tensor, tile: dict) -> None:
    """Fills grad_q [B, Tq, D] and grad_key_value [B, T, 2 D] in tiles of the given sizes; unit strides in channels."""
    batch, queries, keys = *q.shape[:2], key_value.shape[1]
    shifts, deltas = torch.empty_like(lse), torch.empty_like(lse)
    sizes, scale = (num_heads, queries, keys), 1 / math.sqrt(tile["DIM"])
    options = {name: value for name, value in tile.items() if name not in ("TOKENS", "KEY_TOKENS")}
    options |= dict(num_warps=warps(q.dtype, tile))
    read = [s for t in (grad_out, q, key_value) for s in t.stride()[:2]]
    blocks = triton.cdiv(queries, tile["ROWS"])
    _grad_query_kernel[(batch * num_heads * blocks,)](
        grad_out, q, key_value, lse, shifts, deltas, grad_q, *sizes, blocks, scale, *read, *grad_q.stride()[:2],
        **options,
    )  # fmt: skip
    blocks = triton.cdiv(keys, tile["COLUMNS"])
    _grad_key_value_kernel[(batch * num_heads * blocks,)](
        grad_out, q, key_value, shifts, deltas, grad_key_value, *sizes, blocks, scale, *read,
        *grad_key_value.stride()[:2], **options,
    )  # fmt: skip
