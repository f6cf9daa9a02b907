"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 and keeps its registers, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import cubin  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """benchmarks/cubin.py in a process of its own: here the kernels are made for the interpreter."""
    folder = tmp_path_factory.mktemp("cubin")
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTKD_BACKEND")}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, ROOT / "benchmarks/cubin.py", "--dtype", "bfloat16", "--out", folder / "rows.jsonl"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    assert "FP_FUSION" not in result.stderr  # every launch says whether products are fused: Triton's default changes
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_kernel_compiles_for_every_architecture(rows):
    kernels = [(spec.name, kernel) for spec in cubin.triton_specs() for kernel in cubin.kernel_names(spec)]
    wanted = {(*kernel, arch) for kernel in kernels for arch in cubin.ARCHS}
    assert len(wanted) >= 3 * 7
    assert wanted <= {(row["op"], row["kernel"], row["arch"]) for row in rows}  # more: what ops share


# Bytes a thread. Triton 3.6 needs a few more registers for the 128 x 128 tile on sm_80 than there are, and for 50 keys
# on sm_100 than the assembler grants; 3.9 does not. The other two keep one address on the stack.
SPILLS = {
    ("visible_patch_embed", "_forward_kernel", 80): 96,
    ("attention", "_backward_kernel", 100): 8,
    ("linear_kl", "_whole_kernel", 100): 8,
    ("masked_consistency_loss", "_backward_resized_kernel", 80): 8,
}


def test_no_kernel_spills(rows):
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert not [r for r in rows if r["local_bytes"] > SPILLS.get((r["op"], r["kernel"], r["arch"]), 0)]


def test_shared_memory_fits_the_architecture(rows):
    most = {80: 163, 90: 227, 100: 227}  # KiB a block
    assert not [row for row in rows if row["shared"] > most[row["arch"]] * 1024]
