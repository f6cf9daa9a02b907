"""The gradients of a linear layer's parameters on CUDA: cuBLAS for the product, Triton for the sum over rows.

The sum reads the [N, out] gradient once, 2 bytes a number in 16 bit.
"""

from __future__ import annotations

from torch import Tensor

from . import sums_triton
from .linear import outer


def grad_weight(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None) -> None:
    """Fills grad_weight [out, in] and grad_bias [out]; grad [N, out] and x [N, in] have unit stride in their rows."""
    outer(grad, x, grad_weight)
    if grad_bias is not None:
        sums_triton.column_sum(grad, grad_bias)
