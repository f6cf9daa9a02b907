"""Colour jitter and blur of normalised images, on their device and without waiting for it.

What MIC and its hosts do to the student's view of a target image, while the teacher sees the image as it is. Every
image draws its own numbers; each effect is computed for all images and taken for those that drew it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.models.pixels import renormalize

PIXELS = ((0.0,), (1.0,))  # mean and std of images where white is 1


def student_view(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    strength: float = 0.2,
    jitter_probability: float = 0.8,
    blur_probability: float = 0.5,
    sigma: tuple[float, float] = (0.15, 1.15),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images with brightness, contrast, saturation and hue changed, then blurred.

    Args:
        images: [B, C, H, W] floating, normalised with `mean` and `std`; saturation and hue change where C is 3.
        strength: factors of brightness, contrast and saturation are drawn from 1 - strength to 1 + strength, the hue is
            turned by up to strength times a full turn, either way.
        jitter_probability, blur_probability: shares of the images that are jittered and blurred.
        sigma: range of the blur's standard deviation in pixels.
        generator: of all random numbers, on the images' device.

    Returns:
        [B, C, H, W], normalised, dtype of the images; without gradient.
    """
    with torch.no_grad():
        batch, channels = images.shape[:2]
        draw = torch.rand((7, batch, 1, 1, 1), generator=generator, device=images.device)
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        pixels = renormalize(images.to(dtype), (mean, std), PIXELS)
        jittered = _jitter(pixels, strength * (2 * draw[:4] - 1), channels == 3)
        pixels = torch.where(draw[4] < jitter_probability, jittered, pixels)
        blurred = _blur(pixels, sigma[0] + (sigma[1] - sigma[0]) * draw[5].flatten())
        pixels = torch.where(draw[6] < blur_probability, blurred, pixels)
        return renormalize(pixels, PIXELS, (mean, std)).to(images.dtype)


def _grey(pixels: Tensor, colour: bool) -> Tensor:
    """Brightness of each pixel, [B, 1, H, W]: ITU-R BT.601 of red, green and blue, else the mean of the channels."""
    if not colour:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _jitter(pixels: Tensor, change: Tensor, colour: bool) -> Tensor:
    brightness, contrast, saturation, hue = change
    pixels = (pixels * (1 + brightness)).clamp(0, 1)
    average = _grey(pixels, colour).mean((2, 3), keepdim=True)
    pixels = (average + (pixels - average) * (1 + contrast)).clamp(0, 1)
    if colour:
        grey = _grey(pixels, colour)
        pixels = (grey + (pixels - grey) * (1 + saturation)).clamp(0, 1)
        pixels = _turn_hue(pixels, hue * (2 * torch.pi)).clamp(0, 1)
    return pixels


def _turn_hue(pixels: Tensor, angle: Tensor) -> Tensor:
    """Rotates the two chrominances of YIQ: linear, where a detour through HSV would branch per pixel."""
    red, green, blue = pixels.split(1, 1)
    y = _grey(pixels, True)
    i, q = 0.5959 * red - 0.2746 * green - 0.3213 * blue, 0.2115 * red - 0.5227 * green + 0.3112 * blue
    i, q = i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()
    return torch.cat((y + 0.956 * i + 0.619 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q), 1)


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of each image's own width, cut off at 4 pixels, columns after rows; edges are reflected."""
    batch, channels, height, width = pixels.shape
    result = pixels.reshape(1, batch * channels, height, width)
    for axis, length in ((2, height), (3, width)):
        radius = min(4, length - 1)
        offset = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
        kernel = (-0.5 * (offset / sigma[:, None]).square()).softmax(1).repeat_interleave(channels, 0)
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        kernel = kernel[:, None, :, None] if axis == 2 else kernel[:, None, None]
        result = F.conv2d(F.pad(result, pad, mode="reflect"), kernel.contiguous(), groups=batch * channels)
    return result.view_as(pixels)
