"""Gram matrix of the rows of a feature, G = X X^T, with one matrix product in backward: dX = (dG + dG^T) X.

Autograd of ``x @ x.T`` takes two products and adds two feature-sized results. Inputs in 16 bits are multiplied in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import Kernel
from .._op import custom_op


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill_forward(x, out) -> None:
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(out.dtype)
        torch.mm(wide, wide.T, out=out)


def _fill_backward(grad, x, grad_x) -> None:
    with torch.autocast(x.device.type, enabled=False):
        grad_x.copy_((grad + grad.T) @ x.to(grad.dtype))


# Matrix products are the vendor's on every device: there is nothing to add to them.
forward = Kernel("gram", reference=_fill_forward, cpp=False)
backward = Kernel("gram_backward", reference=_fill_backward, cpp=False)


@custom_op("gram")
def _op(x: Tensor) -> Tensor:
    out = torch.empty((x.shape[0], x.shape[0]), dtype=_wide(x.dtype), device=x.device)
    forward(x, out)
    return out


@_op.register_fake
def _(x):
    return torch.empty((x.shape[0], x.shape[0]), dtype=_wide(x.dtype), device=x.device)


@custom_op("gram_backward")
def _op_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    backward(grad, x, grad_x)
    return grad_x


@_op_backward.register_fake
def _(grad, x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_op.register_autograd(lambda ctx, grad: _op_backward(grad, *ctx.saved_tensors), setup_context=_setup_context)


def gram(x: Tensor) -> Tensor:
    """[N, D] -> [N, N] inner products of the rows, float32 (float64 for float64)."""
    return _op(x)
