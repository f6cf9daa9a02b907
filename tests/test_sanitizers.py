"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: op tests and fuzzing in another process."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import _native

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
TESTS = "(test_accuracy or test_input_layouts or test_upstream or test_fuzz or test_empty_batch) and cpp"


def runtime(name: str) -> str | None:
    """Path of a compiler's run-time library, None where it is not installed."""
    path = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and Path(path).exists() else None


def variant() -> str:
    """The CPU variant in use here, which decides the code paths."""
    return _native.library_path("cpu").stem.rpartition("_")[2]


def why_not() -> str | None:
    if not sys.platform.startswith("linux") or not COMPILER:
        return "no g++ here"
    if os.environ.get("FASTKD_CPU_LIBRARY"):
        return "a CPU library is given by FASTKD_CPU_LIBRARY"
    if _native.why_not_loaded("cpu"):
        return _native.why_not_loaded("cpu")
    return None if runtime("libasan.so") else f"{COMPILER} comes without libasan"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def setup_constants() -> dict:
    """The compiler flags of setup.py, read without running it."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("TARGET", "VARIANT_FLAGS"):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def compile_checked(source: Path, library: Path, *options: str) -> None:
    command = [
        COMPILER,
        "-shared",
        "-fPIC",
        "-std=c++20",
        "-g1",
        "-O1",
        *CHECKS,
        *options,
        str(source),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with the sanitizers loaded first, as they must be."""
    preload = " ".join(filter(None, map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))))
    options = dict(LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **options, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_ops_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    constants = setup_constants()
    torch_folder = Path(torch.__file__).parent
    library = tmp_path / f"libfastkd_cpu_{variant()}.so"
    compile_checked(
        ROOT / "csrc/ops.cpp", library, *constants["VARIANT_FLAGS"][variant()], constants["TARGET"],
        "-fopenmp-simd", f'-DFASTKD_VARIANT="{variant()}"', f"-I{torch_folder / 'include'}", f"-I{ROOT / 'csrc'}",
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    )  # fmt: skip
    done = run(
        ["-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", "-k", TESTS,
         "tests/test_ops.py", "tests/test_fuzz.py"],
        FASTKD_CPU_LIBRARY=str(library), FASTKD_TEST_BACKENDS="cpp", FASTKD_FUZZ_EXAMPLES="10",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout


def test_the_sanitizer_sees_one_byte_too_many(tmp_path):
    """Memory of torch tensors is watched: a kernel that reads one element past the end is stopped."""
    source, library = tmp_path / "overrun.cpp", tmp_path / "liboverrun.so"
    source.write_text('extern "C" float at(const float* x, long i) { return x[i]; }\n')
    compile_checked(source, library)
    code = f"""
import ctypes, torch
read = ctypes.CDLL({str(library)!r}).at
read.restype, read.argtypes = ctypes.c_float, [ctypes.c_void_p, ctypes.c_long]
x = torch.ones(24)
print(read(x.data_ptr(), 23), flush=True)
read(x.data_ptr(), 24)
"""
    done = run(["-c", code])
    assert done.returncode != 0 and done.stdout.startswith("1.0") and "heap-buffer-overflow" in done.stderr, done.stderr
