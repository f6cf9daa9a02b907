"""8-bit inference of a frozen vision transformer: int8 on CPUs, float8 on GPUs.

The four products of a block (qkv, proj, fc1, fc2) take 8-bit weights, quantised once with a scale per output channel,
and activations that are quantised per token on the way. LayerNorm, attention, GELU and the residual stream stay as they
are. So does the first block: in trained models it alone costs int8 about as much precision as all others together,
since its error runs through all of them (``benchmarks/teacher_precision.py`` measures it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.ops.blocks import linear_fp8, linear_int8
from fastkd.ops.blocks.linear_fp8 import pack_fp8
from fastkd.ops.blocks.linear_int8 import pack_int8

from .vit import VisionTransformer

PRECISIONS = ("exact", "int8", "fp8")
EXACT_BLOCKS = 1  # at the beginning


class QuantizedLinear(nn.Module):
    """A linear layer with 8-bit weights, for inference. Casts of the model leave its weights and scales alone.

    Args:
        linear: the layer whose weights are quantised; they are best in float32 still.
        precision: ``"int8"`` or ``"fp8"``.
        gelu: take GELU of the result.
    """

    def __init__(self, linear: nn.Linear, precision: str, *, gelu: bool = False) -> None:
        super().__init__()
        self.precision, self.gelu = precision, gelu
        codes, scale = (pack_int8 if precision == "int8" else pack_fp8)(linear.weight)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias if bias is None or precision == "fp8" else bias.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        fixed = {"scale": self.scale} | ({"bias": self.bias} if self.precision == "int8" else {})
        super()._apply(fn, recurse)
        for name, value in fixed.items():
            if value is not None:  # moved, not cast
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        if self.precision == "int8":
            return ops.linear_int8(x, self.codes, self.scale, self.bias, self.gelu)
        result = ops.linear_fp8(x, self.codes, self.scale, self.bias)
        return ops.gelu(result) if self.gelu else result

    def extra_repr(self) -> str:
        return f"{self.precision}, out={self.scale.shape[0]}"


def quantize_vit(vit: VisionTransformer, precision: str, *, exact_blocks: int = EXACT_BLOCKS) -> VisionTransformer:
    """Replaces the linear layers of the blocks, in place, and returns `vit`.

    Args:
        vit: a frozen model; `weight` of the replaced layers is gone afterwards.
        precision: ``"exact"`` (changes nothing), ``"int8"`` or ``"fp8"``.
        exact_blocks: number of blocks at the beginning that stay as they are; a model that has no more than these is
            quantised whole.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision == "exact":
        return vit
    for block in vit.blocks[exact_blocks if exact_blocks < vit.depth else 0 :]:
        attention, mlp = block.attn, block.mlp
        attention.qkv = QuantizedLinear(attention.qkv, precision)
        attention.proj = QuantizedLinear(attention.proj, precision)
        block.mlp = nn.Sequential(QuantizedLinear(mlp.fc1, precision, gelu=True), QuantizedLinear(mlp.fc2, precision))
    return vit


def why_not_fast(precision: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why 8-bit products on activations of this dtype would only be emulated, slower than exact ones; None if not."""
    if precision == "fp8":
        return linear_fp8.why_emulated(device, dtype)
    if precision == "int8":
        if device.type != "cpu":
            return f"int8 products are written for CPUs, got {device.type}"
        return linear_int8.kernel.why_not("cpp", "cpu", dtype)
    return None
