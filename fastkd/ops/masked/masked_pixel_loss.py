"""Pixel reconstruction loss on masked patches (MAE, He et al. 2022, section 3; DMAE, Bai et al. 2023).

For predicted patch k of image b, with target t = the P = p * p * C pixels (row, column, channel) of its patch,
optionally normalised, t <- (t - mean(t)) / sqrt(var(t) + eps) with the unbiased variance:

    loss = sum_bk w_bk * mean_P (pred_bk - t_bk)^2          w = mask / sum(mask), or 1 / (B K) for given ids
    d loss / d pred_bk = 2 w_bk / P * (pred_bk - t_bk)

Targets and their statistics live in registers only. Forward and backward both read pred and pixels: three
pred-sized transfers in all, where saving the gradient and scaling it by the upstream one would take four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import images as _images

OP = "masked_pixel_loss"


def _target(images: Tensor, ids: Tensor, affine: Tensor, patch: list[int], norm_pix: bool, eps: float) -> Tensor:
    patches = _images.patchify(_images.normalized(images, affine), tuple(patch))
    target = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[-1]))
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps).sqrt()
    return target


def _row_weight(pred: Tensor, weight: Tensor | None) -> Tensor | float:
    return 1.0 / (pred.shape[0] * pred.shape[1]) if weight is None else weight


def _fill_forward(pred, images, ids, weight, affine, patch, norm_pix, eps, loss) -> None:
    difference = pred.to(affine.dtype) - _target(images, ids, affine, patch, norm_pix, eps)
    loss.copy_((difference.square().mean(-1) * _row_weight(pred, weight)).sum())


def _fill_backward(grad_loss, pred, images, ids, weight, affine, patch, norm_pix, eps, grad_pred) -> None:
    difference = pred.to(affine.dtype) - _target(images, ids, affine, patch, norm_pix, eps)
    row = grad_loss * _row_weight(pred, weight) * (2.0 / pred.shape[-1])
    grad_pred.copy_(difference * (row if weight is None else row[:, :, None]))


_TRITON = "fastkd.ops.masked.masked_pixel_loss_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward", cuda=True)
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward", cuda=True)


def _scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@custom_op("masked_pixel_loss")
def _op(
    pred: Tensor, images: Tensor, ids: Tensor, weight: Tensor | None, mean: Sequence[float], std: Sequence[float],
    patch: Sequence[int], norm_pix: bool, eps: float,
) -> Tensor:  # fmt: skip
    loss = torch.empty((), dtype=_scalar_dtype(pred.dtype), device=pred.device)
    affine = _images.affine(images, mean, std, pred.dtype)
    forward(pred, images, ids, weight, affine, list(patch), norm_pix, eps, loss)
    return loss


@_op.register_fake
def _(pred, images, ids, weight, mean, std, patch, norm_pix, eps):
    return torch.empty((), dtype=_scalar_dtype(pred.dtype), device=pred.device)


@custom_op("masked_pixel_loss_backward")
def _op_backward(
    grad_loss: Tensor, pred: Tensor, images: Tensor, ids: Tensor, weight: Tensor | None, mean: Sequence[float],
    std: Sequence[float], patch: Sequence[int], norm_pix: bool, eps: float,
) -> Tensor:  # fmt: skip
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    affine = _images.affine(images, mean, std, pred.dtype)
    backward(grad_loss, pred, images, ids, weight, affine, list(patch), norm_pix, eps, grad_pred)
    return grad_pred


@_op_backward.register_fake
def _(grad_loss, pred, images, ids, weight, mean, std, patch, norm_pix, eps):
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


def _setup_context(ctx, inputs, output) -> None:
    pred, images, ids, weight, *ctx.constants = inputs
    ctx.save_for_backward(pred, images, ids, weight)


def _autograd(ctx, grad_loss: Tensor):
    grad_pred = _op_backward(grad_loss, *ctx.saved_tensors, *ctx.constants)
    return grad_pred, *[None] * 8


_op.register_autograd(_autograd, setup_context=_setup_context)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    masked: Tensor,
    patch_size: int | tuple[int, int],
    norm_pix_loss: bool = False,
    eps: float = 1e-6,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Mean squared error of predicted pixels over the masked patches of the whole batch.

    Args:
        pred: predictions; [B, L, P] for all patches in raster order together with a mask, or [B, M, P] for the
            patches listed in ids. P = p * p * C, pixel order (row, column, channel). Any strides.
        images: [B, C, H, W] floating, or [B, H, W, C] uint8 (then pixels are divided by 255 first).
        masked: mask [B, L] (floating or bool, 1 = masked) or ids [B, M] (int64, raster index of each prediction).
        patch_size: side p of a patch, or (height, width).
        norm_pix_loss: normalise each target patch by its own mean and unbiased variance.
        eps: added to that variance.
        mean, std: per-channel statistics that normalise the pixels in the kernel.

    Returns:
        Scalar, float32 (float64 for float64 predictions), mean reduction.

    Raises:
        ValueError: shapes that do not fit, or no masked patch (a mask on a CUDA device is not looked at, since
            that would stall the stream: there an empty mask gives NaN, as in the published code).
    """
    _check.check_tensor(OP, "pred", pred, 3)
    _check.check_tensor(OP, "masked", masked, 2, (*_check.FLOATS, torch.bool, torch.int64))
    images = _images.to_nchw(OP, images)
    patch = _check.pair(OP, "patch_size", patch_size)
    rows, columns = _images.check_grid(OP, images, patch)
    mean, std = _images.statistics(OP, images, mean, std)
    _check.check_same_device(OP, pred=pred, images=images, masked=masked)
    batch, channels = images.shape[:2]
    pixels = patch[0] * patch[1] * channels
    _check.check_shape(OP, "pred", pred, (batch, pred.shape[1], pixels), "(B, patches, p * p * C)")
    if norm_pix_loss and pixels < 2:
        _check.fail(OP, "norm_pix_loss", True, "at least 2 values a patch", "the variance of one value is undefined")
    _check.check_shape(OP, "masked", masked, tuple(pred.shape[:2]), "(B, patches) like pred")
    if masked.dtype == torch.int64:
        ids, weight = masked, None
        if ids.numel() == 0:
            _check.fail(OP, "masked", "no ids", "at least one masked patch", "raise mask_ratio")
    else:
        _check.check_shape(OP, "pred", pred, (batch, rows * columns, pixels), "(B, L, P) with a mask")
        mask = masked.to(_scalar_dtype(pred.dtype))
        total = mask.sum()
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not total > 0:
            _check.fail(OP, "masked", "a mask without masked patch", "at least one", "raise mask_ratio")
        ids = torch.arange(rows * columns, device=pred.device).expand(batch, -1)
        weight = (mask / total).contiguous()
    return _op(pred, images, ids, weight, mean, std, list(patch), norm_pix_loss, eps)


class MaskedPixelLoss(torch.nn.Module):
    """`masked_pixel_loss` as a module; ``forward(pred, images, masked)``."""

    def __init__(self, patch_size, norm_pix_loss=False, eps=1e-6, *, mean=None, std=None) -> None:
        super().__init__()
        self.options = dict(patch_size=patch_size, norm_pix_loss=norm_pix_loss, eps=eps, mean=mean, std=std)

    def forward(self, pred: Tensor, images: Tensor, masked: Tensor) -> Tensor:
        return masked_pixel_loss(pred, images, masked, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(pred, images, masked, patch_size, norm_pix_loss=False, eps=1e-6, *, mean=None, std=None) -> Tensor:
    images = _images.to_nchw(OP, images)
    affine = _images.affine(images, mean or (), std or (), pred.dtype)
    if masked.dtype == torch.int64:
        ids, weight = masked, torch.full(masked.shape, 1.0 / masked.numel(), dtype=affine.dtype, device=pred.device)
    else:
        ids = torch.arange(masked.shape[1], device=pred.device).expand(masked.shape)
        weight = masked.to(affine.dtype) / masked.to(affine.dtype).sum()
    target = _target(images, ids, affine, list(_check.pair(OP, "patch_size", patch_size)), norm_pix_loss, eps)
    return ((pred.to(affine.dtype) - target).square().mean(-1) * weight).sum()


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0) + 1)
    batch, patches, patch = case["batch"], case["grid"][0] * case["grid"][1], case["patch"]
    noise = torch.rand(batch, patches, generator=random)
    count = max(1, int(patches * case["ratio"]))
    ids = noise.argsort(1)[:, :count]
    masked = ids if case["ids"] else torch.zeros(batch, patches).scatter_(1, ids, 1.0)
    rows = count if case["ids"] else patches
    pred = torch.randn(batch, patch[0] * patch[1] * case["channels"], rows, generator=random).transpose(1, 2)
    pred = pred if case.get("strided") else pred.contiguous()
    kwargs = _images.random_images(case, dtype, device)
    norm_pix = case["norm_pix"] and pred.shape[2] > 1
    return dict(
        pred=pred.to(device, dtype), masked=masked.to(device), patch_size=patch, norm_pix_loss=norm_pix, **kwargs
    )


def _law(kwargs: dict) -> None:
    """Zero where the prediction is the target: the loss of the exact target is (almost) 0."""
    images = _images.to_nchw(OP, kwargs["images"])
    affine = _images.affine(images, kwargs.get("mean") or (), kwargs.get("std") or (), torch.float64)
    masked, patch = kwargs["masked"], list(kwargs["patch_size"])
    by_ids = masked.dtype == torch.int64
    ids = masked if by_ids else torch.arange(masked.shape[1], device=masked.device).expand(masked.shape)
    pred = _target(images, ids, affine, patch, kwargs["norm_pix_loss"], 1e-6).float()
    assert masked_pixel_loss(**{**kwargs, "pred": pred}) < 1e-5


SPEC = register(
    OpSpec(
        name=OP,
        function=masked_pixel_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("pred",),
        cases={
            "mask": dict(batch=2, grid=(3, 3), patch=(4, 4), channels=3, ratio=0.75, ids=False, norm_pix=False),
            "mask_norm": dict(batch=2, grid=(2, 3), patch=(5, 5), channels=3, ratio=0.5, ids=False, norm_pix=True),
            "ids_uint8": dict(
                batch=3, grid=(2, 4), patch=(4, 4), channels=3, ratio=0.75, ids=True, norm_pix=True, uint8=True,
            ),
            "one_channel": dict(
                batch=2, grid=(2, 2), patch=(3, 5), channels=1, ratio=0.5, ids=True, norm_pix=False, uint8=True,
            ),
            "many_channels": dict(batch=1, grid=(2, 2), patch=(2, 2), channels=7, ratio=0.5, ids=True, norm_pix=True),
            "strided": dict(
                batch=2, grid=(2, 3), patch=(4, 4), channels=3, ratio=0.5, ids=False, norm_pix=True, strided=True,
            ),
            "one_row": dict(batch=1, grid=(1, 1), patch=(2, 2), channels=3, ratio=1.0, ids=True, norm_pix=False),
        },
        space=dict(
            batch=(1, 2, 3), grid=((1, 1), (1, 5), (3, 2)), patch=((1, 1), (2, 2), (3, 5), (8, 8)), channels=(1, 3, 4),
            ratio=(0.25, 0.75, 1.0), ids=(False, True), norm_pix=(False, True), uint8=(False, True),
            strided=(False, True), seed=tuple(range(5)),
        ),
        bench={
            "vit_75": dict(
                batch=128, grid=(14, 14), patch=(16, 16), channels=3, ratio=0.75, ids=True, norm_pix=False, uint8=True,
            ),
            "vit_95_norm": dict(
                batch=128, grid=(14, 14), patch=(16, 16), channels=3, ratio=0.95, ids=True, norm_pix=True, uint8=True,
            ),
        },
        bytes_moved=lambda k: 3 * tensor_bytes(k["pred"]) + 2 * k["pred"].numel() * k["images"].element_size(),
        flops=lambda k: 12 * k["pred"].numel(),
        golden="dmae_pixel_loss",
        law=_law,
    )
)  # fmt: skip
