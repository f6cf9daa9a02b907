"""Loads the native libraries that setup.py built, and says what is missing where they are not there."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "_lib"
REBUILD = "reinstall from the source folder: pip install --no-build-isolation --force-reinstall --no-deps ."

# Variants of the CPU library, the most capable first, with the CPU features (Linux names) that each needs.
CPU_VARIANTS = {
    "amx": ("amx_tile", "amx_bf16", "avx512_bf16", "avx512_fp16", "avx512vl", "avx512dq", "avx512bw"),
    "avx512": ("avx512f", "avx512vl", "avx512dq", "avx512bw", "fma", "f16c", "bmi2"),
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "generic": (),
}


@functools.cache
def build_info() -> dict:
    """What setup.py recorded: compiler, flags, torch headers, built libraries, and why others were not built."""
    path = FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def cpu_features() -> frozenset[str]:
    """CPU features usable here, by their Linux names (empty without the native host module)."""
    try:
        from fastkd import _host
    except ImportError:
        return frozenset()
    return frozenset(_host.cpu_features())


def library_path(kind: str) -> Path | None:
    """The library for this machine: the CPU library's best variant, or the CUDA library.

    FASTKD_CPU_LIBRARY=path takes that CPU library instead (sanitizer builds, comparing two builds).
    """
    if kind == "cpu" and os.environ.get("FASTKD_CPU_LIBRARY"):
        return Path(os.environ["FASTKD_CPU_LIBRARY"])
    if kind == "cuda":
        path = FOLDER / "libfastkd_cuda.so"
        return path if path.exists() else None
    for variant, needed in CPU_VARIANTS.items():
        path = FOLDER / f"libfastkd_cpu_{variant}.so"
        if path.exists() and cpu_features().issuperset(needed):
            return path
    return None


@functools.cache
def why_not_loaded(kind: str) -> str | None:
    """Loads the library of a kind (``cpu`` or ``cuda``) once; returns why it is not loaded, or None."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    path = library_path(kind)
    if path is None:
        reason = build_info().get("not_built", {}).get(kind, "it was not built for this machine")
        return f"the native {kind} library is not there: {reason}; {REBUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}; {REBUILD}"
    return None
