"""What every benchmark here needs: provenance, timing, roofs measured in the same run, and JSONL rows."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # the benchmarks also run from a source folder where fastkd is not installed
    sys.path.insert(0, str(ROOT))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str:
    """Short hash of the checked-out commit, with + where files that matter here are changed; else $FASTKD_COMMIT."""
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return os.environ.get("FASTKD_COMMIT", "unknown")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "fastkd", "csrc", "benchmarks/*.py")
    return head + ("+" if changed else "")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    fields = dict(line.split(":", 1) for line in _cpuinfo() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in fields.get("flags", "").split()]
    return (
        f"{fields.get('model name') or platform.processor() or platform.machine()} ({units[0] if units else 'generic'})"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0].splitlines() if path.exists() else []


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(device: str) -> dict:
    """Fields that every row carries."""
    row = dict(
        device=device_name(device), device_type=device, commit=commit(), torch=torch.__version__,
        triton=version("triton"), python=platform.python_version(), threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )  # fmt: skip
    if device == "cuda":
        row["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return row


def has_bf16_units(device: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones here."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in device_flags() or "amx_bf16" in device_flags()


def device_flags() -> list[str]:
    return next((line.split(":")[1].split() for line in _cpuinfo() if line.startswith("flags")), [])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str, repeat: int = 1) -> float:
    """Seconds of one call: the mean over `repeat` calls in a row, by device events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(other: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster `ours` is: the median over rounds of time(other) / time(ours)."""
    return statistics.median(a / b for a, b in zip(other, ours))


class MatmulRoof:
    """The most FLOP/s that a matrix product in plain torch reached so far in this run.

    `sample()` times one product of each shape; calling it between the rounds of a benchmark puts roof and
    benchmark under the same conditions. Random data: products of zeros run faster than real ones.
    """

    SHAPES = {
        "cuda": [(8192, 8192, 8192), (25088, 4096, 1024), (25088, 2048, 512)],
        "cpu": [(2048, 2048, 2048), (1568, 2048, 512), (4096, 1024, 1024)],
    }

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.device, self.best, self.shape = device, 0.0, None
        self._operands = [
            (torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
            for m, n, k in self.SHAPES[device]
        ]
        self._repeat = 10 if device == "cuda" else 2
        self.sample()  # warm-up, and a first figure

    def sample(self) -> float:
        for a, b in self._operands:
            time_of_one = seconds(partial(torch.nn.functional.linear, a, b), self.device, self._repeat)
            speed = 2 * a.numel() * b.shape[0] / time_of_one
            if speed > self.best:
                self.best, self.shape = speed, (a.shape[0], b.shape[0], a.shape[1])
        return self.best


class CopyRoof:
    """The most bytes/s (read plus written) that a large copy reached so far in this run."""

    def __init__(self, device: str) -> None:
        count = 2**28 if device == "cuda" else 2**24  # floats: far beyond any cache
        self.device, self.best = device, 0.0
        self._source = torch.randn(count, device=device)
        self._target = torch.empty_like(self._source)
        self._repeat = 10 if device == "cuda" else 2
        self.sample()

    def sample(self) -> float:
        self._target.copy_(self._source)
        speed = 8 * self._source.numel() / seconds(lambda: self._target.copy_(self._source), self.device, self._repeat)
        self.best = max(self.best, speed)
        return self.best


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One run, one file: a new run replaces the old rows, so that no table mixes two runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
