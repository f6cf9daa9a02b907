"""A linear layer on 8-bit integers, for inference: weights are quantised once, activations per token on the way.

    y = (q_x Q_W^T) * s_x * s_W + b, or its GELU           q_x, s_x = quantize_rows(x),  Q_W, s_W = quantize_rows(W)

The sums of integers are exact (int32), so every implementation computes the same product; only the last line rounds.
On the CPU tokens are quantised and multiplied in one call, on AMX tiles, AVX-512 VNNI or AVX2, whichever is there; the
weights come packed in the order in which these read them. Elsewhere it is emulated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from .linear import under_autocast
from .quantize_rows import quantize_rows

OP = "linear_int8"
DEPTH = 65536  # most input channels: the sums of products of two 8-bit integers stay within int32


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises and packs the weight [out, in] of a linear layer for `linear_int8`.

    Returns:
        packed int8 [ceil(out / 32) * 2, ceil(in / 64) * 16, 16, 4]: columns by 16, inputs by 4, filled up with 0;
        scale [out] float32 of the output channels.
    """
    codes, scale = quantize_rows(weight.detach(), "int8")
    outputs, inputs = codes.shape
    codes = F.pad(codes, (0, -inputs % 64, 0, -outputs % 32))
    return codes.view(codes.shape[0] // 16, 16, -1, 4).transpose(1, 2).contiguous(), scale


def unpack_int8(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The codes int8 [outputs, inputs] of a packed weight."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * 16, -1)[:outputs, :inputs]


def _fill(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    codes, x_scale = quantize_rows(x, "int8")
    weight = unpack_int8(packed, scale.shape[0], x.shape[1])
    sums = codes.double() @ weight.double().t()  # exact
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = sums.to(wide) * (x_scale.to(wide)[:, None] * scale.to(wide))
    result = result if bias is None else result + bias.to(wide)
    out.copy_(F.gelu(result) if gelu else result)


kernel = Kernel(OP, reference=_fill)


@custom_op(OP)
def _op(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    out = torch.empty((*x.shape[:-1], scale.shape[0]), dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    kernel(rows, packed.contiguous(), scale.contiguous(), bias, gelu, out.view(-1, scale.shape[0]))
    return out


@_op.register_fake
def _(x, packed, scale, bias, gelu):
    return torch.empty((*x.shape[:-1], scale.shape[0]), dtype=x.dtype, device=x.device)


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Linear layer with 8-bit integer weights and activations, for inference.

    Args:
        x: [..., in] floating; under autocast it is cast to the autocast dtype. Quantised per row.
        packed, scale: what `pack_int8` made of the weight [out, in].
        bias: [out] float32 or None.
        gelu: take the exact GELU of the result before it is rounded.

    Returns:
        [..., out] in the dtype of x, without gradient. Relative to the exact product the error of random data is about
        1 %: half a step of 1/127 of the largest value on either side.

    Raises:
        ValueError: shapes that do not fit, more than 65,536 inputs, or x that requires grad while gradients are on.
        TypeError: wrong dtypes.
    """
    x = under_autocast(OP, x)
    _check.check_tensor(OP, "packed", packed, 4, (torch.int8,))
    _check.check_tensor(OP, "scale", scale, 1, (torch.float32,))
    inputs, outputs = x.shape[-1], scale.shape[0]
    if not 0 < inputs <= DEPTH:
        _check.fail(OP, "x", f"{inputs} channels", f"1 to {DEPTH}")
    shape = (-(-outputs // 32) * 2, -(-inputs // 64) * 16, 16, 4)
    _check.check_shape(OP, "packed", packed, shape, f"from pack_int8 of a weight ({outputs}, {inputs})")
    if bias is not None:
        _check.check_tensor(OP, "bias", bias, 1, (torch.float32,))
        _check.check_shape(OP, "bias", bias, (outputs,), "(out,)")
    _check.check_same_device(OP, x=x, packed=packed, scale=scale, bias=bias)
    if torch.is_grad_enabled():
        _check.check_no_grad(OP, "x", x, "this is for inference, use `linear` to train")
    return _op(x, packed, scale, bias, gelu)


def _reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    out = torch.empty((*x.shape[:-1], scale.shape[0]), dtype=x.dtype, device=x.device)
    _fill(x.reshape(-1, x.shape[-1]), packed, scale, bias, gelu, out.view(-1, scale.shape[0]))
    return out


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, dim, out = case["batch"], case["dim"], case["out"]
    x = torch.randn(batch, case.get("tokens", 3), dim, generator=random) * case.get("size", 1.0)
    if case.get("outlier"):
        x[..., 0] *= 100
    packed, scale = pack_int8(torch.randn(out, dim, generator=random) / dim**0.5)
    bias = torch.randn(out, generator=random).to(device) if case.get("bias", True) else None
    return dict(
        x=x.to(device, dtype), packed=packed.to(device), scale=scale.to(device), bias=bias, gelu=case.get("gelu", False)
    )


def _law(kwargs: dict) -> None:
    """Integers of which one is 127 are their own codes: the product with them is exact."""
    x, scale = kwargs["x"], kwargs["scale"]
    x = (x * 40).round().clamp(-127, 127)
    x[..., 0] = 127
    weight = unpack_int8(kwargs["packed"], scale.shape[0], x.shape[-1]).double() * scale.double()[:, None]
    want = F.linear(x.double(), weight, None if kwargs["bias"] is None else kwargs["bias"].double())
    got = linear_int8(**(kwargs | dict(x=x, gelu=False))).double()
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


SPEC = register(
    OpSpec(
        name=OP,
        function=linear_int8,
        reference=_reference,
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "plain": dict(batch=2, dim=64, out=96, tokens=20),
            "no_bias": dict(batch=2, dim=128, out=16, bias=False),
            "gelu": dict(batch=2, dim=64, out=80, tokens=20, gelu=True),
            "odd": dict(batch=3, dim=37, out=19, tokens=7),
            "one_row": dict(batch=1, dim=5, out=3, tokens=1),
            "deep": dict(batch=2, dim=2500, out=40, tokens=40, outlier=True),
            "many_rows": dict(batch=3, dim=70, out=70, tokens=300),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 16, 33), dim=(1, 63, 64, 130), out=(1, 16, 33, 64), bias=(True, False),
            gelu=(False, True), outlier=(False, True), size=(1e-3, 1.0, 300.0), seed=tuple(range(5)),
        ),
        bench={
            "teacher_qkv": dict(batch=16, tokens=50, dim=1024, out=3072),
            "teacher_fc1": dict(batch=16, tokens=50, dim=1024, out=4096, gelu=True),
            "teacher_fc2": dict(batch=16, tokens=50, dim=4096, out=1024),
        },
        bytes_moved=lambda k: tensor_bytes(k["x"], k["packed"])
        + tensor_bytes(k["x"]) // k["x"].shape[-1] * k["scale"].shape[0],
        flops=lambda k: 2 * k["x"].numel() * k["scale"].shape[0],
        law=_law,
    )
)  # fmt: skip
