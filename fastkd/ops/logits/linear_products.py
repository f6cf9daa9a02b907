"""The three products of a linear head, with results and sums in float32 (float64) whatever the operands are.

    z = x W^T        dx = g W        dW += g^T x

Rounding logits to 16 bits before a softmax costs percents of its gradient, so z leaves the accumulators in float32:
cuBLAS and our AMX tiles do that. Where nothing does (16-bit operands on other CPUs) the operands are widened once. g is
rounded to the dtype of x for its two products, which costs a thousandth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import linear as _linear


class Products:
    """Products with one weight [V, H], for chunks of rows x [n, H].

    Args:
        x: gives dtype and device of the rows.
        weight: [V, H], any floating dtype.
        native: use the C++ kernels of the CPU where they can.
    """

    def __init__(self, x: Tensor, weight: Tensor, native: bool) -> None:
        self.tiles = native and not x.is_cuda and _linear.has_own_product(x.dtype, weight)
        wide = _linear.wide_dtype(x.dtype)
        self.dtype = x.dtype if x.is_cuda or self.tiles else wide
        weight = _linear.as_rows(weight)
        self.weight = weight if self.tiles else weight.to(self.dtype)
        self.wide = wide

    def logits(self, x: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
        """out [n, V] = scale (x W^T + bias), wide."""
        if self.tiles:
            torch.ops.fastkd_cpu.linear_wide(x, self.weight, bias, scale, out)
            return
        _product(x.to(self.dtype), self.weight.t(), out)
        if bias is not None:
            out.add_(bias)
        if scale != 1:
            out.mul_(scale)

    def grad_input(self, grad: Tensor, out: Tensor) -> None:
        """out [n, H] = grad W, wide."""
        if self.tiles:
            torch.ops.fastkd_cpu.linear_wide_grad_input(grad, self.weight, out)
        else:
            _product(grad.to(self.dtype), self.weight, out)

    def grad_weight(self, grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
        """out [V, H] += grad^T x, wide; out = grad^T x for the first chunk."""
        if self.tiles:
            torch.ops.fastkd_cpu.linear_wide_grad_weight(grad, x, first, out)
            return
        grad, x = grad.to(self.dtype).t(), x.to(self.dtype)
        if first:
            _product(grad, x, out)
        elif self.dtype == out.dtype:
            torch.addmm(out, grad, x, out=out)
        else:
            out.add_(_product(grad, x, torch.empty_like(out)))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
