"""Symmetric quantisation of rows to 8 bits, for products on integer or float8 units.

    scale = max_row |x| / L            codes = round(x / scale), to even where two are equally near

``int8`` has L = 127. ``fp8`` is e4m3 (Micikevicius et al. 2022, FP8 Formats for Deep Learning): L = 448, 3 bits of
mantissa. A token's largest channel decides its scale, so outliers of one token cost no other token its precision. All
arithmetic is float32, whatever the dtype of x: every implementation gives the same codes, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "quantize_rows"
# dtype of the codes and L; e4m3 as its bits, since torch knows little to do with float8 tensors
FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.uint8, 448.0)}
TINY = 1e-30  # least maximum of a row: its inverse is finite, and a row of zeros has the codes 0


def _fill(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    limit = FORMATS["int8" if codes.dtype == torch.int8 else "fp8"][1]
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
    scaled = x * (torch.full_like(largest, limit) / largest)  # number / tensor would multiply by the reciprocal
    codes.copy_(scaled.round() if codes.dtype == torch.int8 else scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    scale.copy_(largest.div(limit).squeeze(-1))


# On a CPU `linear_int8` quantises by itself, and float8 is only emulated.
kernel = Kernel(OP, reference=_fill, cpp=False, triton="fastkd.ops.blocks.quantize_rows_triton:quantize")


@custom_op(OP)
def _op(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    codes, scale = _outputs(x, format)
    kernel(x if x.stride(1) == 1 else x.contiguous(), codes, scale)
    return codes, scale


def _outputs(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=FORMATS[format][0], device=x.device)
    return codes, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@_op.register_fake
def _(x, format):
    return _outputs(x, format)


def quantize_rows(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """8-bit codes of every row and its scale: x is about codes * scale.

    Args:
        x: [N, D] floating, D >= 1.
        format: ``"int8"`` or ``"fp8"`` (e4m3).

    Returns:
        codes [N, D] int8, or uint8 to be seen through `view(torch.float8_e4m3fn)`, and scale [N] float32, without
        gradients. A row that holds NaN or infinity has such a scale too, so that a product made of it shows it.

    Raises:
        ValueError: an unknown format, no channels, or x that requires grad (rounding has no gradient).
    """
    _check.check_tensor(OP, "x", x, 2)
    if format not in FORMATS:
        _check.fail(OP, "format", repr(format), " or ".join(map(repr, FORMATS)))
    if x.shape[1] == 0:
        _check.fail(OP, "x", f"shape {tuple(x.shape)}", "at least one channel")
    if torch.is_grad_enabled():
        _check.check_no_grad(OP, "x", x, "rounding has no gradient")
    return _op(x, format)


def _reference(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    codes, scale = _outputs(x, format)
    _fill(x, codes, scale)
    return codes, scale


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    x = torch.randn(case["batch"] * case.get("tokens", 3), case["dim"], generator=random) * case.get("size", 1.0)
    if case.get("outlier"):  # as in the residual stream of a large ViT
        x[:, 0] *= 100
    if case.get("zeros"):
        x[::2] = 0
    return dict(x=x.to(device, dtype), format=case.get("format", "int8"))


def _law(kwargs: dict) -> None:
    """Codes times scale is x, to half a step of the format at that size."""
    codes, scale = quantize_rows(**kwargs)
    codes = codes if kwargs["format"] == "int8" else codes.view(torch.float8_e4m3fn)
    x, back = kwargs["x"].double(), codes.double() * scale.double()[:, None]
    step = scale.double()[:, None]  # int8: one step everywhere; fp8: 2^-3 of the power of two, 2^-9 at least
    if kwargs["format"] == "fp8":
        step = step * torch.exp2(torch.floor(torch.log2((x / step).abs().clamp_min(2.0**-6))) - 3)
    assert ((back - x).abs() <= 0.5001 * step).all()


SPEC = register(
    OpSpec(
        name=OP,
        function=quantize_rows,
        reference=_reference,
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "int8": dict(batch=2, dim=64),
            "fp8": dict(batch=2, dim=64, format="fp8"),
            "odd": dict(batch=3, dim=37, tokens=5, format="fp8", outlier=True),
            "zeros": dict(batch=2, dim=48, zeros=True),
            "fp8_zeros": dict(batch=2, dim=48, format="fp8", zeros=True),
            "one_channel": dict(batch=2, dim=1, format="fp8"),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 5), dim=(1, 16, 33, 130), format=("int8", "fp8"), outlier=(False, True),
            zeros=(False, True), size=(1e-3, 1.0, 300.0), seed=tuple(range(5)),
        ),
        bench={"teacher_fc2": dict(batch=128, tokens=50, dim=4096, format="fp8")},
        bytes_moved=lambda k: tensor_bytes(k["x"]) + k["x"].numel() + 4 * k["x"].shape[0],
        flops=lambda k: 3 * k["x"].numel(),
        law=_law,
    )
)  # fmt: skip
