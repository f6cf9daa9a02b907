"""How a training process treats the host: memory stays with it from step to step."""

from __future__ import annotations

import ctypes

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
