"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: op tests and fuzzing in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from native import COMPILER, ROOT, compile_cpu_library, compile_shared, variant
from process import run_pytest, run_python

from fastkd import _native

CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1"]
TESTS = "(test_accuracy or test_input_layouts or test_upstream or test_fuzz or test_empty_batch) and cpp"


def runtime(name: str) -> str | None:
    """Path of a compiler's run-time library, None where it is not installed."""
    path = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and Path(path).exists() else None


def why_not() -> str | None:
    if not sys.platform.startswith("linux") or not COMPILER:
        return "no g++ here"
    if os.environ.get("FASTKD_CPU_LIBRARY"):
        return "a CPU library is given by FASTKD_CPU_LIBRARY"
    if _native.why_not_loaded("cpu"):
        return _native.why_not_loaded("cpu")
    return None if runtime("libasan.so") else f"{COMPILER} comes without libasan"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def sanitized(log: Path) -> dict[str, str]:
    """The environment in which the sanitizers are loaded first, as they must be; reports go to files ``log.<pid>``."""
    preload = " ".join(filter(None, map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))))
    options = f"detect_leaks=0:print_stacktrace=1:log_path={log}"
    return dict(LD_PRELOAD=preload, ASAN_OPTIONS=options, UBSAN_OPTIONS=options)


def reports(log: Path) -> str:
    return "".join(path.read_text() for path in log.parent.glob(f"{log.name}.*"))[:6000]


def test_ops_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    library = tmp_path / f"libfastkd_cpu_{variant()}.so"
    compile_cpu_library(ROOT, library, *CHECKS)
    done = run_pytest(
        "-x", "--capture=sys", "-k", TESTS, "test_ops.py", "test_fuzz.py", **sanitized(tmp_path / "report"),
        FASTKD_CPU_LIBRARY=library, FASTKD_TEST_BACKENDS="cpp", FASTKD_FUZZ_EXAMPLES=10,
    )  # fmt: skip
    assert done.returncode == 0, reports(tmp_path / "report") + done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout


def test_the_sanitizer_sees_one_byte_too_many(tmp_path):
    """Memory of torch tensors is watched: a kernel that reads one element past the end is stopped."""
    source, library = tmp_path / "overrun.cpp", tmp_path / "liboverrun.so"
    source.write_text('extern "C" float at(const float* x, long i) { return x[i]; }\n')
    compile_shared(source, library, *CHECKS)
    code = f"""
import ctypes, torch
read = ctypes.CDLL({str(library)!r}).at
read.restype, read.argtypes = ctypes.c_float, [ctypes.c_void_p, ctypes.c_long]
x = torch.ones(24)
print(read(x.data_ptr(), 23), flush=True)
read(x.data_ptr(), 24)
"""
    done = run_python("-c", code, **sanitized(tmp_path / "report"))
    assert done.returncode != 0 and done.stdout.startswith("1.0"), done.stderr
    assert "heap-buffer-overflow" in reports(tmp_path / "report")
