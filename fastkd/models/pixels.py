"""Pixel statistics: what a network expects of its images, and how they are brought to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.ops.masked.images import affine, normalized

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Statistics = tuple[Sequence[float], Sequence[float]]


def statistics_of(model: nn.Module) -> Statistics:
    """(mean, std) that a network expects, where white is 1: its own `mean` and `std`, timm's, else ImageNet's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    for mean, std in (
        (getattr(model, "mean", None), getattr(model, "std", None)),
        (config.get("mean"), config.get("std")),
    ):
        if isinstance(mean, Sequence) and isinstance(std, Sequence):
            return tuple(mean), tuple(std)
    return IMAGENET_MEAN, IMAGENET_STD


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, H, W, C] as normalised float32 [B, C, H, W]; a single mean and std serve any number of channels."""
    channels = images.shape[-1]
    mean, std = _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
    return normalized(images.permute(0, 3, 1, 2), affine(images, mean, std, torch.float32))


def renormalize(images: Tensor, given: Statistics, wanted: Statistics) -> Tensor:
    """Images [B, C, H, W] normalised with one mean and std, as if they had been with another."""
    if tuple(map(tuple, given)) == tuple(map(tuple, wanted)):
        return images
    channels = images.shape[1]
    m0, s0, m1, s1 = (
        _per_channel(values, channels, name) for pair in (given, wanted) for values, name in zip(pair, ("mean", "std"))
    )
    mean = [(b - a) / s for a, s, b in zip(m0, s0, m1)]
    std = [b / a for a, b in zip(s0, s1)]
    return normalized(images, affine(images, mean, std, images.dtype)).to(images.dtype)


def _per_channel(values: Sequence[float], channels: int, name: str) -> list[float]:
    values = list(values) * channels if len(values) == 1 else list(values)
    if len(values) == 3 and channels == 1:  # colour statistics for a grey image
        values = [sum(values) / 3]
    if len(values) != channels:
        raise ValueError(f"{name}: got {len(values)} values, expected {channels}, one per channel of the images")
    return values
