"""nn.Linear's function without casts of its weights (mixed precision as in Micikevicius et al. 2018).

    y = x W^T + b        dx = g W,  dW = g^T x,  db = sum_rows g

Parameters may stay in float32 beside 16-bit x. On CPUs with AMX the bfloat16 products are our own: float32 weights are
rounded as they are packed, transposed operands cost nothing extra, and the gradients of the parameters leave the
float32 accumulators as they are. Elsewhere the products are the vendor library's: forward rounds the weights once and
keeps them for backward, cuBLAS writes the gradients of float32 weights in float32 (cuBLASLt adds the bias), and the sum
over rows, which torch computes several times slower than memory allows in 16 bit, is ours.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "linear"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# x [N, in], weight [out, in], bias [out] or None, grad [N, out]; gradients of parameters in float32 (float64).


def _fill_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    weight = weight.to(x.dtype).t()
    if bias is None:
        torch.mm(x, weight, out=out)
    elif x.is_cuda or x.element_size() == 2:
        torch.addmm(bias.to(x.dtype), x, weight, out=out)  # rounded once
    else:
        torch.mm(x, weight, out=out).add_(bias)  # on the CPU addmm would first write the bias over the whole output


def _fill_grad_input(grad: Tensor, weight: Tensor, grad_x: Tensor) -> None:
    torch.mm(grad, weight.to(grad.dtype), out=grad_x)


def _fill_grad_weight(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None) -> None:
    outer(grad, x, grad_weight)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0, dtype=grad_bias.dtype))


def outer(grad: Tensor, x: Tensor, grad_weight: Tensor) -> None:
    if grad_weight.dtype == x.dtype:
        torch.mm(grad.t(), x, out=grad_weight)
    elif x.is_cuda:
        torch.ops.aten.mm.dtype_out(grad.t(), x, grad_weight.dtype, out=grad_weight)  # accumulators as they are
    else:
        grad_weight.copy_(grad.t() @ x)


@functools.cache
def _has_amx() -> bool:
    return torch.ops.fastkd_cpu.has_amx()


def has_own_product(dtype: torch.dtype, weight: Tensor | None = None) -> bool:
    return dtype == torch.bfloat16 and _has_amx() and (weight is None or weight.dtype in (dtype, torch.float32))


def _cpp_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if has_own_product(x.dtype, weight):
        torch.ops.fastkd_cpu.linear(x, weight, None if bias is None else bias.float(), out)
    else:
        _fill_forward(x, weight, bias, out)


def _cpp_grad_input(grad: Tensor, weight: Tensor, grad_x: Tensor) -> None:
    if has_own_product(grad.dtype, weight):
        torch.ops.fastkd_cpu.linear_grad_input(grad, weight, grad_x)
    else:
        _fill_grad_input(grad, weight, grad_x)


def _cpp_grad_weight(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None) -> None:
    if has_own_product(grad.dtype):
        torch.ops.fastkd_cpu.linear_grad_weight(grad, x, grad_weight, grad_bias)
        return
    outer(grad, x, grad_weight)
    if grad_bias is not None:
        torch.ops.fastkd_cpu.column_sum(grad, grad_bias)


# Beside Triton's sums the products are the vendor library's, as in the reference.
_PRODUCTS, _TRITON = "fastkd.ops.blocks.linear", "fastkd.ops.blocks.linear_triton"
forward = Kernel(OP, reference=_fill_forward, cpp=_cpp_forward, triton=f"{_PRODUCTS}:_fill_forward")
grad_input = Kernel(
    f"{OP}_grad_input", reference=_fill_grad_input, cpp=_cpp_grad_input, triton=f"{_PRODUCTS}:_fill_grad_input"
)
grad_weight = Kernel(
    f"{OP}_grad_weight", reference=_fill_grad_weight, cpp=_cpp_grad_weight, triton=f"{_TRITON}:grad_weight"
)


def as_rows(t: Tensor) -> Tensor:
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@custom_op("linear")
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor | None) -> Tensor:
    # `rounded`: the values of weight in the dtype of x, where the caller has them; the gradient goes to weight.
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    forward(as_rows(x), as_rows(weight if rounded is None else rounded), bias, out.view(-1, weight.shape[0]))
    return out


@_op.register_fake
def _(x, weight, bias, rounded):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def empty_gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of x, weight and bias, of no elements where they are not needed."""
    wide, device = wide_dtype(x.dtype), x.device
    return (
        torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=device),
        torch.empty(weight.shape if needs[1] else (0,), dtype=wide, device=device),
        torch.empty(weight.shape[:1] if needs[2] else (0,), dtype=wide, device=device),
    )


@custom_op("linear_backward")
def _op_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, weight_gradient, bias_gradient = gradients = empty_gradients(x, weight, needs)
    rows = as_rows(grad)
    if needs[0]:
        grad_input(rows, as_rows(weight), grad_x.view(-1, x.shape[-1]))
    if needs[1]:
        grad_weight(rows, as_rows(x), weight_gradient, bias_gradient if needs[2] else None)
    elif needs[2]:
        torch.sum(rows, 0, dtype=bias_gradient.dtype, out=bias_gradient)
    return gradients


@_op_backward.register_fake
def _(grad, x, weight, needs):
    return empty_gradients(x, weight, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, rounded = inputs
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight if rounded is None else rounded)


def _autograd(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_x, weight_gradient, bias_gradient = _op_backward(grad, x, weight, needs)
    return (
        grad_x if needs[0] else None,
        weight_gradient.to(ctx.weight_dtype) if needs[1] else None,
        bias_gradient.to(ctx.bias_dtype) if needs[2] else None,
        None,
    )


_op.register_autograd(_autograd, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, under autocast too, with parameters that may stay in float32 beside 16-bit x.

    Args:
        x: [..., in] floating; under autocast it is cast to the autocast dtype.
        weight: [out, in] in the dtype of x or float32.
        bias: [out] likewise, or None.

    Returns:
        [..., out] in the dtype of x (the autocast dtype). Products are summed in float32 (float64).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: weight or bias in a dtype that is neither that of x nor float32.
    """
    x = under_autocast(OP, x)
    check_parameters(OP, x, x.shape[-1], weight=weight, bias=bias)
    return _op(x, weight, bias, rounded(weight, x))


def under_autocast(op: str, x: Tensor) -> Tensor:
    """x [..., in] as the op computes with it: in the autocast dtype where autocast is on."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        _check.fail(op, "x", type(x).__name__, "a tensor [..., in]", error=TypeError)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    _check.check_tensor(op, "x", x, x.ndim)
    return x


def check_parameters(op: str, x: Tensor, features: int, **parameters: Tensor | None) -> None:
    """Checks a weight [out, features] and a bias [out] or None, given by name in this order."""
    # float64 parameters of a 16-bit or float32 product only under autocast, which rounds them.
    allowed = (x.dtype, torch.float32) if x.dtype != torch.float64 else (x.dtype,)
    (weight_name, weight), (bias_name, bias) = parameters.items()
    _check.check_tensor(op, weight_name, weight, 2, allowed)
    _check.check_shape(op, weight_name, weight, (weight.shape[0], features), "(out, in)")
    if bias is not None:
        _check.check_tensor(op, bias_name, bias, 1, allowed)
        _check.check_shape(op, bias_name, bias, (weight.shape[0],), "(out,)")


def by_vendor(x: Tensor) -> bool:
    """Whether a vendor library alone multiplies x; CPU kernels round weights as they read them."""
    return x.device.type != "cpu"


def rounded(weight: Tensor, x: Tensor) -> Tensor | None:
    """The weight as the vendor library's products with x read it, made once for forward and backward, or None."""
    return weight.detach().to(x.dtype) if weight.dtype != x.dtype and by_vendor(x) else None


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, dim, out, skip = case["batch"], case["dim"], case["out"], 1 if case.get("strided") else 0
    x = torch.randn(batch, case.get("tokens", 3) + skip, dim, generator=random)[:, skip:]
    weight = torch.randn(out, dim + skip, generator=random)[:, skip:] / dim**0.5
    bias = torch.randn(out, generator=random)
    parameters = wide_dtype(dtype) if case.get("mixed") else dtype
    return dict(
        x=x.to(device, dtype), weight=weight.to(device, parameters),
        bias=bias.to(device, parameters) if case.get("bias", True) else None,
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """Zero rows give the bias."""
    out = linear(torch.zeros_like(kwargs["x"]), kwargs["weight"], kwargs["bias"])
    bias = torch.zeros(()) if kwargs["bias"] is None else kwargs["bias"].to(out.dtype)
    assert torch.equal(out, bias.expand_as(out))


def _output_bytes(kwargs: dict) -> int:
    return tensor_bytes(kwargs["x"]) // kwargs["x"].shape[-1] * kwargs["weight"].shape[0]


SPEC = register(
    OpSpec(
        name=OP,
        function=linear,
        reference=_reference,
        kernels=(forward, grad_input, grad_weight),
        build=_build,
        differentiable=("x", "weight", "bias"),
        cases={
            "plain": dict(batch=2, dim=64, out=96, tokens=20),
            "mixed": dict(batch=2, dim=48, out=40, tokens=33, mixed=True),
            "no_bias": dict(batch=2, dim=32, out=16, bias=False, mixed=True),
            "odd": dict(batch=3, dim=37, out=19, tokens=7, strided=True),
            "one_row": dict(batch=1, dim=5, out=3, tokens=1, mixed=True),
            "deep": dict(batch=2, dim=1100, out=200, tokens=100, mixed=True),
            "many_rows": dict(batch=3, dim=20, out=70, tokens=700, mixed=True),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 16, 33), dim=(1, 31, 32, 65), out=(1, 16, 17, 64), bias=(True, False),
            mixed=(True, False), strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "decoder_qkv": dict(batch=8, tokens=197, dim=512, out=1536, mixed=True),
            "decoder_fc2": dict(batch=8, tokens=197, dim=2048, out=512, mixed=True),
        },
        bytes_moved=lambda k: 3 * tensor_bytes(k["x"], k["weight"]) + 2 * _output_bytes(k),
        flops=lambda k: 6 * k["x"].numel() * k["weight"].shape[0],
        law=_law,
    )
)  # fmt: skip
