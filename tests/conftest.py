"""Shared set-up: which backends can run here, and allocations that start as NaN."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

# Before Triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import memory  # noqa: E402
import pytest  # noqa: E402

from fastkd.ops import BACKENDS, SPECS, OpSpec, _dispatch  # noqa: E402

# Test tensors are tiny; accuracy tests and fuzzing use several threads.
torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_of(backend: str) -> str:
    """The device on which a backend is tested here."""
    return "cpu" if backend == "cpp" else DEVICE


def backends_of(spec: OpSpec) -> list[str]:
    """Backends that can run all kernels of an op on this machine; compile-only tests cover the others.

    FASTKD_TEST_BACKENDS=cpp,reference narrows the choice (the sanitizer run tests one library only).
    """
    allowed = os.environ.get("FASTKD_TEST_BACKENDS", ",".join(BACKENDS)).split(",")
    return [
        name for name in BACKENDS
        if name in allowed and all(k.why_not(name, device_of(name), torch.float32) is None for k in spec.kernels)
    ]  # fmt: skip


# Backends in which at least one op runs here.
BACKENDS_HERE = [name for name in BACKENDS if any(name in backends_of(spec) for spec in SPECS.values())]


def dtypes_of(backend: str) -> list[torch.dtype]:
    """Dtypes that a backend is tested in."""
    if backend in ("reference", "cpp"):
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    return [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def prefer(name: str) -> Iterator[None]:
    """Every op takes this backend where it has it, else the usual choice (models contain ops without Triton kernel)."""
    original = _dispatch.Kernel.order
    _dispatch.Kernel.order = lambda self, device: (name, *original(self, device))
    try:
        yield
    finally:
        _dispatch.Kernel.order = original


@pytest.fixture(autouse=True)
def one_thread():
    """What a test sets does not reach the next one: bits of a training run depend on the number of threads."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def several_threads():
    """Kernels split their work, also on a machine with one core."""
    torch.set_num_threads(3)


@pytest.fixture(autouse=True)
def nan_poisoned_allocations():
    """`torch.empty` and `torch.empty_like` start as NaN: an output that is not written shows."""
    with memory.allocations(memory.poison):
        yield


@pytest.fixture(params=BACKENDS_HERE)
def each_backend(request):
    """Runs the test once per backend, forced for the whole test."""
    with _dispatch.backend(request.param):
        yield request.param
