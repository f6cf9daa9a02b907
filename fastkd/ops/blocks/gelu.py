"""Exact GELU, x Phi(x) with the Gaussian distribution function (Hendrycks and Gimpel 2016), not the tanh form.

    d gelu / dx = Phi(x) + x phi(x)

The native kernels compute erf and phi from one exponential, and convert 16-bit data in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "gelu"


def _fill_forward(x: Tensor, out: Tensor) -> None:
    out.copy_(F.gelu(x))


def _fill_backward(grad_out: Tensor, x: Tensor, grad_x: Tensor) -> None:
    grad_x.copy_(torch.ops.aten.gelu_backward(grad_out, x))


_TRITON = "fastkd.ops.blocks.gelu_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


@custom_op("gelu")
def _op(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x.contiguous(), out)
    return out


@_op.register_fake
def _(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("gelu_backward")
def _op_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    backward(grad_out.contiguous(), x.contiguous(), grad_x)
    return grad_x


@_op_backward.register_fake
def _(grad_out, x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad_out: Tensor) -> Tensor:
    return _op_backward(grad_out, *ctx.saved_tensors)


_op.register_autograd(_autograd, setup_context=_setup_context)


def gelu(x: Tensor) -> Tensor:
    """Exact (erf) GELU of a floating tensor of any shape, computed in float32 (float64), result like x."""
    if not isinstance(x, Tensor) or x.dtype not in _check.FLOATS:
        _check.fail(OP, "x", getattr(x, "dtype", type(x).__name__), "a floating tensor", error=TypeError)
    return _op(x)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    x = torch.randn(case["batch"], case["dim"], generator=random) * case.get("scale", 2.0)
    x = x.t().contiguous().t() if case.get("strided") else x
    return dict(x=x.to(device, dtype))


def _law(kwargs: dict) -> None:
    """gelu(x) - gelu(-x) = x."""
    x = kwargs["x"]
    difference = gelu(x).double() - gelu(-x).double() - x.double()
    assert difference.abs().max() <= 2e-2 * x.double().abs().max().clamp_min(1.0)


SPEC = register(
    OpSpec(
        name=OP,
        function=gelu,
        reference=lambda x: F.gelu(x),
        kernels=(forward, backward),
        build=_build,
        differentiable=("x",),
        cases={
            "plain": dict(batch=7, dim=64),
            "odd": dict(batch=3, dim=37),
            "wide_range": dict(batch=4, dim=50, scale=20.0),
            "strided": dict(batch=5, dim=16, strided=True),
        },
        space=dict(batch=(1, 5), dim=(1, 16, 33), scale=(0.01, 1.0, 30.0), strided=(False, True), seed=tuple(range(5))),
        bench={"decoder": dict(batch=16 * 197, dim=2048)},
        bytes_moved=lambda k: 5 * tensor_bytes(k["x"]),
        flops=lambda k: 40 * k["x"].numel(),
        law=_law,
    )
)
