"""Shared set-up: which backends can run here, and allocations that start as NaN."""

from __future__ import annotations

import os

# Before Triton is imported anywhere: without a GPU its kernels run in the interpreter.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from fastkd.ops import SPECS, _dispatch  # noqa: E402

torch.set_num_threads(min(4, os.cpu_count() or 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_of(backend: str) -> str:
    """The device on which a backend is tested here."""
    return "cpu" if backend == "cpp" else DEVICE


def runnable_backends() -> list[str]:
    """Backends that can run on this machine; the others are covered by the compile-only tests."""
    found = ["reference"]
    kernel = next(iter(SPECS.values())).kernels[0]
    for name in ("cpp", "triton", "cuda"):
        if kernel.why_not(name, device_of(name), torch.float32) is None:
            found.append(name)
    return found


BACKENDS_HERE = runnable_backends()


def dtypes_of(backend: str) -> list[torch.dtype]:
    """Dtypes that a backend is tested in. The Triton interpreter computes 16-bit reductions wrongly: float32 only."""
    if backend in ("reference", "cpp"):
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if backend == "triton" and DEVICE == "cpu":
        return [torch.float32, torch.bfloat16]
    return [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nan_poisoned_allocations(monkeypatch):
    """`torch.empty` and `empty_like` of floating tensors start as NaN: an output that is not written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta" and not torch.compiler.is_compiling():
                tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=BACKENDS_HERE)
def each_backend(request):
    """Runs the test once per backend, forced for the whole test."""
    with _dispatch.backend(request.param):
        yield request.param
