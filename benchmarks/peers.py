"""What others offer for the same op, where it is installed: SDPA, FlexAttention, xformers, Liger-Kernel."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("sdpa", "flex", "xformers", "liger")


def of(op: str, device: str) -> dict[str, Callable]:
    """Peers of an op that can run on this device, by name; each takes the op's arguments."""
    on_gpu, found = device == "cuda", {}
    if op == "attention":
        found["sdpa"] = sdpa
        if on_gpu:  # on a CPU it has no backward
            found["flex"] = flex
        if on_gpu and installed("xformers"):
            found["xformers"] = xformers
    if op == "residual_layer_norm" and on_gpu and installed("liger_kernel"):
        found["liger"] = liger_layer_norm
    return found


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def heads(packed: Tensor, num_heads: int, query: Tensor | None) -> list[Tensor]:
    """q, k, v as [B, T, heads, d] views."""
    parts = packed.chunk(3, -1) if query is None else (query, *packed.chunk(2, -1))
    return [t.unflatten(-1, (num_heads, -1)) for t in parts]


def sdpa(packed: Tensor, num_heads: int, query: Tensor | None = None) -> Tensor:
    """torch's own attention on the packed projection."""
    q, k, v = (t.transpose(1, 2) for t in heads(packed, num_heads, query))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(packed: Tensor, num_heads: int, query: Tensor | None = None) -> Tensor:
    """FlexAttention, which must be compiled."""
    q, k, v = (t.transpose(1, 2) for t in heads(packed, num_heads, query))
    return _compiled_flex()(q, k, v).transpose(1, 2).flatten(2)


def xformers(packed: Tensor, num_heads: int, query: Tensor | None = None) -> Tensor:
    """xformers' memory-efficient attention."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*heads(packed, num_heads, query)).flatten(2)


def liger_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition in PyTorch, then Liger-Kernel's LayerNorm."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    total = x if delta is None else x + delta.to(x.dtype)
    return total, LigerLayerNormFunction.apply(total, weight, bias, eps).to(dtype or weight.dtype)
