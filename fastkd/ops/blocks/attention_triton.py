"""Triton kernels of `attention`: a head's keys and values in registers, read in place from the projections.

Up to 64 keys (16 in float32) a program does all of one head: forward reads q, k, v once and writes the result,
backward reads q, k, v and the upstream gradient once and writes their gradients; per token 8 D bytes forward and 14 D
backward in 16 bit, plus 4 bytes a head for the log-sum-exp. Of sequences of at most 8 tokens several heads share the
16 rows of a matrix instruction: a score between two heads is masked. More keys are taken block by block, forward with a
running maximum, backward in two kernels (`attention_long_triton`).

Scores are in units of log 2. Products take 16-bit operands and sum in float32; float32 operands are multiplied as
they are, without TF32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import triton_interpreted

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _places(start, first_head, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    # (head, token) of each row of a tile that holds TOKENS rows of each of ROWS / TOKENS heads.
    row = tl.arange(0, ROWS)
    return first_head + row // TOKENS, start + row % TOKENS


@triton.jit
def _rows(base, stride, head, token, heads, tokens, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # Addresses [ROWS, BLOCK] of rows of a [tokens, heads x DIM] matrix, and which of them exist.
    c = tl.arange(0, BLOCK)[None, :]
    inside = ((token < tokens) & (head < heads))[:, None] & (c < DIM)
    return base + (token * stride + head * DIM)[:, None] + c, inside


@triton.jit
def _load(base, stride, head, token, heads, tokens, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at, inside = _rows(base, stride, head, token, heads, tokens, DIM, BLOCK)
    x = tl.load(at, mask=inside, other=0)
    if WIDE:  # the interpreter cannot multiply 16-bit tiles
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(base, stride, head, token, heads, tokens, value, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = _rows(base, stride, head, token, heads, tokens, DIM, BLOCK)
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, head, head_k, token_k, keys, scale):
    # Every row has a key of its own head, also where the row itself does not exist: no row is all -inf.
    own = (head[:, None] == head_k[None, :]) & (token_k < keys)[None, :]
    return tl.where(own, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def _forward_kernel(q, key_value, out, lse, heads, queries, keys, blocks, scale, q_b, q_t, kv_b, kv_t, out_b, out_t,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, KEY_TOKENS: tl.constexpr,
                    DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    groups = tl.cdiv(heads, ROWS // TOKENS)
    b = (program // (groups * blocks)).to(tl.int64)
    first_head = (program // blocks) % groups * (ROWS // TOKENS)
    head, token = _places((program % blocks) * TOKENS, first_head, ROWS, TOKENS)
    query = _load(q + b * q_b, q_t, head, token, heads, queries, DIM, BLOCK, WIDE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, keys, KEY_TOKENS):
        head_k, token_k = _places(start, first_head, COLUMNS, KEY_TOKENS)
        key = _load(key_value + b * kv_b, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        value = _load(key_value + b * kv_b + heads * DIM, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
        scores = _scores(query, key, head, head_k, token_k, keys, scale * LOG2E)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        result = tl.dot(p.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        top = higher
    _store(out + b * out_b, out_t, head, token, heads, queries, result / total[:, None], DIM, BLOCK)
    to = lse + (b * heads + head) * queries + token
    tl.store(to, (top + tl.log2(total)) * LN2, mask=(token < queries) & (head < heads))


@triton.jit
def _backward_kernel(grad_out, q, key_value, lse, grad_q, grad_kv, heads, queries, keys, scale,
                     go_b, go_t, q_b, q_t, kv_b, kv_t, gq_b, gq_t, gkv_b, gkv_t, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, TOKENS: tl.constexpr, KEY_TOKENS: tl.constexpr, DIM: tl.constexpr,
                     BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    groups = tl.cdiv(heads, ROWS // TOKENS)
    b = (program // groups).to(tl.int64)
    first_head = program % groups * (ROWS // TOKENS)
    head_k, token_k = _places(0, first_head, COLUMNS, KEY_TOKENS)
    value_at = heads * DIM
    key = _load(key_value + b * kv_b, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
    value = _load(key_value + b * kv_b + value_at, kv_t, head_k, token_k, heads, keys, DIM, BLOCK, WIDE)
    grad_key = tl.zeros([COLUMNS, BLOCK], tl.float32)
    grad_value = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for start in range(0, queries, TOKENS):
        head, token = _places(start, first_head, ROWS, TOKENS)
        query = _load(q + b * q_b, q_t, head, token, heads, queries, DIM, BLOCK, WIDE)
        above = _load(grad_out + b * go_b, go_t, head, token, heads, queries, DIM, BLOCK, WIDE)
        exists = (token < queries) & (head < heads)
        shift = tl.load(lse + (b * heads + head) * queries + token, mask=exists, other=0) * LOG2E
        p = tl.exp2(_scores(query, key, head, head_k, token_k, keys, scale * LOG2E) - shift[:, None])
        p /= tl.sum(p, axis=1)[:, None]  # lse is rounded: without this, so would all of p be
        grad_p = tl.dot(above, tl.trans(value), input_precision="ieee")
        # Not above . out: the sum of the very terms cancels them exactly where a softmax is sharp.
        delta = tl.sum(p * grad_p, axis=1)
        grad_scores = (p * (grad_p - delta[:, None]) * scale).to(query.dtype)
        grad_value = tl.dot(tl.trans(p.to(above.dtype)), above, grad_value, input_precision="ieee")
        grad_key = tl.dot(tl.trans(grad_scores), query, grad_key, input_precision="ieee")
        grad_query = tl.dot(grad_scores, key, input_precision="ieee")
        _store(grad_q + b * gq_b, gq_t, head, token, heads, queries, grad_query, DIM, BLOCK)
    _store(grad_kv + b * gkv_b, gkv_t, head_k, token_k, heads, keys, grad_key, DIM, BLOCK)
    _store(grad_kv + b * gkv_b + value_at, gkv_t, head_k, token_k, heads, keys, grad_value, DIM, BLOCK)


def tiles(q: Tensor, keys: int, num_heads: int) -> dict:
    """Sizes of the tiles of a program."""
    queries, dim = q.shape[1], q.shape[2] // num_heads
    # float32 products run on the FMA units, and hold all of their operands in registers.
    most = 16 if q.dtype == torch.float32 else 64
    rows, columns = (min(max(triton.next_power_of_2(n), 16), most) for n in (queries, keys))
    # Several heads a tile where 16 rows, the height of a matrix instruction, hold more than one.
    packed = triton.next_power_of_2(max(queries, keys))
    tokens, key_tokens = (packed, packed) if packed <= 8 else (rows, columns)
    # One stage: loops have a few rounds at most, and buffers ahead would cost registers and shared memory of programs
    # whose loads overlap as well.
    return dict(
        ROWS=rows, COLUMNS=columns, TOKENS=tokens, KEY_TOKENS=key_tokens, DIM=dim,
        BLOCK=max(triton.next_power_of_2(dim), 16), WIDE=triton_interpreted(), num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def warps(dtype: torch.dtype, tile: dict) -> int:
    """Warps of a program: none spills, and several programs share a multiprocessor."""
    if dtype == torch.float32:
        return 4  # a thread has one number of the scores, or two
    rows = max(tile["ROWS"], tile["COLUMNS"])
    return 1 if rows == 16 else rows // 8  # 16 rows are one instruction's; of more, two warps share them


def forward(q: Tensor, key_value: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
    """Fills out [B, Tq, D] and lse [B, H, Tq]; q [B, Tq, D] and key_value [B, T, 2 D] have unit stride in D."""
    batch, queries, keys = *q.shape[:2], key_value.shape[1]
    tile = tiles(q, keys, num_heads)
    groups, blocks = triton.cdiv(num_heads, tile["ROWS"] // tile["TOKENS"]), triton.cdiv(queries, tile["TOKENS"])
    _forward_kernel[(batch * groups * blocks,)](
        q, key_value, out, lse, num_heads, queries, keys, blocks, 1 / math.sqrt(tile["DIM"]), *q.stride()[:2],
        *key_value.stride()[:2], *out.stride()[:2], **tile,
        num_warps=warps(q.dtype, tile),
    )  # fmt: skip


def backward(grad_out, q, key_value, lse, num_heads: int, grad_q: Tensor, grad_key_value: Tensor) -> None:
    """Fills grad_q like q and grad_key_value like key_value; all have unit stride in their channels."""
    batch, queries, keys = *q.shape[:2], key_value.shape[1]
    tile = tiles(q, keys, num_heads)
    # Beside 64 keys no more than 32 rows: what a program holds of 64 would not fit its registers everywhere.
    tile["ROWS"], tile["TOKENS"] = min(tile["ROWS"], 32), min(tile["TOKENS"], 32)
    if keys > tile["KEY_TOKENS"]:
        from .attention_long_triton import backward as long_backward

        return long_backward(grad_out, q, key_value, lse, num_heads, grad_q, grad_key_value, tile)
    groups = triton.cdiv(num_heads, tile["ROWS"] // tile["TOKENS"])
    strides = (s for t in (grad_out, q, key_value, grad_q, grad_key_value) for s in t.stride()[:2])
    _backward_kernel[(batch * groups,)](
        grad_out, q, key_value, lse, grad_q, grad_key_value, num_heads, queries, keys, 1 / math.sqrt(tile["DIM"]),
        *strides, **tile, num_warps=warps(q.dtype, tile),
    )  # fmt: skip
