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
    if op == "linear_cross_entropy" and on_gpu and installed("liger_kernel"):
        found["liger"] = liger_linear_cross_entropy
    if op == "logit_loss" and on_gpu and installed("liger_kernel"):
        found["liger"] = liger_divergence
    if op == "linear_jsd" and installed("liger_kernel"):
        found["liger"] = liger_linear_jsd
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


def liger_linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Liger-Kernel's fused head and cross entropy, with float32 sums of the weight's gradient as ours has them."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, input, target, bias).float()


def liger_linear_jsd(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor, *,
    student_bias: Tensor | None = None, ce_weight: float = 0.0, beta: float = 0.5, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Liger-Kernel's chunked head and divergence; compiled, as it is by default, where that is on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = dict(beta=beta, temperature=temperature, compiled=student_input.is_cuda)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=ce_weight, weight_soft_loss=1.0, **options)
    return loss(student_input, student_weight, teacher_input, teacher_weight, target, student_bias).float()


def liger_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, kl: float = 0.0, jsd: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Liger-Kernel's divergences, which take the log-probabilities of both sides; without a target there is no ce."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits))
    square = temperature**2
    if kl:
        return kl * square * LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)
    return jsd * square * LigerJSD(beta=0.5)(log_q, log_p)
