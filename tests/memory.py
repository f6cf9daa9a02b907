"""Allocations that show misuse: they start as garbage (NaN), and on request lie between two canary bands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch.utils import _device

BAND = 256  # bytes on each side; a multiple of every alignment that kernels rely on
CANARY = 0xA5
_EMPTY, _EMPTY_LIKE = torch.empty, torch.empty_like
# ``with torch.device("meta")`` looks constructors up in a set made at its first use: that must hold the real ones.
_device._device_constructors()


def is_real(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory of its own (neither meta nor fake, and nothing is being traced)."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills with NaN, or with the largest integer: an element that is never written shows."""
    if is_real(tensor):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


@contextlib.contextmanager
def allocations(make) -> Iterator[None]:
    """Sends `torch.empty` and `torch.empty_like` through make(tensor) -> tensor."""
    previous = torch.empty, torch.empty_like
    torch.empty = lambda *args, **kwargs: make(_EMPTY(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: make(_EMPTY_LIKE(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = previous


@contextlib.contextmanager
def canaries() -> Iterator[None]:
    """Puts canary bands around everything that `torch.empty` returns; AssertionError where one was written over."""
    bands: list[tuple[torch.Tensor, str]] = []

    def guarded(plain: torch.Tensor) -> torch.Tensor:
        if not is_real(plain) or not plain.is_contiguous() or plain.layout != torch.strided:
            return poison(plain)
        size = plain.numel() * plain.element_size()
        raw = _EMPTY(size + 2 * BAND, dtype=torch.uint8, device=plain.device).fill_(CANARY)
        inner = _EMPTY(0, dtype=plain.dtype, device=plain.device)
        inner.set_(raw.untyped_storage(), BAND // plain.element_size(), plain.shape, plain.stride())
        frame = sys._getframe(2)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} {tuple(plain.shape)} {plain.dtype}"
        bands.append((raw, place))
        return poison(inner)

    with allocations(guarded):
        yield
    for raw, place in bands:
        for side, band in (("before", raw[:BAND]), ("after", raw[-BAND:])):
            assert (band == CANARY).all(), f"wrote {side} the tensor allocated at {place}"


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger buffer of garbage: a read outside the tensor brings in NaN or huge ids."""
    if tensor.ndim == 0:
        return tensor
    buffer = _EMPTY([n + 2 for n in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    if tensor.dtype in (torch.uint8, torch.bool):
        buffer.fill_(1)
    else:
        poison(buffer)
    inner = buffer[tuple(slice(1, n + 1) for n in tensor.shape)]
    return inner.copy_(tensor.detach())


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the storage order of the dimensions reversed."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.detach().permute(order).contiguous().permute(order)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first row repeated over the first dimension with stride 0."""
    return tensor.detach()[:1].expand(tensor.shape) if tensor.ndim else tensor
