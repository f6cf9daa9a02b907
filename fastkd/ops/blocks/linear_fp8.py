"""A linear layer on 8-bit floats (e4m3), for inference: weights are quantised once, activations per token on the way.

    y = (q_x Q_W^T) * s_x * s_W + b           q_x, s_x = quantize_rows(x),  Q_W, s_W = quantize_rows(W)

The product is torch's on tensor cores, scaled by row and by column, its sums in float32 (never the tensor cores' own
14 bits, which "fast accumulation" would keep). It takes sm_89 or newer and bfloat16; anywhere else it is emulated with
the same codes in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _check
from .._dispatch import forced_backend
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import quantize_rows as rows
from .linear import under_autocast
from .quantize_rows import quantize_rows

OP = "linear_fp8"
CAPABILITY = (8, 9)


def pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises the weight [out, in] of a linear layer for `linear_fp8`: codes [out, in] uint8, scale [out] float32."""
    return quantize_rows(weight.detach(), "fp8")


@functools.cache
def why_emulated(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the product cannot run on this device's float8 units, or None where it can."""
    if device.type != "cuda" or torch.version.hip:
        return f"float8 products need an NVIDIA GPU, got {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"float8 units came with compute capability 8.9, {torch.cuda.get_device_name(device)} is older"
    return None if dtype == torch.bfloat16 else f"the product's result is bfloat16, got {dtype}"


def _emulated(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, q_scale = quantize_rows(x, "fp8")
    result = torch.empty(x.shape[0], scale.shape[0], dtype=wide, device=x.device)
    q, weight = (t.view(torch.float8_e4m3fn).to(wide) for t in (q, codes))
    torch.mm(q, weight.t(), out=result)  # an `out=` call: autocast leaves it alone
    result *= q_scale.to(wide)[:, None] * scale.to(wide)
    return (result if bias is None else result + bias.to(wide)).to(x.dtype)


def _on_tensor_cores(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    q, q_scale = quantize_rows(x, "fp8")
    q, weight = (t.view(torch.float8_e4m3fn) for t in (q, codes))
    return torch._scaled_mm(  # wants its second operand column-major, which the transpose is
        q, weight.t(), scale_a=q_scale[:, None], scale_b=scale[None],
        bias=None if bias is None else bias.to(x.dtype), out_dtype=x.dtype, use_fast_accum=False,
    )  # fmt: skip


@custom_op(OP)
def _op(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, codes, scale = x.reshape(-1, x.shape[-1]), codes.contiguous(), scale.contiguous()
    fits = all(size % 16 == 0 for size in codes.shape)
    emulated = not fits or forced_backend() == "reference" or why_emulated(x.device, x.dtype)
    out = (_emulated if emulated else _on_tensor_cores)(rows, codes, scale, bias)
    return out.view(*x.shape[:-1], scale.shape[0])


@_op.register_fake
def _(x, codes, scale, bias):
    return torch.empty((*x.shape[:-1], scale.shape[0]), dtype=x.dtype, device=x.device)


def linear_fp8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with 8-bit float (e4m3) weights and activations, for inference.

    Args:
        x: [..., in] floating; under autocast it is cast to the autocast dtype. Quantised per row.
        codes, scale: what `pack_fp8` made of the weight [out, in].
        bias: [out] in the dtype of x, or None.

    Returns:
        [..., out] in the dtype of x, without gradient. Relative to the exact product the error of random data is about
        4 %: 3 bits of mantissa on either side. Float8 units are used for bfloat16 x where `in` and `out` are multiples
        of 16 (`why_emulated`).

    Raises:
        ValueError: shapes that do not fit, or x that requires grad while gradients are on.
        TypeError: wrong dtypes.
    """
    x = under_autocast(OP, x)
    _check.check_tensor(OP, "codes", codes, 2, (torch.uint8,))
    _check.check_tensor(OP, "scale", scale, 1, (torch.float32,))
    outputs, inputs = scale.shape[0], x.shape[-1]
    _check.check_shape(OP, "codes", codes, (outputs, inputs), "(out, in)")
    if bias is not None:
        _check.check_tensor(OP, "bias", bias, 1)
        _check.check_shape(OP, "bias", bias, (outputs,), "(out,)")
    _check.check_same_device(OP, x=x, codes=codes, scale=scale, bias=bias)
    if torch.is_grad_enabled():
        _check.check_no_grad(OP, "x", x, "this is for inference, use `linear` to train")
    return _op(x, codes, scale, bias)


def _reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _emulated(x.reshape(-1, x.shape[-1]), codes, scale, bias)
    return out.view(*x.shape[:-1], scale.shape[0])


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, dim, out = case["batch"], case["dim"], case["out"]
    x = torch.randn(batch, case.get("tokens", 3), dim, generator=random) * case.get("size", 1.0)
    if case.get("outlier"):
        x[..., 0] *= 100
    codes, scale = pack_fp8(torch.randn(out, dim, generator=random) / dim**0.5)
    bias = torch.randn(out, generator=random).to(device, dtype) if case.get("bias", True) else None
    return dict(x=x.to(device, dtype), codes=codes.to(device), scale=scale.to(device), bias=bias)


def _law(kwargs: dict) -> None:
    """Zero rows give the bias."""
    out = linear_fp8(**(kwargs | dict(x=torch.zeros_like(kwargs["x"]))))
    bias = out.new_zeros(()) if kwargs["bias"] is None else kwargs["bias"].to(out.dtype)
    assert torch.equal(out, bias.expand_as(out))


SPEC = register(
    OpSpec(
        name=OP,
        function=linear_fp8,
        reference=_reference,
        kernels=(rows.kernel,),
        build=_build,
        differentiable=(),
        cases={
            "plain": dict(batch=2, dim=64, out=96, tokens=20),
            "no_bias": dict(batch=2, dim=128, out=16, bias=False),
            "odd": dict(batch=3, dim=37, out=19, tokens=7),
            "one_row": dict(batch=1, dim=16, out=16, tokens=1),
            "deep": dict(batch=2, dim=2560, out=48, tokens=40, outlier=True),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 16, 33), dim=(1, 16, 33, 128), out=(1, 16, 33, 64), bias=(True, False),
            outlier=(False, True), size=(1e-3, 1.0, 300.0), seed=tuple(range(5)),
        ),
        bench={
            "teacher_qkv": dict(batch=128, tokens=50, dim=1024, out=3072),
            "teacher_fc2": dict(batch=128, tokens=50, dim=4096, out=1024),
        },
        bytes_moved=lambda k: tensor_bytes(k["x"], k["codes"])
        + tensor_bytes(k["x"]) // k["x"].shape[-1] * k["scale"].shape[0],
        flops=lambda k: 2 * k["x"].numel() * k["scale"].shape[0],
        law=_law,
    )
)  # fmt: skip
