"""Every CUDA source compiles with nvcc for all architectures and keeps its registers; no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
ARCHS = ("80", "90a", "100")


def find_nvcc() -> str | None:
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=str(Path(folder) / "bin")) for folder in folders if folder)
    return next(filter(None, found), None) or shutil.which("nvcc")


NVCC = find_nvcc()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit: nvcc is neither in CUDA_HOME nor on the PATH"),
    pytest.mark.skipif(not SOURCES, reason="no CUDA sources beside the tests"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    """What ptxas says about each source."""
    folder = tmp_path_factory.mktemp("nvcc")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in ARCHS if f"sm_{arch.rstrip('a')}" in known]
    assert archs, f"nvcc knows none of {ARCHS}"

    def compile_one(source: Path) -> str:
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        command = [NVCC, "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", *gencode, "-Xptxas", "-v", "--threads", "0"]
        command += ["-Werror", "all-warnings", "-c", source, "-o", folder / f"{source.stem}.o"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compile_one, SOURCES)))


@pytest.mark.parametrize("name", [source.stem for source in SOURCES])
def test_compiles_without_warnings_and_spills(reports, name):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", reports[name])
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", reports[name])]
    assert len(spills) == len(registers) >= len(ARCHS) - 1
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 128  # 512 threads a block
