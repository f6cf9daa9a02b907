"""Residual addition and LayerNorm in one pass (Ba et al. 2016).

    total  = x + delta                       (delta may be absent)
    normed = (total - mean) / sqrt(var + eps) * weight + bias         mean and biased variance per row

`total` keeps the dtype of the residual stream x, `normed` comes in the compute dtype that the next matrix product
wants: the casts around LayerNorm under autocast disappear. Backward, with h = (total - mean) r and y = g * weight:

    d total = grad_total + r (y - mean_D(y) - h mean_D(y h))      d x = d delta = d total
    d weight = sum_rows g h,  d bias = sum_rows g
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "residual_layer_norm"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill_forward(x, delta, weight, bias, eps, total, stats, normed) -> None:
    rows = x if delta is None else x + delta
    if delta is not None:
        total.copy_(rows)
    wide = rows.to(_wide(x.dtype))
    mean = wide.mean(-1, keepdim=True)
    scale = (wide.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
    stats.copy_(torch.cat([mean, scale], -1))
    normed.copy_((wide - mean) * scale * weight + bias)


def _fill_backward(grad_total, grad_normed, total, weight, stats, grad_weight, grad_bias, grad_delta, grad_x) -> None:
    wide = _wide(total.dtype)
    g, mean, scale = grad_normed.to(wide), stats[..., :1], stats[..., 1:]
    h = (total.to(wide) - mean) * scale
    y = g * weight
    gradient = scale * (y - y.mean(-1, keepdim=True) - h * (y * h).mean(-1, keepdim=True))
    if grad_total is not None:
        gradient = gradient + grad_total
    grad_x.copy_(gradient)
    if grad_delta is not None:
        grad_delta.copy_(gradient)
    grad_weight.copy_((g * h).sum((0, 1)))
    grad_bias.copy_(g.sum((0, 1)))


_TRITON = "fastkd.ops.blocks.residual_layer_norm_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@custom_op("residual_layer_norm")
def _op(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed, stats = _outputs(x, delta, dtype)
    delta = None if delta is None else _contiguous_rows(delta)
    forward(_contiguous_rows(x), delta, weight.contiguous(), bias.contiguous(), eps, total, stats, normed)
    return total, normed, stats


def _outputs(x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty((0,) if delta is None else x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((*x.shape[:-1], 2), dtype=_wide(x.dtype), device=x.device)
    return total, torch.empty(x.shape, dtype=dtype, device=x.device), stats


@_op.register_fake
def _(x, delta, weight, bias, eps, dtype):
    return _outputs(x, delta, dtype)


@custom_op("residual_layer_norm_backward")
def _op_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, stats: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, grad_delta, grad_weight, grad_bias = _gradients(total, weight, delta_dtype)
    apart = delta_dtype not in (None, total.dtype)
    grad_total = None if grad_total is None else _contiguous_rows(grad_total)
    backward(
        grad_total, _contiguous_rows(grad_normed), _contiguous_rows(total), weight.contiguous(), stats,
        grad_weight, grad_bias, grad_delta if apart else None, grad_x,
    )  # fmt: skip
    return grad_x, grad_delta, grad_weight, grad_bias


def _gradients(total: Tensor, weight: Tensor, delta_dtype: torch.dtype | None):
    # A gradient for delta of its own only where its dtype differs from that of x.
    shape = total.shape if delta_dtype not in (None, total.dtype) else (0,)
    grad_delta = torch.empty(shape, dtype=delta_dtype or total.dtype, device=total.device)
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=total.device)
    return grad_x, grad_delta, grad_weight, torch.empty_like(grad_weight)


@_op_backward.register_fake
def _(grad_total, grad_normed, total, weight, stats, delta_dtype):
    return _gradients(total, weight, delta_dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, delta, weight, _bias, _eps, _dtype = inputs
    total, _normed, stats = output
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.save_for_backward(x if delta is None else total, weight, stats)
    ctx.mark_non_differentiable(*([stats, total] if delta is None else [stats]))


def _autograd(ctx, grad_total: Tensor, grad_normed: Tensor, _grad_stats):
    total, weight, stats = ctx.saved_tensors
    if ctx.delta_dtype is None:
        grad_total = None
    if grad_normed is None:  # nothing was made of it
        grad_normed = torch.zeros_like(total)
    grad_x, grad_delta, grad_weight, grad_bias = _op_backward(
        grad_total, grad_normed, total, weight, stats, ctx.delta_dtype
    )
    if ctx.delta_dtype is None:
        grad_delta = None
    elif ctx.delta_dtype == total.dtype:
        grad_delta = grad_x
    return grad_x, grad_delta, grad_weight, grad_bias, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def residual_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + delta over the last dimension.

    Args:
        x: [B, T, D] residual stream.
        delta: [B, T, D] what is added to it, any floating dtype, or None.
        weight, bias: [D]; computed with in float32 (float64).
        eps: added to the variance.
        dtype: dtype of the normalised result; default: the autocast dtype where autocast is on, else that of weight.

    Returns:
        (x + delta [B, T, D] in the dtype of x, normalised [B, T, D]).
    """
    _check.check_tensor(OP, "x", x, 3)
    if delta is not None:
        _check.check_tensor(OP, "delta", delta, 3)
        _check.check_shape(OP, "delta", delta, tuple(x.shape), "like x")
    for name, value in (("weight", weight), ("bias", bias)):
        _check.check_tensor(OP, name, value, 1)
        _check.check_shape(OP, name, value, (x.shape[-1],), "(D,)")
    if dtype is None:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wide = _wide(x.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    total, normed, _ = _op(x, delta, weight, bias, eps, dtype)
    return (x if delta is None else total), normed


def _reference(x, delta, weight, bias, eps=1e-6, dtype=None):
    total = x if delta is None else x + delta.to(x.dtype)
    wide = _wide(x.dtype)
    normed = F.layer_norm(total.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps)
    return total, normed.to(dtype or weight.dtype)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    shape = (case["batch"], case["tokens"] + 1, case["dim"])
    x, delta = (torch.randn(shape, generator=random) + 0.5 for _ in range(2))
    weight, bias = (torch.randn(case["dim"], generator=random) for _ in range(2))
    first = 1 if case.get("strided") else 0
    x, delta = x[:, first : first + case["tokens"]], delta[:, first : first + case["tokens"]]
    mixed = case.get("mixed") and dtype != torch.float64
    wide = _wide(dtype)
    return dict(
        x=x.to(device, wide if mixed else dtype), delta=delta.to(device, dtype) if case.get("delta", True) else None,
        weight=weight.to(device, wide), bias=bias.to(device, wide), dtype=dtype,
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """Rows of the result have mean bias and are unchanged by a shift of x."""
    plain = residual_layer_norm(**kwargs)[1].double()
    moved = residual_layer_norm(**{**kwargs, "x": (kwargs["x"].float() + 1.0).to(kwargs["x"].dtype)})[1].double()
    if kwargs["x"].dtype == torch.float32 and kwargs["x"].shape[-1] > 1:
        spread = kwargs["x"].double().std(-1).min().clamp_min(1e-3)
        assert (plain - moved).abs().max() < 1e-3 / spread


SPEC = register(
    OpSpec(
        name=OP,
        function=residual_layer_norm,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("x", "delta", "weight", "bias"),
        cases={
            "residual": dict(batch=2, tokens=9, dim=48),
            "mixed": dict(batch=2, tokens=7, dim=64, mixed=True),
            "no_delta": dict(batch=2, tokens=5, dim=32, delta=False),
            "odd": dict(batch=3, tokens=1, dim=37, strided=True),
            "wide": dict(batch=1, tokens=3, dim=2100, mixed=True),
            "many_rows": dict(batch=5, tokens=67, dim=16, strided=True, mixed=True),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 8, 33), dim=(2, 16, 31, 100), delta=(False, True), mixed=(False, True),
            strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "decoder": dict(batch=16, tokens=197, dim=512, mixed=True),
            "encoder": dict(batch=128, tokens=50, dim=768, mixed=True),
            "encoder_90": dict(batch=128, tokens=20, dim=1024, mixed=True),
        },
        bytes_moved=lambda k: 5 * tensor_bytes(k["x"]) + 4 * tensor_bytes(k["delta"]),
        flops=lambda k: 24 * k["x"].numel(),
        law=_law,
    )
)  # fmt: skip
