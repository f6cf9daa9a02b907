"""Bilinear interpolation of PyTorch's ``align_corners=False``, as whole numbers where that is possible.

Along an axis of n values that becomes m, output i lies at s = (2 i + 1) n / (2 m) - 1/2 of the input, at least 0:

    left = floor(s), right = min(left + 1, n - 1), share of the right one = s - left

The numerator of s is a whole number: kernels find `left` without rounding and each share with a single one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check


def taps(values: int, out: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(left [out] int64, right [out] int64, share of the right one [out]) of each output along one axis."""
    place = ((2 * torch.arange(out, device=device) + 1) * values - out).clamp_(min=0)
    left = place // (2 * out)
    share = (place - left * 2 * out).to(dtype) / (2 * out)
    return left, (left + 1).clamp_(max=values - 1), share


def matrix(values: int, out: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[out, values]: interpolation along one axis as a matrix; its transpose is the gradient."""
    left, right, share = taps(values, out, device, dtype)
    cell = torch.arange(values, device=device)
    return (cell == left[:, None]) * (1 - share)[:, None] + (cell == right[:, None]) * share[:, None]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W]; the input itself where nothing changes."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_backward(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient of `resize` for the input [B, C, h, w] of this size; products in a fixed order, no atomics."""
    if tuple(grad.shape[2:]) == tuple(size):
        return grad
    down, across = (matrix(n, m, grad.device, grad.dtype) for n, m in zip(size, grad.shape[2:]))
    return down.t() @ (grad @ across)


def check_size(op: str, given: tuple[int, int], size: tuple[int, int]) -> None:
    """ValueError where the whole numbers of the kernels would not fit 32 bits: beyond about 32,000 pixels a side."""
    if tuple(given) != tuple(size) and any((2 * m + 1) * n >= 2**31 for n, m in zip(given, size)):
        _check.fail(
            op, "size", tuple(size), f"fewer pixels, for logits of {tuple(given)}", "cut the picture into tiles"
        )
