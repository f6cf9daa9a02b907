"""How every masked op reads images: float NCHW, or uint8 NHWC with mean and std folded into the load.

Kernels see a logical NCHW view with arbitrary strides and compute ``pixel * scale + shift`` per channel, so a
normalised float copy of an image never exists.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check

PIXELS = (*_check.FLOATS, torch.uint8)


def to_nchw(op: str, images: Tensor) -> Tensor:
    """Logical [B, C, H, W] view of float NCHW or uint8 NHWC images."""
    _check.check_tensor(op, "images", images, 4, PIXELS)
    _check.check_no_grad(op, "images", images, "the op has no gradient for images")
    return images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images


def check_grid(op: str, images: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Patches (rows, columns) of NCHW images; ValueError where the patch does not divide the image."""
    height, width = images.shape[2:]
    if height % patch[0] or width % patch[1]:
        _check.fail(
            op, "images", f"{height} x {width} pixels", f"multiples of the patch {patch[0]} x {patch[1]}",
            "resize or crop the images",
        )  # fmt: skip
    return height // patch[0], width // patch[1]


def statistics(op: str, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None):
    """mean and std as lists of one float per channel of NCHW images; empty where none are given."""
    lists = []
    for name, values in (("mean", mean), ("std", std)):
        values = [] if values is None else [float(v) for v in values]
        if values and len(values) != images.shape[1]:
            _check.fail(op, name, f"{len(values)} values", f"one per channel ({images.shape[1]})")
        lists.append(values)
    if any(s <= 0 for s in lists[1]):
        _check.fail(op, "std", lists[1], "positive numbers")
    return lists


def affine(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[2, C] scale and shift so that ``pixel * scale + shift`` is the normalised pixel, in float32 (or float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    return _affine(tuple(mean), tuple(std), images.shape[1], unit, wide, images.device)


@functools.lru_cache(maxsize=64)
def _affine(mean: tuple, std: tuple, channels: int, unit: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cached: a host-to-device copy in every step would stall the stream.
    mean = torch.tensor(mean or [0.0] * channels, dtype=torch.float64)
    std = torch.tensor(std or [1.0] * channels, dtype=torch.float64)
    return torch.stack((1 / (unit * std), -mean / std)).to(device, dtype)


def normalized(images: Tensor, affine: Tensor) -> Tensor:
    """Reference of the kernels' load: NCHW pixels as float32 (or float64), normalised."""
    scale, shift = affine[:, :, None, None]
    return images.to(affine.dtype) * scale + shift


def patchify(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cuts images into patches.

    Args:
        images: [B, C, H, W].
        patch_size: side p of a patch, or (height, width).

    Returns:
        [B, L, p * p * C], patches in raster order, each as (row, column, channel), channel fastest (MAE).
    """
    patch = _check.pair("patchify", "patch_size", patch_size)
    rows, columns = check_grid("patchify", images, patch)
    batch, channels = images.shape[:2]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int | tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """Inverse of `patchify`.

    Args:
        patches: [B, L, p * p * C].
        patch_size: side p of a patch, or (height, width).
        grid: patches (rows, columns); default a square grid.

    Returns:
        [B, C, H, W].
    """
    patch = _check.pair("unpatchify", "patch_size", patch_size)
    batch, count, pixels = patches.shape
    rows, columns = grid or (round(count**0.5),) * 2
    if rows * columns != count:
        _check.fail("unpatchify", "patches", f"{count} patches", f"{rows} x {columns}", "pass grid=(rows, columns)")
    channels, rest = divmod(pixels, patch[0] * patch[1])
    if rest:
        _check.fail("unpatchify", "patches", f"{pixels} values a patch", f"a multiple of {patch[0]} x {patch[1]}")
    cut = patches.reshape(batch, rows, columns, *patch, channels).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(batch, channels, rows * patch[0], columns * patch[1])


def random_images(case: dict, dtype: torch.dtype, device) -> dict:
    """Sample images of an OpSpec case: uint8 NHWC with mean and std, or float NCHW, strided on request."""
    random = torch.Generator().manual_seed(case.get("seed", 0))
    (rows, columns), (ph, pw) = case["grid"], case["patch"]
    shape = (case["batch"], rows * ph, columns * pw, case["channels"])
    if case.get("uint8"):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        channels = case["channels"]
        extra = dict(mean=[0.4 + 0.01 * c for c in range(channels)], std=[0.2 + 0.01 * c for c in range(channels)])
    else:
        images = torch.randn(shape, generator=random).permute(0, 3, 1, 2).to(dtype)
        images = images if case.get("strided") else images.contiguous()
        extra = {}
    return dict(images=images.to(device), **extra)
