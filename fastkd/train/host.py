"""How a training process is set up: memory stays with it from step to step, and a seed gives the same bits twice."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_memory() -> bool:
    """Makes freed memory stay with this process; False where the C library is not glibc.

    A step on the CPU frees and allocates the same activations again and again. By default glibc hands large blocks back
    to the kernel, which clears every page anew: tens of thousands of page faults a step. With one arena the blocks that
    backward frees on its own thread serve the next forward. Called before other threads have allocated.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**31 - 1, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(option, value) == 1 for option, value in options.items()])


@contextlib.contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Inside, what torch's own CUDA kernels add up comes in a fixed order, as in all of fastkd's.

    Attention of many tokens is torch's, and its backward adds gradients in any order unless it is told not to. Entered
    before the first product on the device: cuBLAS takes its workspace from the environment then.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
