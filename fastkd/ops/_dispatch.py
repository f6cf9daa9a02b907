"""Which implementation of a kernel runs here, and why not the others.

An op is a torch custom op, opaque to torch.compile. Its body allocates the outputs and calls a `Kernel`; all
implementations of a kernel share one signature, ``(inputs..., outputs...) -> None``, and fill the outputs:

* ``reference``  plain PyTorch, any device and dtype
* ``cpp``        ``torch.ops.fastkd_cpu.<name>`` from ``csrc/<op>.cpp``
* ``triton``     ``<op>_triton.py``; on CPU tensors only under TRITON_INTERPRET=1
* ``cuda``       ``torch.ops.fastkd_cuda.<name>`` from ``csrc/<op>.cu``

The choice is made at run time inside the opaque op, so an override reaches graphs that are already compiled.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastkd import _native

logger = logging.getLogger("fastkd")

BACKENDS = ("reference", "cpp", "triton", "cuda")
# Process-wide, not per thread: autograd runs backward kernels on threads of its own.
_forced: list[str] = []


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the block: ``with fastkd.backend("reference"):``.

    The override is process-wide. Setting the environment variable ``FASTKD_BACKEND`` does the same for a whole run.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: another name.
        RuntimeError: from an op that this backend cannot run; the message says why.
    """
    _check_name(name, "backend")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The backend forced by `backend` or FASTKD_BACKEND, or None when the choice is automatic."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("FASTKD_BACKEND")
    if name:
        _check_name(name, "FASTKD_BACKEND")
    return name or None


def _check_name(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: got {name!r}, expected one of {', '.join(BACKENDS)}")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton does not import ({error}); pip install triton"
    return None


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def device_record() -> dict[str, dict]:
    """What was measured on a GPU, by kernel: device, checks passed by backend, fastest backend; often nothing."""
    path = Path(__file__).with_name("device_record.json")
    return json.loads(path.read_text()) if path.exists() else {}


class Kernel:
    """One step of an op (its forward or its backward) with all its implementations.

    Args:
        name: name of the native functions ``torch.ops.fastkd_cpu.<name>`` and ``torch.ops.fastkd_cuda.<name>``.
        reference: plain PyTorch implementation.
        cpp: Python launcher around several native functions; by default the native function of that name. False: no C++
            kernel is written for it.
        triton: ``"module:function"``, imported on first use.
        cuda: whether ``csrc/*.cu`` holds this kernel, or a Python launcher like `cpp`.
        cuda_order: automatic order on CUDA tensors, behind the fastest backend in `device_record`.
    """

    all: dict[str, Kernel] = {}

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., None],
        cpp: Callable[..., None] | bool | None = None,
        triton: str | None = None,
        cuda: bool | Callable[..., None] = False,
        cuda_order: tuple[str, ...] = ("triton", "reference"),
    ) -> None:
        self.name = name
        self.reference = reference
        self._cpp = cpp
        self._triton = triton
        self._cuda = cuda if callable(cuda) else None
        self._has_cuda = bool(cuda)
        self._cuda_order = cuda_order
        self._logged: set[str] = set()
        self._automatic: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        Kernel.all[name] = self

    def __call__(self, *args) -> None:
        tensor = next(a for a in reversed(args) if isinstance(a, torch.Tensor))  # an output: it has the compute dtype
        device, dtype = tensor.device.type, tensor.dtype
        if forced_backend() is not None:
            return self.implementation(self.pick(device, dtype))(*args)
        run = self._automatic.get((device, dtype))
        if run is None:
            run = self._automatic[device, dtype] = self.implementation(self.pick(device, dtype))
        run(*args)

    def order(self, device: str) -> tuple[str, ...]:
        """Backends in the order in which the automatic choice tries them."""
        if device != "cuda":
            return ("cpp", "reference")
        fastest = device_record().get(self.name, {}).get("fastest")
        return self._cuda_order if fastest is None else tuple(dict.fromkeys((fastest, *self._cuda_order)))

    def pick(self, device: str, dtype: torch.dtype) -> str:
        """Name of the backend that runs for tensors of this device type and dtype."""
        forced = forced_backend()
        if forced is not None:
            reason = self.why_not(forced, device, dtype)
            if reason:
                raise RuntimeError(f"fastkd {self.name}: the forced backend {forced!r} cannot run: {reason}")
            return forced
        for name in self.order(device):
            reason = self.why_not(name, device, dtype)
            if reason is None:
                return name
            if reason not in self._logged:
                self._logged.add(reason)
                logger.info("%s: not using %s: %s", self.name, name, reason)
        return "reference"

    def why_not(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take tensors of this device type and dtype, or None where it can."""
        if backend == "reference":
            return None
        if backend == "triton":
            if self._triton is None:
                return "no Triton kernel is written for it"
            if dtype == torch.float64:
                return "Triton kernels compute in float32; float64 runs on reference and cpp"
            if device != "cuda" and not triton_interpreted():
                return f"Triton needs CUDA tensors, got {device} (or TRITON_INTERPRET=1 to debug on the CPU)"
            return triton_missing()
        wanted = "cpu" if backend == "cpp" else "cuda"
        if backend == "cpp" and self._cpp is False:
            return "no C++ kernel is written for it"
        if device != wanted:
            return f"it takes {wanted} tensors, got {device}"
        if backend == "cuda" and not self._has_cuda:
            return "no CUDA C++ kernel is written for it"
        if backend == "cuda" and dtype == torch.float64:
            return "CUDA kernels compute in float32; float64 runs on reference and cpp"
        reason = _native.why_not_loaded(wanted)
        launcher = self._cpp if backend == "cpp" else self._cuda
        if reason is None and launcher is None and not hasattr(getattr(torch.ops, f"fastkd_{wanted}"), self.name):
            reason = f"the native {wanted} library has no {self.name}: built from other sources; {_native.REBUILD}"
        return reason

    def implementation(self, backend: str) -> Callable[..., None]:
        """The callable behind a backend name."""
        if backend == "reference":
            return self.reference
        if backend == "triton":
            module, function = self._triton.split(":")
            return getattr(importlib.import_module(module), function)
        launcher = self._cpp if backend == "cpp" else self._cuda
        if launcher is not None:
            return launcher
        return getattr(getattr(torch.ops, f"fastkd_{'cpu' if backend == 'cpp' else 'cuda'}"), self.name).default
