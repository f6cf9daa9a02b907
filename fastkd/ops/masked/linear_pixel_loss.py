"""Linear layer and pixel loss in one: the last step of a masked autoencoder (He et al. 2022, section 3).

For N = B K predicted patches of P pixels, with the targets t of `masked_pixel_loss`:

    r = x W^T + b - t                                  the residual [N, P]
    loss = mean(r^2)
    dx = s r W,  dW = s r^T x,  db = s sum_rows r      s = 2 / (N P) * d loss

One buffer of N P values in the dtype of x holds the prediction, then the residual, and is all that is saved: no
target, no float32 prediction, no gradient of it beside it. s never touches it. W takes s as it is cast, the gradients
of W and b take it in float32; this way float16 loses nothing to a small s, and nothing waits for d loss. The buffer
holds 2^-k r with 2^k about sqrt(N): sums over N rows stay in the range of float16 as well.

Transfers of N P values, 2 bytes each: the linear layer, then the loss: prediction written, read by the loss, read
again for its gradient, gradient written and read by two products = 6, and two buffers live in backward. Here written,
read, overwritten, read twice = 5, and on AMX tiles, where the loss is taken from the product's accumulators, 3; one
buffer lives. Making the gradients in forward, chunk by chunk, would keep the buffer in cache, but write dx, read it and
write it again once d loss is known, and sum dW over many small products: not worth it beside three products whose
2 N P D operations each take longer than all of these transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from ..blocks import linear as _linear
from . import images as _images
from . import masked_pixel_loss as _pixel_loss

OP = "linear_pixel_loss"
CHUNK = 4096  # rows that are predicted at a time where no gradient is wanted


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit(rows: int) -> float:
    """What the residual is multiplied by in its buffer."""
    return 2.0 ** -(rows.bit_length() // 2)


# x [N, D], weight [P, D], bias [P] or None, images NCHW, ids [B, K], loss scalar, residual [N, P]. Bias and loss are
# float32 (float64): the bias is added where the loss is made, not by the product.


def _fill_forward(x, weight, bias, images, ids, affine, patch, norm_pix, eps, unit, loss, residual) -> None:
    torch.mm(x, weight.to(x.dtype).t(), out=residual)
    target = _pixel_loss._target(images, ids, affine, patch, norm_pix, eps).flatten(0, 1)
    difference = residual.to(affine.dtype) - target
    if bias is not None:
        difference += bias
    loss.copy_(difference.square().mean())
    residual.copy_(difference * unit)


def _cpp_forward(x, weight, bias, images, ids, affine, patch, norm_pix, eps, unit, loss, residual) -> None:
    if _linear.has_own_product(x.dtype, weight):
        images = images if images.dtype == torch.uint8 else images.float()
        options = (images, ids, affine, patch, norm_pix, eps, unit, loss, residual)
        torch.ops.fastkd_cpu.linear_pixel_loss(x, weight.float(), bias, *options)
    else:
        torch.mm(x, weight.to(x.dtype).t(), out=residual)
        torch.ops.fastkd_cpu.pixel_residual(bias, images, ids, affine, patch, norm_pix, eps, unit, loss, residual)


def backward_through(products: str) -> Callable[..., None]:
    """The backward on the products of one backend of `linear`."""

    def fill(grad_loss, residual, x, weight, grad_x, grad_weight, grad_bias) -> None:
        scale = grad_loss * (2 / (residual.numel() * _unit(len(residual))))
        if grad_x is not None:
            # The gradient of W, which is made next, lends its memory to s W.
            scaled = torch.empty_like(weight, dtype=scale.dtype) if grad_weight is None else grad_weight
            torch.mul(weight.to(scale.dtype), scale, out=scaled)
            _linear.grad_input.implementation(products)(residual, scaled, grad_x)
        if grad_weight is not None:
            _linear.grad_weight.implementation(products)(residual, x, grad_weight, grad_bias)
            grad_weight.mul_(scale)
        elif grad_bias is not None:
            torch.sum(residual, 0, dtype=grad_bias.dtype, out=grad_bias)
        if grad_bias is not None:
            grad_bias.mul_(scale)

    return fill


_TRITON = "fastkd.ops.masked.linear_pixel_loss_triton"
forward = Kernel(OP, reference=_fill_forward, cpp=_cpp_forward, triton=f"{_TRITON}:forward")
backward = Kernel(
    f"{OP}_backward", reference=backward_through("reference"), cpp=backward_through("cpp"), triton=f"{_TRITON}:backward"
)


@custom_op("linear_pixel_loss")
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids: Tensor, mean: Sequence[float],
    std: Sequence[float], patch: Sequence[int], norm_pix: bool, eps: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, each = ids.shape
    affine = _images.affine(images, mean, std, x.dtype)
    rows, weight = _linear.as_rows(x), _linear.as_rows(weight)
    bias = None if bias is None else bias.to(affine.dtype).contiguous()
    step = batch if keep else max(1, min(batch, CHUNK // each))  # images at a time
    buffer = torch.empty(step * each, weight.shape[0], dtype=x.dtype, device=x.device)
    loss = torch.empty((), dtype=affine.dtype, device=x.device)

    def fill(start: int, stop: int) -> None:
        count = (stop - start) * each
        forward(
            rows[start * each : stop * each], weight, bias, images[start:stop], ids[start:stop], affine, list(patch),
            norm_pix, eps, _unit(count), loss, buffer[:count],
        )  # fmt: skip

    if step == batch:
        fill(0, batch)
    else:
        total = torch.zeros_like(loss)
        for start in range(0, batch, step):
            stop = min(batch, start + step)
            fill(start, stop)
            total.add_(loss, alpha=(stop - start) / batch)
        loss = total
    return loss, buffer if keep else x.new_empty(0)


@_op.register_fake
def _(x, weight, bias, images, ids, mean, std, patch, norm_pix, eps, keep):
    loss = torch.empty((), dtype=_wide(x.dtype), device=x.device)
    shape = (x.shape[0] * x.shape[1], weight.shape[0]) if keep else (0,)
    return loss, torch.empty(shape, dtype=x.dtype, device=x.device)


@custom_op("linear_pixel_loss_backward")
def _op_backward(
    grad_loss: Tensor, residual: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _linear.empty_gradients(x, weight, needs)
    grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(gradients, needs))
    grad_x = None if grad_x is None else grad_x.view(-1, x.shape[-1])
    backward(grad_loss, residual, _linear.as_rows(x), _linear.as_rows(weight), grad_x, grad_weight, grad_bias)
    return gradients


@_op_backward.register_fake
def _(grad_loss, residual, x, weight, needs):
    return _linear.empty_gradients(x, weight, needs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output[1], x, weight)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_loss: Tensor, _grad_residual):
    residual, x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_x, grad_weight, grad_bias = _op_backward(grad_loss, residual, x, weight, needs)
    return (
        grad_x if needs[0] else None,
        grad_weight.to(weight.dtype) if needs[1] else None,
        grad_bias.to(ctx.bias_dtype) if needs[2] else None,
        *[None] * 8,
    )


_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_pixel_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids: Tensor,
    patch_size: int | tuple[int, int],
    norm_pix_loss: bool = False,
    eps: float = 1e-6,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """``masked_pixel_loss(linear(x, weight, bias), images, ids, ...)`` without targets and with one buffer.

    Args:
        x: [B, K, D] floating, tokens that predict a patch each; any strides. Under autocast it is cast to the
            autocast dtype.
        weight: [P, D] in the dtype of x or float32, P = p * p * C in pixel order (row, column, channel).
        bias: [P] likewise, or None.
        images: [B, C, H, W] floating, or [B, H, W, C] uint8 (then pixels are divided by 255 first).
        ids: [B, K] int64, raster index of the patch that each token predicts.
        patch_size: side p of a patch, or (height, width).
        norm_pix_loss: normalise each target patch by its own mean and unbiased variance.
        eps: added to that variance.
        mean, std: per-channel statistics that normalise the pixels in the kernel.

    Returns:
        Scalar, float32 (float64 for float64 tokens): mean squared error over all B K P pixels.

    Raises:
        ValueError: shapes that do not fit, or no patch to predict.
        TypeError: weight or bias in a dtype that is neither that of x nor float32.

    Without a gradient to make, predictions exist for 4096 tokens at a time only.
    """
    x = _linear.under_autocast(OP, x)
    _check.check_tensor(OP, "x", x, 3)
    _linear.check_parameters(OP, x, x.shape[-1], weight=weight, bias=bias)
    _check.check_tensor(OP, "ids", ids, 2, (torch.int64,))
    images = _images.to_nchw(OP, images)
    patch = _check.pair(OP, "patch_size", patch_size)
    _images.check_grid(OP, images, patch)
    mean, std = _images.statistics(OP, images, mean, std)
    pixels = patch[0] * patch[1] * images.shape[1]
    _check.check_shape(OP, "weight", weight, (pixels, x.shape[2]), "(p * p * C, D)")
    _check.check_same_device(OP, x=x, weight=weight, bias=bias, images=images, ids=ids)
    _check.check_shape(OP, "images", images, (x.shape[0], *images.shape[1:]), "with the B of x")
    _check.check_shape(OP, "ids", ids, tuple(x.shape[:2]), "(B, K) like x")
    if ids.numel() == 0:
        _check.fail(OP, "ids", "no ids", "at least one masked patch", "raise mask_ratio")
    if norm_pix_loss and pixels < 2:
        _check.fail(OP, "norm_pix_loss", True, "at least 2 values a patch", "the variance of one value is undefined")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _op(x, weight, bias, images, ids, mean, std, list(patch), norm_pix_loss, eps, keep)[0]


class LinearPixelLoss(_pixel_loss.MaskedPixelLoss):
    """`linear_pixel_loss` as a module; ``forward(x, weight, bias, images, ids)``."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids: Tensor) -> Tensor:
        return linear_pixel_loss(x, weight, bias, images, ids, **self.options)


def _reference(x, weight, bias, images, ids, *args, **kwargs) -> Tensor:
    pred = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _pixel_loss._reference(pred, images, ids, *args, **kwargs)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0) + 1)
    batch, dim, patch, skip = case["batch"], case["dim"], case["patch"], 1 if case.get("strided") else 0
    patches, pixels = case["grid"][0] * case["grid"][1], patch[0] * patch[1] * case["channels"]
    ids = torch.rand(batch, patches, generator=random).argsort(1)[:, : max(1, int(patches * case["ratio"]))]
    x = torch.randn(batch, ids.shape[1] + skip, dim, generator=random)[:, skip:]
    weight = torch.randn(pixels, dim + skip, generator=random)[:, skip:] / dim**0.5
    bias = torch.randn(pixels, generator=random)
    parameters = _wide(dtype) if case.get("mixed") else dtype
    return dict(
        x=x.to(device, dtype), weight=weight.to(device, parameters),
        bias=bias.to(device, parameters) if case.get("bias", True) else None, ids=ids.to(device), patch_size=patch,
        norm_pix_loss=case["norm_pix"] and pixels > 1, **_images.random_images(case, dtype, device),
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """The order of the patches is free; the loss grows with the square of what is wrong in the bias."""
    flipped = {name: kwargs[name].flip(1) for name in ("x", "ids")}
    loss = linear_pixel_loss(**kwargs)
    torch.testing.assert_close(linear_pixel_loss(**{**kwargs, **flipped}), loss, rtol=1e-5, atol=1e-6)
    nothing = {name: torch.zeros_like(kwargs["x" if name == "x" else "weight"]) for name in ("x", "weight")}
    zero = linear_pixel_loss(**{**kwargs, **nothing, "bias": None})
    ones = torch.ones_like(kwargs["weight"][:, 0])
    apart = [linear_pixel_loss(**{**kwargs, **nothing, "bias": sign * ones}) for sign in (1, -1)]
    torch.testing.assert_close((apart[0] + apart[1]) / 2, zero + 1, rtol=1e-5, atol=1e-5)


def _bytes_moved(kwargs: dict) -> int:
    # The residual is written once and read twice; x is read twice, its gradient written; pixels are read once.
    x, weight, images = kwargs["x"], kwargs["weight"], kwargs["images"]
    values = kwargs["ids"].numel() * weight.shape[0]
    return values * (3 * x.element_size() + images.element_size()) + 3 * tensor_bytes(x, weight)


SPEC = register(
    OpSpec(
        name=OP,
        function=linear_pixel_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("x", "weight", "bias"),
        cases={
            "raw": dict(batch=2, grid=(3, 3), patch=(4, 4), channels=3, ratio=0.75, dim=24, norm_pix=False),
            "norm": dict(batch=2, grid=(2, 3), patch=(5, 5), channels=3, ratio=0.5, dim=33, norm_pix=True, mixed=True),
            "uint8": dict(
                batch=3, grid=(2, 4), patch=(4, 4), channels=3, ratio=0.75, dim=16, norm_pix=True, uint8=True,
            ),
            "wide": dict(
                batch=2, grid=(5, 5), patch=(8, 8), channels=3, ratio=0.75, dim=70, norm_pix=False, uint8=True,
                mixed=True,
            ),
            "lines_of_42": dict(  # 16 values of a patch lie in one line of pixels or in two
                batch=1, grid=(3, 2), patch=(14, 14), channels=3, ratio=1.0, dim=8, norm_pix=True, uint8=True,
                mixed=True,
            ),
            "one_channel": dict(
                batch=2, grid=(2, 2), patch=(3, 5), channels=1, ratio=0.5, dim=7, norm_pix=False, uint8=True,
            ),
            "no_bias": dict(
                batch=1, grid=(2, 2), patch=(2, 2), channels=7, ratio=0.5, dim=5, norm_pix=True, bias=False,
            ),
            "strided": dict(
                batch=2, grid=(2, 3), patch=(4, 4), channels=3, ratio=0.5, dim=32, norm_pix=True, strided=True,
            ),
            "one_row": dict(batch=1, grid=(1, 1), patch=(2, 2), channels=3, ratio=1.0, dim=1, norm_pix=False),
        },
        space=dict(
            batch=(1, 2, 3), grid=((1, 1), (1, 5), (3, 4)), patch=((1, 1), (2, 2), (3, 5), (8, 8)),
            channels=(1, 3, 4), ratio=(0.25, 0.75, 1.0), dim=(1, 31, 64), bias=(True, False), mixed=(False, True),
            norm_pix=(False, True), uint8=(False, True), strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "vit_75": dict(
                batch=32, grid=(14, 14), patch=(16, 16), channels=3, ratio=0.75, dim=512, norm_pix=False, uint8=True,
                mixed=True,
            ),
            "vit_95_norm": dict(
                batch=32, grid=(14, 14), patch=(16, 16), channels=3, ratio=0.95, dim=512, norm_pix=True, uint8=True,
                mixed=True,
            ),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 6 * k["x"].numel() * k["weight"].shape[0],
        golden=None,
        law=_law,
    )
)  # fmt: skip
