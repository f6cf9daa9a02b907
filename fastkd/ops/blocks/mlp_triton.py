"""What `mlp` does on CUDA: cuBLAS multiplies, Triton does all that lies between in one pass each way.

Bytes per number of h in 16 bit: forward reads 2 (h) and writes 2 (its activation). Backward reads 4 (h and the gradient
of the activation) and writes 4: the gradient of h, and the activation again, so that forward need not keep it. The same
pass adds up the gradient of the bias, as partial sums that `sums_triton.reduce` adds in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gelu_triton, linear, sums_triton
from .gelu_triton import _gaussian, _slope


@triton.jit
def _hidden_backward_kernel(grad_activation, hidden, grad_hidden, activation, partial, rows, width, parts,
                            ACTIVATION: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
                            COLUMNS: tl.constexpr):  # fmt: skip
    # The row tiles p, p + parts, ... of a block of columns; partial[p] is what their gradients add up to.
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * ROWS, rows, parts * ROWS):
        row = start + tl.arange(0, ROWS)
        i = row[:, None].to(tl.int64) * width + d[None, :]
        inside = (row < rows)[:, None] & (d < width)[None, :]
        value = tl.load(hidden + i, mask=inside, other=0).to(tl.float32)
        grad = tl.load(grad_activation + i, mask=inside, other=0).to(tl.float32)
        phi, bell = _gaussian(value)
        if ACTIVATION:
            tl.store(activation + i, (value * phi).to(activation.dtype.element_ty), mask=inside)
        # What is summed is what the matrix products after this one read: the rounded gradient.
        grad = (grad * _slope(value, phi, bell)).to(grad_hidden.dtype.element_ty)
        tl.store(grad_hidden + i, grad, mask=inside)
        if SUMS:
            sums += grad.to(tl.float32)
    if SUMS:
        tl.store(partial + part.to(tl.int64) * width + d, tl.sum(sums, axis=0), mask=d < width)


def hidden_forward(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, activation: Tensor) -> None:
    """Fills hidden [N, F] where it is given, and activation [N, F]."""
    hidden = activation if hidden is None else hidden
    linear.forward.reference(x, weight, bias, hidden)
    gelu_triton.forward(hidden, activation)


def hidden_backward(grad, weight, hidden, activation, grad_bias, grad_hidden: Tensor) -> None:
    """Fills grad_hidden [N, F], and activation [N, F] and grad_bias [F] where they are given."""
    linear.grad_input.reference(grad, weight, grad_hidden)  # the gradient of the activation, replaced in place
    (rows, width), columns = hidden.shape, sums_triton.COLUMNS
    parts = sums_triton.parts_of(rows, width)
    partial = grad_hidden
    if grad_bias is not None:
        partial = torch.empty(parts, width, dtype=torch.float32, device=hidden.device)
    _hidden_backward_kernel[(triton.cdiv(width, columns), parts)](
        grad_hidden, hidden, grad_hidden, grad_hidden if activation is None else activation, partial, rows, width,
        parts, ACTIVATION=activation is not None, SUMS=grad_bias is not None, ROWS=16, COLUMNS=columns,
        num_warps=4,  # 16 numbers a thread
        enable_fp_fusion=True,
    )  # fmt: skip
    if grad_bias is not None:
        sums_triton.reduce(partial, grad_bias)
