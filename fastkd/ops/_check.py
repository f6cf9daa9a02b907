"""Argument checks with one voice: op, argument, got, expected, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, argument: str, got: object, expected: str, fix: str = "", error: type[Exception] = ValueError):
    """Raises `error` with a message that names the op, the argument, what came and what was expected."""
    raise error(f"{op}: {argument}: got {got}, expected {expected}" + (f"; {fix}" if fix else ""))


def check_tensor(op: str, argument: str, value: object, ndim: int, dtypes: Iterable[torch.dtype] = FLOATS) -> None:
    """Checks that value is a tensor with ndim dimensions and one of the given dtypes."""
    if not isinstance(value, torch.Tensor):
        fail(op, argument, type(value).__name__, "a torch.Tensor", error=TypeError)
    if value.ndim != ndim:
        fail(op, argument, f"shape {tuple(value.shape)}", f"{ndim} dimensions")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(op, argument, str(value.dtype).removeprefix("torch."), names, error=TypeError)


def check_shape(op: str, argument: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != tuple(shape):
        fail(op, argument, f"shape {tuple(value.shape)}", f"{tuple(shape)} {meaning}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    present = {name: t.device for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(present.items()))
    for name, device in present.items():
        if device != first:
            fail(op, name, f"device {device}", f"{first} like {first_name}", f"move it with .to({first_name}.device)")


def check_no_grad(op: str, argument: str, value: torch.Tensor | None, why: str) -> None:
    if value is not None and value.requires_grad:
        fail(op, argument, "a tensor that requires grad", "one without gradient", f"{why}: pass it detached")


def pair(op: str, argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """An int or a pair of positive ints as (height, width)."""
    height, width = (value, value) if isinstance(value, int) else tuple(value)
    if height < 1 or width < 1:
        fail(op, argument, value, "a positive int or a pair (height, width) of them")
    return int(height), int(width)
