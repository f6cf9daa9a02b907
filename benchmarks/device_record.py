"""fastkd/ops/device_record.json: what ran on a GPU, was right there, and is fastest; from committed rows.

`fastkd info` shows it, and the automatic choice between Triton and CUDA C++ follows its `fastest`.
"""

from __future__ import annotations

import json
from collections import defaultdict

from common import ROOT
from tables import rows_of

from fastkd.ops import SPECS

PATH = ROOT / "fastkd" / "ops" / "device_record.json"


def record(checks: list[dict], timings: list[dict]) -> dict[str, dict]:
    """By kernel: device, date, commit, checks passed by backend, and the fastest backend of those that passed all.

    Args:
        checks: rows of the suite's check part, one per op, backend, dtype and case.
        timings: rows of benchmarks/ops.py on the same kind of device.
    """
    found: dict[str, dict] = {}
    for name, spec in SPECS.items():
        mine = [r for r in checks if r.get("op") == name and r.get("backend") in ("triton", "cuda") and "passed" in r]
        if not mine:
            continue
        passed = {
            b: [r["passed"] for r in mine if r["backend"] == b] for b in dict.fromkeys(r["backend"] for r in mine)
        }
        right = [backend for backend, results in passed.items() if all(results)]
        row = dict(
            device=mine[0]["device"], checked={b: f"{sum(results)} of {len(results)}" for b, results in passed.items()}
        )  # fmt: skip
        if fastest := _fastest(name, right, timings):
            row["fastest"] = fastest
        found |= {kernel.name: row for kernel in spec.kernels}
    return found


def _fastest(op: str, backends: list[str], timings: list[dict]) -> str | None:
    """The backend with the least time over all cases that every backend was timed on."""
    seconds: dict[str, dict[tuple, float]] = defaultdict(dict)
    for row in timings:
        if row["op"] == op and row["backend"] in backends:
            seconds[row["backend"]][row["case"], row["dtype"]] = row.get("graph_seconds") or row["seconds"]
    if not seconds:
        return None
    common = set.intersection(*(set(found) for found in seconds.values()))
    return min(seconds, key=lambda backend: sum(seconds[backend][case] for case in common))


def text() -> str | None:
    """The file's text; None where nothing ran on a GPU yet."""
    found = record(rows_of("check"), rows_of("ops_cuda"))
    return json.dumps(found, indent=1) + "\n" if found else None
