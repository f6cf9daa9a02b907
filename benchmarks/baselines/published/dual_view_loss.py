"""`dual_view_loss` as a sequence of tensor operations in the order of the released code: maps, DCT matrices from an FFT
of the identity that are made on every call (for the plain loss too, which has no use for them), coefficient [0, 0] set
to zero, the inverse DCT, and two normalised maps whose squared difference is summed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct(x: Tensor) -> Tensor:
    """DCT-II over the last dimension, by the FFT of the reordered signal."""
    n = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))
    angle = -math.pi * torch.arange(n, dtype=x.dtype, device=x.device) / (2 * n)
    return 2 * (spectrum.real * angle.cos() - spectrum.imag * angle.sin())


def inverse_dct(x: Tensor) -> Tensor:
    """Its inverse."""
    n = x.shape[-1]
    angle = math.pi * torch.arange(n, dtype=x.dtype, device=x.device) / (2 * n)
    half = x / 2
    shifted = torch.cat([torch.zeros_like(half[..., :1]), -half.flip(-1)[..., :-1]], dim=-1)
    real, imaginary = half * angle.cos() - shifted * angle.sin(), half * angle.sin() + shifted * angle.cos()
    signal = torch.fft.ifft(torch.complex(real, imaginary)).real
    out = torch.empty_like(signal)
    out[..., ::2], out[..., 1::2] = signal[..., : n - n // 2], signal.flip(-1)[..., : n // 2]
    return out


def transform(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix along the width, then one along the height."""
    return ((x @ columns).transpose(-1, -2) @ rows).transpose(-1, -2)


def normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def feature_loss(student: Tensor, teacher: Tensor, alpha: float, alternative: bool) -> Tensor:
    sides = [torch.eye(n, device=student.device) for n in student.shape[2:]]
    to, back = ([change(side).to(student.dtype) for side in sides] for change in (dct, inverse_dct))
    if alternative:
        views = []
        for x in (student, teacher):
            coefficients = transform(x, *to)
            mask = torch.ones_like(coefficients)
            mask[:, :, 0, 0] = 0
            views.append(transform(coefficients * mask, *back))
        student, teacher = views
    difference = torch.nn.functional.mse_loss(normalised(student), normalised(teacher), reduction="sum")
    return difference / len(student) * alpha


def published(
    student: Tensor | tuple[Tensor, Tensor], teacher: Tensor, *, alpha=(0.08, 0.06), layout: str = "tokens"
) -> tuple[Tensor, Tensor]:
    """The arguments of `fastkd.ops.dual_view_loss`, on square grids."""

    def as_map(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)

    pair = student if isinstance(student, tuple) else (student, student)
    goal = as_map(teacher)
    first, second = (
        feature_loss(as_map(x), goal, factor, alternative) for x, factor, alternative in zip(pair, alpha, (False, True))
    )
    return first, second
