"""Patch embedding of the visible patches only (DMAE, Bai et al. 2023; MAE, He et al. 2022, section 3).

A ViT embeds all L patches and then drops the masked ones. Patches do not mix in a convolution whose stride is its
kernel, so dropping first is exact. With n visible patches and R prefix tokens (class token, registers), per image b:

    out[b, r]     = prefix[r]                                                           r < R
    out[b, R + j] = W x_bj + bias + pos_embed[ids[b, j]]                                j < n

x_bj holds the P = C * ph * pw normalised pixels of patch ids[b, j] in the weight's (channel, row, column) order. With
G = d loss / d out, and sums over all images b and visible patches j:

    dW = sum G[b, R + j] x_bj^T        dbias = sum G[b, R + j]        dprefix[r] = sum_b G[b, r]

Pixels are normalised and rounded to the weight's dtype on their way from the image to the matrix product: a float copy
of an image never exists. The backward pass gathers the pixels again, which is cheaper than keeping B * n * P of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import images as _images

OP = "visible_patch_embed"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _options(like: Tensor) -> dict:
    return dict(dtype=like.dtype, device=like.device)


def _rows(images: Tensor, ids: Tensor, affine: Tensor, weight_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    # [B, n, P] pixels of the visible patches.
    batch, channels, height, width = images.shape
    ph, pw = weight_shape[2:]
    cut = images.reshape(batch, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    picked = cut[torch.arange(batch, device=ids.device)[:, None], ids]
    scale, shift = affine[:, :, None, None]
    return (picked.to(affine.dtype) * scale + shift).to(dtype).flatten(2)


def _fill_forward(images, ids, weight, bias, pos_embed, prefix, affine, out) -> None:
    wide = affine.dtype
    x = F.linear(_rows(images, ids, affine, weight.shape, weight.dtype), weight.flatten(1)).to(wide)
    if bias is not None:
        x = x + bias.to(wide)
    if pos_embed is not None:
        x = x + pos_embed.to(wide)[ids]
    num_prefix = out.shape[1] - ids.shape[1]
    out[:, num_prefix:] = x
    if num_prefix:
        out[:, :num_prefix] = prefix


def _fill_backward(grad_out, images, ids, affine, grad_weight, grad_bias, grad_prefix) -> None:
    wide, num_prefix = affine.dtype, grad_prefix.shape[0]
    rows = _rows(images, ids, affine, grad_weight.shape, grad_weight.dtype).flatten(0, 1)
    grad = grad_out[:, num_prefix:].flatten(0, 1)
    grad_weight.copy_((grad.t() @ rows).view(grad_weight.shape))
    grad_bias.copy_(grad.sum(0, dtype=wide))
    grad_prefix.copy_(grad_out[:, :num_prefix].sum(0, dtype=wide))


def _native_forward(library: str, images, ids, weight, bias, pos_embed, prefix, affine, out) -> None:
    native, patch = getattr(torch.ops, library), list(weight.shape[2:])
    rows = torch.empty(ids.numel(), weight[0].numel(), **_options(weight))
    projected = out.flatten(0, 1) if prefix is None else torch.empty(len(rows), len(weight), **_options(weight))
    native.visible_patch_rows(images, ids, affine, patch, rows)
    torch.mm(rows, weight.flatten(1).t(), out=projected)  # an `out=` call: autocast leaves it alone
    native.visible_patch_finish(projected, ids, bias, pos_embed, prefix, out)


def _native_backward(library: str, grad_out, images, ids, affine, grad_weight, grad_bias, grad_prefix) -> None:
    native, patch, options = getattr(torch.ops, library), list(grad_weight.shape[2:]), _options(grad_out)
    rows = torch.empty(ids.numel(), grad_weight[0].numel(), **options)
    copy = None
    if len(grad_prefix) or not grad_out.is_contiguous():
        copy = torch.empty(len(rows), len(grad_weight), **options)
    native.visible_patch_rows(images, ids, affine, patch, rows)
    native.visible_patch_sums(grad_out, copy, grad_bias, grad_prefix)
    grad = grad_out.flatten(0, 1) if copy is None else copy
    torch.mm(grad.t(), rows, out=grad_weight.flatten(1))


_TRITON = "fastkd.ops.masked.visible_patch_embed_triton"
forward = Kernel(
    OP, reference=_fill_forward, triton=f"{_TRITON}:forward",
    cpp=partial(_native_forward, "fastkd_cpu"), cuda=partial(_native_forward, "fastkd_cuda"),
)  # fmt: skip
backward = Kernel(
    f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward",
    cpp=partial(_native_backward, "fastkd_cpu"), cuda=partial(_native_backward, "fastkd_cuda"),
)  # fmt: skip


def _empty_out(ids: Tensor, weight: Tensor, prefix: Tensor | None) -> Tensor:
    num_prefix = 0 if prefix is None else prefix.shape[0]
    return torch.empty(
        ids.shape[0], num_prefix + ids.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device
    )


@custom_op("visible_patch_embed")
def _op(
    images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, prefix: Tensor | None,
    mean: Sequence[float], std: Sequence[float],
) -> Tensor:  # fmt: skip
    out = _empty_out(ids, weight, prefix)
    # These are small: a copy of the odd strided one keeps the kernels simple.
    weight, bias, pos_embed, prefix = (t if t is None else t.contiguous() for t in (weight, bias, pos_embed, prefix))
    forward(images, ids, weight, bias, pos_embed, prefix, _images.affine(images, mean, std, weight.dtype), out)
    return out


@_op.register_fake
def _(images, ids, weight, bias, pos_embed, prefix, mean, std):
    return _empty_out(ids, weight, prefix)


def _empty_gradients(grad_out: Tensor, num_prefix: int, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    width = weight_shape[0]
    shapes = list(weight_shape), [width], [num_prefix, width]
    return tuple(torch.empty(shape, **_options(grad_out)) for shape in shapes)


@custom_op("visible_patch_embed_backward")
def _op_backward(
    grad_out: Tensor, images: Tensor, ids: Tensor, num_prefix: int, weight_shape: Sequence[int],
    mean: Sequence[float], std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _empty_gradients(grad_out, num_prefix, weight_shape)
    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    backward(grad_out, images, ids, _images.affine(images, mean, std, grad_out.dtype), *gradients)
    return gradients


@_op_backward.register_fake
def _(grad_out, images, ids, num_prefix, weight_shape, mean, std):
    return _empty_gradients(grad_out, num_prefix, weight_shape)


def _setup_context(ctx, inputs, output) -> None:
    images, ids, weight, bias, _, prefix, ctx.mean, ctx.std = inputs
    ctx.weight_shape, ctx.has_bias = list(weight.shape), bias is not None
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]
    ctx.save_for_backward(images, ids)


def _autograd(ctx, grad_out: Tensor):
    weight, bias, prefix = _op_backward(
        grad_out, *ctx.saved_tensors, ctx.num_prefix, ctx.weight_shape, ctx.mean, ctx.std
    )
    return None, None, weight, bias if ctx.has_bias else None, None, prefix if ctx.num_prefix else None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def visible_patch_embed(
    images: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Embeds the visible patches of images, adds their positions and puts prefix tokens in front.

    Equals ``conv2d`` over the whole image, plus positions, then picking ids_keep, at n / L of its cost. All inputs may
    have any strides. Gradients flow to weight, bias and prefix; images and pos_embed are constants.

    Args:
        images: [B, C, H, W] floating, or [B, H, W, C] uint8 (then pixels are divided by 255 first).
        ids_keep: [B, n] int64 in [0, L), raster index of the visible patches in the order of the output;
            L = (H / ph) * (W / pw).
        weight: [D, C, ph, pw] of the patch convolution; its dtype, or that of an enabled autocast, is the dtype in
            which pixels and weight are multiplied (float32 accumulation) and of the output.
        bias: [D] or None.
        pos_embed: [L, D] positions of the patches (no prefix rows), added in float32, or None.
        prefix: [R, D] rows that start every image, such as class token plus its position, or None for R = 0.
        mean, std: per-channel statistics that normalise the pixels in the kernel.

    Returns:
        [B, R + n, D].

    Raises:
        ValueError: shapes or devices that do not fit, images or pos_embed that require grad.
        TypeError: dtypes that are not floating, ids_keep that is not int64.
    """
    images = _images.to_nchw(OP, images)
    _check.check_tensor(OP, "weight", weight, 4)
    width, channels, *patch = weight.shape
    _check.check_shape(OP, "weight", weight, (width, images.shape[1], *patch), "(D, channels of the images, ph, pw)")
    rows, columns = _images.check_grid(OP, images, tuple(patch))
    mean, std = _images.statistics(OP, images, mean, std)
    _check.check_tensor(OP, "ids_keep", ids_keep, 2, (torch.int64,))
    batch = images.shape[0]
    _check.check_shape(OP, "ids_keep", ids_keep, (batch, ids_keep.shape[1]), "(B, n)")
    if ids_keep.shape[1] == 0:
        _check.fail(OP, "ids_keep", f"shape {tuple(ids_keep.shape)}", "at least one patch", "lower mask_ratio")
    if bias is not None:
        _check.check_tensor(OP, "bias", bias, 1)
        _check.check_shape(OP, "bias", bias, (width,), "(D,)")
    if pos_embed is not None:
        _check.check_tensor(OP, "pos_embed", pos_embed, 2)
        _check.check_shape(OP, "pos_embed", pos_embed, (rows * columns, width), "(L, D), patches without prefix rows")
        _check.check_no_grad(
            OP, "pos_embed", pos_embed,
            "the table is a constant here; for a learned one pass None and add pos_embed[ids_keep] to the result, or",
        )  # fmt: skip
    if prefix is not None:
        _check.check_tensor(OP, "prefix", prefix, 2)
        _check.check_shape(OP, "prefix", prefix, (prefix.shape[0], width), "(R, D)")
    _check.check_same_device(
        OP, images=images, ids_keep=ids_keep, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix
    )
    device, dtype = weight.device.type, weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weight, bias, prefix = (t if t is None else t.to(dtype) for t in (weight, bias, prefix))
    if pos_embed is not None and pos_embed.dtype != dtype:
        pos_embed = pos_embed.to(_wide(dtype))
    return _op(images, ids_keep, weight, bias, pos_embed, prefix, mean, std)


def _reference(images, ids_keep, weight, bias, pos_embed, prefix=None, *, mean=None, std=None) -> Tensor:
    images = _images.to_nchw(OP, images)
    affine = _images.affine(images, mean or (), std or (), weight.dtype)
    pixels = _images.normalized(images, affine).to(weight.dtype)
    x = F.conv2d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    x = x if pos_embed is None else x + pos_embed
    x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2])).to(weight.dtype)
    return x if prefix is None else torch.cat((prefix.to(x.dtype).expand(len(x), -1, -1), x), 1)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0) + 1)
    batch, patches, width = case["batch"], case["grid"][0] * case["grid"][1], case["width"]
    channels, patch = case["channels"], case["patch"]
    ids = torch.rand(batch, patches, generator=random).argsort(1)[:, : max(1, int(patches * case["keep"]))]
    scale = (channels * patch[0] * patch[1]) ** -0.5

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random).to(device, dtype)
        if case.get("strided"):  # the same values, dimensions laid out in reverse
            backwards = tuple(range(len(shape)))[::-1]
            values = values.permute(backwards).contiguous().permute(backwards)
        return values

    return dict(
        ids_keep=ids.to(device),
        weight=normal(width, channels, *patch) * scale,
        bias=normal(width) if case.get("bias", True) else None,
        pos_embed=normal(patches, width),
        prefix=normal(case["prefix"], width) if case["prefix"] else None,
        **_images.random_images(case, dtype, device),
    )


def _law(kwargs: dict) -> None:
    """Visible patches in another order give the same rows in that order."""
    ids, num_prefix = kwargs["ids_keep"], 0 if kwargs["prefix"] is None else len(kwargs["prefix"])
    out, flipped = (visible_patch_embed(**{**kwargs, "ids_keep": i})[:, num_prefix:] for i in (ids, ids.flip(1)))
    torch.testing.assert_close(flipped.flip(1), out)


_CASE = dict(batch=2, grid=(3, 3), patch=(4, 4), channels=3, width=16, keep=0.5, prefix=1)
_VIT = dict(batch=128, grid=(14, 14), patch=(16, 16), channels=3, width=768, prefix=1, uint8=True)

SPEC = register(
    OpSpec(
        name=OP,
        function=visible_patch_embed,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("weight", "bias", "prefix"),
        cases={
            "uint8": _CASE | dict(grid=(3, 4), width=24, uint8=True),
            "float": _CASE | dict(batch=3, grid=(2, 3), patch=(5, 5), width=17),
            "tall_patch": _CASE | dict(grid=(2, 2), patch=(3, 7), width=8, keep=0.75, prefix=2, uint8=True),
            "keep_one": _CASE | dict(grid=(4, 4), patch=(2, 2), width=12, keep=0.01, uint8=True),
            "keep_all": _CASE | dict(grid=(2, 3), keep=1.0),
            "no_prefix_no_bias": _CASE | dict(prefix=0, bias=False),
            "registers": _CASE | dict(prefix=5, uint8=True),
            "one_channel": _CASE | dict(channels=1, uint8=True),
            "many_channels": _CASE | dict(batch=1, grid=(2, 2), patch=(3, 3), channels=9, width=10),
            "one_pixel": _CASE | dict(batch=1, grid=(1, 2), patch=(1, 1), channels=1, width=1),
            "strided": _CASE | dict(grid=(2, 3), prefix=2, strided=True),
            "several_tiles": _CASE | dict(batch=5, grid=(4, 8), patch=(8, 8), width=136, uint8=True),
        },
        space=dict(
            batch=(1, 2, 3), grid=((1, 1), (1, 5), (3, 2)), patch=((1, 1), (2, 2), (3, 5), (8, 8)), channels=(1, 3, 4),
            width=(1, 5, 16), keep=(0.01, 0.5, 1.0), prefix=(0, 1, 3), bias=(False, True), uint8=(False, True),
            strided=(False, True), seed=tuple(range(5)),
        ),
        bench={"vit_b_75": _VIT | dict(keep=0.25), "vit_b_95": _VIT | dict(keep=0.05)},
        # Pixels twice, the weight read and its gradient written, the output written and its gradient read.
        bytes_moved=lambda k: 2 * k["ids_keep"].numel() * k["weight"][0].numel() * k["images"].element_size()
        + 2 * tensor_bytes(k["weight"])
        + 2 * k["ids_keep"].numel() * len(k["weight"]) * k["weight"].element_size(),
        flops=lambda k: 2 * 2 * k["ids_keep"].numel() * k["weight"].numel(),
        law=_law,
    )
)  # fmt: skip
