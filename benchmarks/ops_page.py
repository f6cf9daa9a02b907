"""docs/ops.md: every op with its shapes, backends, dtypes, bytes and measured ratios, from OpSpecs and rows."""

from __future__ import annotations

import inspect

import peers
import torch
from common import ROOT
from tables import markdown, number, rows_of, short, times

from fastkd import ops
from fastkd.ops import SPECS


def backends(spec) -> list[str]:
    """Backends that are written for an op, whether or not they can run on this machine."""
    native = (ROOT / "csrc" / "ops.cpp").read_text()
    names = ["reference"]
    if any(f'"{kernel.name}(' in native or kernel._cpp for kernel in spec.kernels):
        names.append("cpp")
    if all(kernel._triton for kernel in spec.kernels):
        names.append("triton")
    if all(kernel._has_cuda for kernel in spec.kernels):
        names.append("cuda")
    return names


def page() -> str:
    """docs/ops.md: every op with shapes, backends, dtypes, bytes and measured ratios."""
    on_gpu = {(r["op"], r["backend"]) for r in rows_of("check") if r.get("passed") and "backend" in r}
    overview = []
    for name, spec in SPECS.items():
        case = next(iter(spec.bench))
        kwargs = spec.build(spec.bench[case], torch.float32, "cpu")
        gpu = [b for b in ("triton", "cuda") if (name, b) in on_gpu]
        overview.append([
            f"[`{name}`](#{name})", ", ".join(backends(spec)), ", ".join(gpu) or "not yet",
            ", ".join(f"`{n}`" for n in spec.differentiable) or "-", case, number(spec.bytes_moved(kwargs) / 1e6),
            number(spec.flops(kwargs) / 1e9),
        ])  # fmt: skip
    text = [
        "# Ops", "",
        "Written by `python benchmarks/report.py` from the OpSpecs and from the rows in benchmarks/results.", "",
        "`reference` is plain PyTorch and runs anywhere in every floating dtype; `cpp` takes float32, bfloat16,",
        "float16 and float64; `triton` and `cuda` take float32, bfloat16 and float16. MB are the fewest that forward",
        "and backward must move in float32 in the named case. `fastkd info` says what your machine takes.", "",
        markdown(["op", "written for", "checked on a GPU", "gradients", "case", "MB", "GFLOP"], overview, 5), "",
    ]  # fmt: skip
    for title, file in (("Measured on a CPU", "ops_cpu"), ("Measured on a GPU", "ops_cuda")):
        if rows := rows_of(file):
            text += [f"## {title}", "", measured_ops(rows), ""]
    for name, spec in SPECS.items():
        function = getattr(ops, name, spec.function)  # a spec may wrap it, so that tests can call it
        signature = f"{name}{inspect.signature(function)}".replace("torch.", "")
        text += [f"## {name}", "", "```", signature, "", inspect.getdoc(function), "```", ""]
    return "\n".join(text)


def _over_floor(row: dict) -> float:
    """Time over the least that bytes at the copy roof and FLOPs at the matmul roof of the same run allow."""
    memory = row["bytes_moved"] / (row["copy_roof_gigabytes_per_second"] * 1e9)
    return row["seconds"] / max(memory, row["flops"] / (row["matmul_roof_tflops"] * 1e12))


def _peers(row: dict) -> str:
    """How many times faster than each other library that was there."""
    known = {name: row.get(f"speedup_vs_{name}") for name in ("published", *peers.NAMES)}
    return ", ".join(f"{name} {times(value)}" for name, value in known.items() if value) or "-"


def measured_ops(rows: list[dict]) -> str:
    best = {}
    for row in rows:
        best.setdefault((row["op"], row["case"], row["dtype"]), {})[row["backend"]] = row
    lines = []
    for (op, case, dtype), found in best.items():
        for backend in [b for b in found if b not in ("eager", "compiled", *("published", *peers.NAMES))]:
            row = found[backend]
            lines.append([
                f"`{op}`", case, short(dtype), backend, number(1e3 * row["seconds"]), times(row["speedup_vs_eager"]),
                times(row["speedup_vs_compiled"]), _peers(row), number(row["gigabytes_per_second"]),
                f"{100 * row['copy_roof_fraction']:.0f} %", number(row["tflops"]), times(_over_floor(row)),
            ])  # fmt: skip
    columns = [
        "op",
        "case",
        "dtype",
        "backend",
        "ms",
        "eager",
        "compiled",
        "others",
        "GB/s",
        "of copy roof",
        "TFLOP/s",
        "measured / floor",
    ]
    row = rows[0]
    place = f"{row['device']}, {row['threads']} threads, copy roof {number(row['copy_roof_gigabytes_per_second'])} GB/s"
    note = f"<sub>Forward and backward; {place}; torch {row['torch']}, commit {row['commit']}, {row['date']}</sub>"
    return f"{markdown(columns, lines, 4)}\n\n{note}"
