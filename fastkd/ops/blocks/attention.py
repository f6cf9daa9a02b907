"""Multi-head attention that reads q, k, v in place from the projection's output (Vaswani et al. 2017, section 3.2).

    out_h = softmax(q_h k_h^T / sqrt(d)) v_h           d = D / heads, heads side by side in the D channels

The packed projection [B, T, 3 D] (q, then k, then v, each split by heads) is read with its strides and the result
is written as [B, T, D], ready for the output projection: no transposes, no score tensor. With a separate `query`
the packed tensor is [B, T, 2 D] (k, then v). Backward recomputes the probabilities from the saved log-sum-exp and
writes one packed gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel, forced_backend
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "attention"


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, d] view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _probabilities(query: Tensor, key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    q, k = (_heads(t.to(_wide(t.dtype)), num_heads) for t in (query, key))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return scores.softmax(-1), lse


def _fill_forward(query: Tensor, key_value: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
    key, value = key_value.chunk(2, -1)
    probabilities, log_sum = _probabilities(query, key, num_heads)
    out.copy_((probabilities @ _heads(value.to(_wide(value.dtype)), num_heads)).transpose(1, 2).flatten(2))
    lse.copy_(log_sum)


def _fill_backward(
    grad_out: Tensor, query: Tensor, key_value: Tensor, lse: Tensor, num_heads: int,
    grad_query: Tensor, grad_key_value: Tensor,
) -> None:  # fmt: skip
    wide = _wide(query.dtype)
    key, value = key_value.chunk(2, -1)
    g, q, k, v = (_heads(t.to(wide), num_heads) for t in (grad_out, query, key, value))
    scale = 1 / math.sqrt(q.shape[-1])
    probabilities = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    grad_probabilities = g @ v.transpose(-1, -2)
    # Not g . out: the sum of the same terms cancels them exactly, and knows nothing of the rounding of out.
    delta = (probabilities * grad_probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - delta) * scale
    gradients = (grad_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ g)
    grad_query.copy_((grad_scores @ k).transpose(1, 2).flatten(2))
    grad_key_value.copy_(torch.cat([t.transpose(1, 2).flatten(2) for t in gradients], -1))


_TRITON = "fastkd.ops.blocks.attention_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward", cuda=True)
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward", cuda=True)


def _split(packed: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor]:
    """(query, key_value) views of the arguments."""
    if query is not None:
        return query, packed
    dim = packed.shape[-1] // 3
    return packed[..., :dim], packed[..., dim:]


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@custom_op("attention")
def _op(packed: Tensor, query: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    q, key_value = (_contiguous_rows(t) for t in _split(packed, query))
    out = torch.empty(q.shape, dtype=packed.dtype, device=packed.device)
    lse = torch.empty((q.shape[0], num_heads, q.shape[1]), dtype=_wide(packed.dtype), device=packed.device)
    forward(q, key_value, num_heads, out, lse)
    return out, lse


@_op.register_fake
def _(packed, query, num_heads):
    q, _ = _split(packed, query)
    lse = torch.empty((q.shape[0], num_heads, q.shape[1]), dtype=_wide(packed.dtype), device=packed.device)
    return torch.empty(q.shape, dtype=packed.dtype, device=packed.device), lse


@custom_op("attention_backward")
def _op_backward(
    grad_out: Tensor, packed: Tensor, query: Tensor | None, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    q, key_value = (_contiguous_rows(t) for t in _split(packed, query))
    grad_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    grad_query = torch.empty((0,) if query is None else query.shape, dtype=packed.dtype, device=packed.device)
    grad_q, grad_key_value = _split(grad_packed, None if query is None else grad_query)
    backward(_contiguous_rows(grad_out), q, key_value, lse, num_heads, grad_q, grad_key_value)
    return grad_packed, grad_query


@_op_backward.register_fake
def _(grad_out, packed, query, lse, num_heads):
    empty = packed.new_empty((0,) if query is None else query.shape)
    return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device), empty


def _setup_context(ctx, inputs, output) -> None:
    packed, query, ctx.num_heads = inputs
    ctx.save_for_backward(packed, query, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_out: Tensor, _grad_lse):
    packed, query, lse = ctx.saved_tensors
    grad_packed, grad_query = _op_backward(grad_out, packed, query, lse, ctx.num_heads)
    return grad_packed, None if query is None else grad_query, None


_op.register_autograd(_autograd, setup_context=_setup_context)


# Most keys on CUDA for which the automatic choice is ours rather than torch's: what one tile of our kernels holds.
SHORT = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16, torch.float64: 0}


def _torch_attention(packed: Tensor, num_heads: int, query: Tensor | None) -> Tensor:
    # One view, unbound: autograd then stacks the gradients into the packed one in a single pass, where slices would
    # each be added to a tensor of zeros.
    parts = packed.unflatten(-1, (3 if query is None else 2, num_heads, -1)).unbind(2)
    if query is not None:
        parts = (query.unflatten(-1, (num_heads, -1)), *parts)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in parts)).transpose(1, 2).flatten(2)


def attention(packed: Tensor, num_heads: int, query: Tensor | None = None) -> Tensor:
    """Softmax attention with scale 1 / sqrt(head width), on projections as nn.Linear leaves them.

    Args:
        packed: [B, T, 3 D] holding q, k and v, or [B, T, 2 D] holding k and v where `query` is given; any strides
            with contiguous channels.
        num_heads: heads H; D must be a multiple.
        query: optional [B, Tq, D].

    Returns:
        [B, T, D], or [B, Tq, D] with `query`, in the dtype of `packed`; scores and softmax in float32 (float64).

    On CUDA tensors of more than 64 keys (16 in float32) the automatic choice is torch's scaled_dot_product_attention.
    """
    _check.check_tensor(OP, "packed", packed, 3)
    parts = 3 if query is None else 2
    dim, rest = packed.shape[-1] // parts, packed.shape[-1] % parts
    if rest or dim % num_heads:
        _check.fail(OP, "packed", f"{packed.shape[-1]} channels", f"{parts} x a multiple of num_heads={num_heads}")
    if query is not None:
        _check.check_tensor(OP, "query", query, 3, (packed.dtype,))
        _check.check_shape(OP, "query", query, (packed.shape[0], query.shape[1], dim), "(B, Tq, D)")
    if packed.device.type != "cpu" and packed.shape[1] > SHORT[packed.dtype] and forced_backend() is None:
        return _torch_attention(packed, num_heads, query)
    return _op(packed, query, num_heads)[0]


def _reference(packed: Tensor, num_heads: int, query: Tensor | None = None) -> Tensor:
    q, key_value = _split(packed, query)
    key, value = key_value.chunk(2, -1)
    probabilities, _ = _probabilities(q, key, num_heads)
    out = probabilities.to(packed.dtype) @ _heads(value, num_heads)
    return out.transpose(1, 2).flatten(2)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    dim, parts = case["heads"] * case["head_dim"], 2 if case.get("queries") else 3
    packed = torch.randn(case["batch"], case["tokens"], parts * dim + 3, generator=random) * case.get("scale", 1.0)
    packed = packed[..., :-3] if case.get("strided") else packed[..., :-3].contiguous()
    query = None
    if case.get("queries"):
        query = torch.randn(case["batch"], case["queries"], dim, generator=random).to(device, dtype)
    return dict(packed=packed.to(device, dtype), num_heads=case["heads"], query=query)


def _law(kwargs: dict) -> None:
    """Values that are all one pass through: every row of probabilities sums to one."""
    packed, query = kwargs["packed"].clone(), kwargs["query"]
    dim = packed.shape[-1] // (3 if query is None else 2)
    packed[..., -dim:] = 1.0
    out = attention(packed, kwargs["num_heads"], query)
    assert torch.allclose(out.double(), torch.ones_like(out).double(), atol=2e-2)


def _pairs(kwargs: dict) -> tuple[int, int]:
    packed, query = kwargs["packed"], kwargs["query"]
    queries = packed.shape[1] if query is None else query.shape[1]
    return packed.shape[0] * queries * packed.shape[1], packed.shape[-1] // (3 if query is None else 2)


SPEC = register(
    OpSpec(
        name=OP,
        function=attention,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("packed", "query"),
        cases={
            "decoder": dict(batch=2, tokens=37, heads=2, head_dim=32),
            "encoder": dict(batch=2, tokens=10, heads=3, head_dim=64),
            "masked_queries": dict(batch=2, tokens=21, queries=16, heads=2, head_dim=32),
            "odd_head": dict(batch=1, tokens=19, heads=3, head_dim=5),
            "wide_head": dict(batch=1, tokens=33, heads=1, head_dim=80),
            "one_token": dict(batch=3, tokens=1, heads=2, head_dim=16),
            "long": dict(batch=1, tokens=197, heads=1, head_dim=32),
            "sharp": dict(batch=1, tokens=20, heads=2, head_dim=32, scale=12.0),
            "strided": dict(batch=2, tokens=9, heads=2, head_dim=16, strided=True),
            "few_tokens": dict(batch=2, tokens=4, heads=5, head_dim=16),
            "few_keys": dict(batch=1, tokens=6, queries=70, heads=3, head_dim=16),
            "few_queries": dict(batch=2, tokens=7, queries=2, heads=3, head_dim=24),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 2, 5, 16, 33, 65), queries=(None, 1, 17), heads=(1, 3), head_dim=(1, 8, 32, 64),
            scale=(0.1, 1.0, 4.0), strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "decoder_197": dict(batch=16, tokens=197, heads=16, head_dim=32),
            "encoder_50": dict(batch=16, tokens=50, heads=12, head_dim=64),
            "encoder_20": dict(batch=64, tokens=20, heads=12, head_dim=64),
            "encoder_4": dict(batch=256, tokens=4, heads=16, head_dim=64),
            "cross_10": dict(batch=16, tokens=10, queries=187, heads=16, head_dim=32),
        },
        bytes_moved=lambda k: 4 * tensor_bytes(k["packed"]) + 4 * tensor_bytes(k["query"]),
        flops=lambda k: 14 * math.prod(_pairs(k)),
        law=_law,
    )
)  # fmt: skip
