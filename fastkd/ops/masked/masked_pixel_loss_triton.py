"""Triton kernels of `masked_pixel_loss`: one program per predicted patch, its pixels in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _pixels(images, ids, affine, row, k, valid, columns, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
            ids_b, ids_k, img_b, img_c, img_h, img_w, b, NORM: tl.constexpr, eps, BLOCK: tl.constexpr):  # fmt: skip
    # Patch k of image b in (row, column, channel) order, normalised, as float32.
    i = tl.arange(0, BLOCK)
    patch = tl.load(ids + b * ids_b + k * ids_k)
    y = (patch // columns) * PH + i // (C * PW)
    x = (patch % columns) * PW + (i // C) % PW
    c = i % C
    pixel = tl.load(images + b * img_b + c * img_c + y * img_h + x * img_w, mask=valid, other=0).to(tl.float32)
    target = pixel * tl.load(affine + c) + tl.load(affine + C + c)
    if NORM:
        P: tl.constexpr = C * PH * PW
        mean = tl.sum(tl.where(valid, target, 0.0), axis=0) / P
        centred = tl.where(valid, target - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / (P - 1)
        target = centred / tl.sqrt(variance + eps)
    return target


@triton.jit
def _forward_kernel(pred, images, ids, weight, affine, partial, rows, columns, uniform, eps,
                    pred_b, pred_k, pred_p, ids_b, ids_k, img_b, img_c, img_h, img_w,
                    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, k = row // rows, row % rows
    w = tl.load(weight + row).to(tl.float32) if WEIGHTED else uniform
    i = tl.arange(0, BLOCK)
    P: tl.constexpr = C * PH * PW
    # A visible patch (weight 0) reads nothing.
    valid = i < tl.where(w != 0, P, 0)
    target = _pixels(images, ids, affine, row, k, valid, columns, C, PH, PW, ids_b, ids_k, img_b, img_c, img_h, img_w,
                     b, NORM, eps, BLOCK)  # fmt: skip
    x = tl.load(pred + b * pred_b + k * pred_k + i * pred_p, mask=valid, other=0.0).to(tl.float32)
    difference = tl.where(valid, x - target, 0.0)
    tl.store(partial + row, tl.sum(difference * difference, axis=0) * (w / P))


@triton.jit
def _backward_kernel(grad_loss, pred, images, ids, weight, affine, grad_pred, rows, columns, uniform, eps,
                     pred_b, pred_k, pred_p, ids_b, ids_k, img_b, img_c, img_h, img_w,
                     C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, k = row // rows, row % rows
    w = tl.load(weight + row).to(tl.float32) if WEIGHTED else uniform
    i = tl.arange(0, BLOCK)
    P: tl.constexpr = C * PH * PW
    valid = i < tl.where(w != 0, P, 0)
    target = _pixels(images, ids, affine, row, k, valid, columns, C, PH, PW, ids_b, ids_k, img_b, img_c, img_h, img_w,
                     b, NORM, eps, BLOCK)  # fmt: skip
    x = tl.load(pred + b * pred_b + k * pred_k + i * pred_p, mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(grad_loss).to(tl.float32) * w * (2.0 / P)
    gradient = tl.where(valid, (x - target) * scale, 0.0)
    tl.store(grad_pred + row * P + i, gradient.to(grad_pred.dtype.element_ty), mask=i < P)


def _launch_options(pred, images, ids, weight, affine, patch, norm_pix, eps) -> tuple[tuple, dict]:
    batch, rows, pixels = pred.shape
    block = triton.next_power_of_2(pixels)
    scalars = (rows, images.shape[3] // patch[1], 1.0 / (batch * rows), eps)
    strides = (*pred.stride(), *ids.stride(), *images.stride())
    options = dict(
        C=images.shape[1], PH=patch[0], PW=patch[1], NORM=norm_pix, WEIGHTED=weight is not None, BLOCK=block,
        num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True,
    )  # fmt: skip
    return (*scalars, *strides), options


def forward(pred, images, ids, weight, affine, patch, norm_pix, eps, loss: torch.Tensor) -> None:
    """Fills the scalar loss; a partial sum per patch, then one ordered reduction (no atomics)."""
    partial = torch.empty(pred.shape[0] * pred.shape[1], dtype=torch.float32, device=pred.device)
    scalars, options = _launch_options(pred, images, ids, weight, affine, patch, norm_pix, eps)
    given = weight if weight is not None else partial
    _forward_kernel[(partial.numel(),)](pred, images, ids, given, affine, partial, *scalars, **options)
    torch.sum(partial, dim=0, out=loss)


def backward(grad_loss, pred, images, ids, weight, affine, patch, norm_pix, eps, grad_pred: torch.Tensor) -> None:
    """Fills grad_pred, contiguous [B, K, P]."""
    scalars, options = _launch_options(pred, images, ids, weight, affine, patch, norm_pix, eps)
    given = weight if weight is not None else grad_loss
    grid = (pred.shape[0] * pred.shape[1],)
    _backward_kernel[grid](grad_loss, pred, images, ids, given, affine, grad_pred, *scalars, **options)
