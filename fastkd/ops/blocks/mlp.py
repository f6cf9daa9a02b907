"""The MLP of a transformer block with exact GELU as one op (Vaswani et al. 2017, section 3.3; GELU as in ViT).

    h = x W1^T + b1        a = gelu(h)        y = a W2^T + b2

    dh = (g W2) gelu'(h),  dx = dh W1,  dW1 = dh^T x,  dW2 = g^T a,  db1 = sum_rows dh,  db2 = sum_rows g

h and a are four times as wide as x, so passes over them are most of what lies between the products. As one op, GELU
and its derivative belong to the products: on CPUs with AMX they are taken of blocks in cache while the next block is
multiplied, and the gradient of a is never written. On CUDA the products are cuBLAS's with one pass between them: a is
not kept but made again by the pass that turns its gradient into that of h, which also adds up db1. Without gradients h
is not kept either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import gelu as _gelu
from . import linear as _linear

OP = "mlp"


# x [N, in], weight [hidden, in], bias [hidden] or None -> activation [N, hidden], and its argument where wanted.


def _fill_hidden(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, activation: Tensor) -> None:
    hidden = torch.empty_like(activation) if hidden is None else hidden
    _linear.forward.reference(x, weight, bias, hidden)
    _gelu.forward.reference(hidden, activation)


# grad of the output [N, out], weight2 [out, hidden], h -> grad of h, and where wanted gelu(h) and grad_bias1 [hidden].


def _fill_hidden_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, activation: Tensor | None, grad_bias: Tensor | None,
    grad_hidden: Tensor,
) -> None:  # fmt: skip
    grad_activation = torch.empty_like(hidden)
    _linear.grad_input.reference(grad, weight, grad_activation)
    _gelu.backward.reference(grad_activation, hidden, grad_hidden)
    if activation is not None:
        _gelu.forward.reference(hidden, activation)
    if grad_bias is not None:
        torch.sum(grad_hidden, 0, dtype=grad_bias.dtype, out=grad_bias)


def _cpp_hidden(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, activation: Tensor) -> None:
    if _linear.has_own_product(x.dtype, weight):
        torch.ops.fastkd_cpu.mlp_hidden(x, weight, None if bias is None else bias.float(), hidden, activation)
        return
    hidden = activation if hidden is None else hidden
    _linear.forward.reference(x, weight, bias, hidden)
    torch.ops.fastkd_cpu.gelu(hidden, activation)


def _cpp_hidden_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, activation: Tensor | None, grad_bias: Tensor | None,
    grad_hidden: Tensor,
) -> None:  # fmt: skip
    if activation is not None or grad_bias is not None:  # not what `mlp` asks of a CPU
        _fill_hidden_backward(grad, weight, hidden, activation, grad_bias, grad_hidden)
        return
    if _linear.has_own_product(grad.dtype, weight):
        torch.ops.fastkd_cpu.mlp_hidden_backward(grad, weight, hidden, grad_hidden)
        return
    _linear.grad_input.reference(grad, weight, grad_hidden)
    torch.ops.fastkd_cpu.gelu_backward(grad_hidden, hidden, grad_hidden)


_TRITON = "fastkd.ops.blocks.mlp_triton"
hidden_forward = Kernel(f"{OP}_hidden", reference=_fill_hidden, cpp=_cpp_hidden, triton=f"{_TRITON}:hidden_forward")
hidden_backward = Kernel(
    f"{OP}_hidden_backward", reference=_fill_hidden_backward, cpp=_cpp_hidden_backward,
    triton=f"{_TRITON}:hidden_backward",
)  # fmt: skip


@custom_op("mlp")
def _op(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    rounded1: Tensor | None, rounded2: Tensor | None, keep_hidden: bool, keep_activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # `rounded`: the weights in the dtype of x, where the caller has them; the gradients go to the weights.
    out, hidden, activation = _outputs(x, weight1, weight2, keep_hidden, keep_activation)
    weight1, weight2 = _read(weight1, rounded1), _read(weight2, rounded2)
    wide = activation if keep_activation else activation.new_empty(x.shape[:-1].numel(), weight1.shape[0])
    hidden_forward(_linear.as_rows(x), _linear.as_rows(weight1), bias1, hidden if keep_hidden else None, wide)
    _linear.forward(wide, _linear.as_rows(weight2), bias2, out.view(-1, weight2.shape[0]))
    return out, hidden, activation


def _read(weight: Tensor, rounded: Tensor | None) -> Tensor:
    return weight if rounded is None else rounded


def _outputs(
    x: Tensor, weight1: Tensor, weight2: Tensor, keep_hidden: bool, keep_activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and what backward needs: hidden and activation [N, hidden], of no rows where they are not kept."""
    empty, rows, width = {"dtype": x.dtype, "device": x.device}, x.shape[:-1].numel(), weight1.shape[0]
    return (
        torch.empty((*x.shape[:-1], weight2.shape[0]), **empty),
        torch.empty((rows if keep_hidden else 0, width), **empty),
        torch.empty((rows if keep_activation else 0, width), **empty),
    )


@_op.register_fake
def _(x, weight1, bias1, weight2, bias2, rounded1, rounded2, keep_hidden, keep_activation):
    return _outputs(x, weight1, weight2, keep_hidden, keep_activation)


def _gradients(x: Tensor, weight1: Tensor, weight2: Tensor, needs: list[bool]) -> list[Tensor]:
    """Empty gradients of x, weight1, bias1, weight2, bias2, of no elements where they are not needed."""
    wide = _linear.wide_dtype(x.dtype)
    shapes = (x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    dtypes = (x.dtype, wide, wide, wide, wide)
    return [
        torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)
        for shape, dtype, needed in zip(shapes, dtypes, needs)
    ]


@custom_op("mlp_backward")
def _op_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, hidden: Tensor, activation: Tensor, needs: list[bool]
) -> list[Tensor]:
    gradients = _gradients(x, weight1, weight2, needs)
    rows = _linear.as_rows(grad)
    grad_hidden, again, grad_bias1 = torch.empty_like(hidden), None, None
    if len(activation) < len(hidden):  # not kept
        activation = again = torch.empty_like(hidden) if needs[3] else None
        grad_bias1 = gradients[2] if needs[2] else None
    hidden_backward(rows, _linear.as_rows(weight2), hidden, again, grad_bias1, grad_hidden)
    _parameter_gradients(rows, activation, gradients[3:], needs[3:])
    _parameter_gradients(grad_hidden, _linear.as_rows(x), gradients[1:3], [needs[1], needs[2] and grad_bias1 is None])
    if needs[0]:
        _linear.grad_input(grad_hidden, _linear.as_rows(weight1), gradients[0].view(-1, x.shape[-1]))
    return gradients


def _parameter_gradients(grad: Tensor, x: Tensor | None, gradients: list[Tensor], needs: list[bool]) -> None:
    if needs[0]:
        _linear.grad_weight(grad, x, gradients[0], gradients[1] if needs[1] else None)
    elif needs[1]:
        torch.sum(grad, 0, dtype=gradients[1].dtype, out=gradients[1])


@_op_backward.register_fake
def _(grad, x, weight1, weight2, hidden, activation, needs):
    return _gradients(x, weight1, weight2, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, bias2, rounded1, rounded2, *_keep = inputs
    _out, hidden, activation = output
    ctx.dtypes = [None if p is None else p.dtype for p in (x, weight1, bias1, weight2, bias2)]
    ctx.save_for_backward(x, _read(weight1, rounded1), _read(weight2, rounded2), hidden, activation)
    ctx.mark_non_differentiable(hidden, activation)


def _autograd(ctx, grad: Tensor, _grad_hidden, _grad_activation):
    needs = list(ctx.needs_input_grad[:5])
    gradients = _op_backward(grad, *ctx.saved_tensors, needs)
    return *(g.to(dtype) if n else None for g, n, dtype in zip(gradients, needs, ctx.dtypes)), *[None] * 4


_op.register_autograd(_autograd, setup_context=_setup_context)


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None) -> Tensor:
    """``linear(gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)`` with exact (erf) GELU.

    Args:
        x: [..., in] floating; under autocast it is cast to the autocast dtype.
        fc1_weight: [hidden, in] in the dtype of x or float32.
        fc1_bias: [hidden] likewise, or None.
        fc2_weight: [out, hidden] likewise.
        fc2_bias: [out] likewise, or None.

    Returns:
        [..., out] in the dtype of x (the autocast dtype). Products are summed in float32 (float64); GELU in float32
        (float64), of values that may not have been rounded to 16 bits.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: parameters in a dtype that is neither that of x nor float32.
    """
    x = _linear.under_autocast(OP, x)
    _linear.check_parameters(OP, x, x.shape[-1], fc1_weight=fc1_weight, fc1_bias=fc1_bias)
    _linear.check_parameters(OP, x, fc1_weight.shape[0], fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    rounded = (_linear.rounded(fc1_weight, x), _linear.rounded(fc2_weight, x))
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    return _op(x, *parameters, *rounded, keep, keep and not _linear.by_vendor(x))[0]


def _reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
    hidden = F.gelu(_linear.SPEC.reference(x, fc1_weight, fc1_bias))
    return _linear.SPEC.reference(hidden, fc2_weight, fc2_bias)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, dim, hidden, out = case["batch"], case["dim"], case["hidden"], case.get("out", case["dim"])
    skip = 1 if case.get("strided") else 0
    x = torch.randn(batch, case.get("tokens", 3) + skip, dim, generator=random)[:, skip:] * case.get("scale", 1.0)
    weights = [
        torch.randn(rows, columns, generator=random) / columns**0.5 for rows, columns in ((hidden, dim), (out, hidden))
    ]
    biases = [torch.randn(rows, generator=random) if case.get("bias", True) else None for rows in (hidden, out)]
    parameters = _linear.wide_dtype(dtype) if case.get("mixed") else dtype
    weights, biases = ([t if t is None else t.to(device, parameters) for t in ts] for ts in (weights, biases))
    return dict(
        x=x.to(device, dtype), fc1_weight=weights[0], fc1_bias=biases[0], fc2_weight=weights[1], fc2_bias=biases[1]
    )


def _law(kwargs: dict) -> None:
    """A hidden layer that is 0 gives the second bias."""
    kwargs = kwargs | {"fc1_weight": torch.zeros_like(kwargs["fc1_weight"]), "fc1_bias": None}
    out, bias = mlp(**kwargs), kwargs["fc2_bias"]
    bias = torch.zeros(()) if bias is None else bias.to(out.dtype)
    assert torch.equal(out, bias.expand_as(out))


def _wide_bytes(kwargs: dict) -> int:
    return tensor_bytes(kwargs["x"]) // kwargs["x"].shape[-1] * kwargs["fc1_weight"].shape[0]


SPEC = register(
    OpSpec(
        name=OP,
        function=mlp,
        reference=_reference,
        kernels=(hidden_forward, hidden_backward, _linear.forward, _linear.grad_input, _linear.grad_weight),
        build=_build,
        differentiable=("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
        cases={
            "plain": dict(batch=2, tokens=20, dim=32, hidden=128),
            "mixed": dict(batch=2, tokens=33, dim=48, hidden=192, mixed=True),
            "odd": dict(batch=3, tokens=7, dim=19, hidden=37, out=11, mixed=True, strided=True),
            "no_bias": dict(batch=2, dim=32, hidden=64, bias=False, mixed=True),
            "one_row": dict(batch=1, tokens=1, dim=5, hidden=3, mixed=True),
            "wide_range": dict(batch=2, tokens=18, dim=33, hidden=40, scale=10.0),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 16, 33), dim=(1, 31, 32), hidden=(1, 17, 64), out=(1, 32, 40),
            bias=(True, False), mixed=(True, False), strided=(False, True), scale=(0.1, 1.0, 8.0), seed=tuple(range(5)),
        ),
        bench={
            "decoder": dict(batch=8, tokens=197, dim=512, hidden=2048, mixed=True),
            "encoder_90": dict(batch=16, tokens=20, dim=768, hidden=3072, mixed=True),
        },
        # forward writes h and a and reads a; backward reads h and a twice each, writes dh and reads it twice
        bytes_moved=lambda k: 4 * tensor_bytes(k["x"]) + 9 * _wide_bytes(k)
        + 3 * tensor_bytes(k["fc1_weight"], k["fc2_weight"]),
        flops=lambda k: 12 * k["x"].numel() * k["fc1_weight"].shape[0],
        law=_law,
    )
)  # fmt: skip
