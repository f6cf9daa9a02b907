"""Compiles the CPU library with other flags: sanitizers, planted bugs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import torch

from fastkd import _native

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++")


def variant() -> str:
    """The CPU variant in use here, which decides the code paths."""
    return _native.library_path("cpu").stem.rpartition("_")[2]


def setup_constants() -> dict:
    """The compiler flags of setup.py, read without running it."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("TARGET", "VARIANT_FLAGS"):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def compile_shared(source: Path, library: Path, *options: str) -> None:
    """Compiles one file to a shared library; AssertionError with the compiler's words where it fails."""
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", "-O1", *options, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_cpu_library(sources: Path, library: Path, *options: str) -> None:
    """Compiles csrc/ops.cpp of the given source folder as the variant in use here, but fast and with `options`."""
    constants, torch_folder = setup_constants(), Path(torch.__file__).parent
    # Options for the linker come after the source.
    compile_shared(
        sources / "csrc/ops.cpp", library, *constants["VARIANT_FLAGS"][variant()], constants["TARGET"], "-fopenmp-simd",
        f'-DFASTKD_VARIANT="{variant()}"', f"-I{torch_folder / 'include'}", f"-I{sources / 'csrc'}", *options,
        f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu",
    )  # fmt: skip
