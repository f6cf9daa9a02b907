"""nn.Linear's function with a bias gradient that does not stall the step.

    y = x W^T + b        dx = g W,  dW = g^T x,  db = sum_rows g

The products are the vendor library's. On the CPU torch sums 16-bit rows several times slower than memory allows;
`column_sum` reads them once, in float32 (float64), in an order that does not depend on the number of threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "column_sum"


def _fill(x: Tensor, out: Tensor) -> None:
    out.copy_(x.to(out.dtype).sum(0))


kernel = Kernel(OP, reference=_fill)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastkd::column_sum", mutates_args=())
def _op(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[1], dtype=_wide(x.dtype), device=x.device)
    kernel(x if x.stride(1) == 1 else x.contiguous(), out)
    return out


@_op.register_fake
def _(x):
    return torch.empty(x.shape[1], dtype=_wide(x.dtype), device=x.device)


def column_sum(x: Tensor) -> Tensor:
    """Sum over the rows of x [N, D] -> [D] in float32 (float64); not differentiable."""
    _check.check_tensor(OP, "x", x, 2)
    return torch.ops.fastkd.column_sum(x.detach())


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    # dW = g^T x. oneDNN's 16-bit product runs 1.4 to 1.6 times faster on a dense g^T; where g is the narrower operand
    # its copy costs far less than that gains.
    transposed = grad.t()
    if grad.element_size() == 2 and x.shape[1] >= 2 * grad.shape[1]:
        transposed = transposed.contiguous()
    return transposed @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad @ weight if needs_x else None
        grad_weight = _outer(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None
        grad_bias = column_sum(rows).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, under autocast too: x [..., in], weight [out, in], bias [out] -> [..., out].

    The bias may stay in float32 beside a 16-bit weight. On CUDA tensors this is torch's own function.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _Linear.apply(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    x = torch.rand(case["batch"], case["dim"] + 1, generator=random).to(device, dtype)
    return dict(x=x[:, 1:] if case.get("strided") else x[:, 1:].contiguous())


SPEC = register(
    OpSpec(
        name=OP,
        function=column_sum,
        reference=lambda x: x.to(_wide(x.dtype)).sum(0),
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "plain": dict(batch=100, dim=48),
            "odd": dict(batch=37, dim=19, strided=True),
            "one_row": dict(batch=1, dim=8),
        },
        space=dict(batch=(1, 31, 32, 33, 200), dim=(1, 16, 45), strided=(False, True), seed=tuple(range(5))),
        bench={"decoder_mlp": dict(batch=16 * 197, dim=2048)},
        bytes_moved=lambda k: tensor_bytes(k["x"]),
        flops=lambda k: k["x"].numel(),
    )
)
