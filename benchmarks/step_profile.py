"""Which kernels a training step spends its time in, and how well the hottest of them use the GPU.

    python benchmarks/step_profile.py                      # kernels of the exact step by time, from torch's profiler
    python benchmarks/step_profile.py --ncu                # and counters of the five hottest, from Nsight Compute

The step is the exact one without a CUDA graph, whose kernels are the same: a profiler cannot look into a replay as
well. On a CPU the rows are ops instead of kernels. Nsight Compute replays each kernel several times, so its run is a
second one and its times are not those of the table.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from baselines import Recipe, released
from common import ROOT, provenance, write_rows
from modes import EXACT_MODES, Batch, Mode

COUNTERS = {  # of Nsight Compute: our names, what it calls them
    "microseconds": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}


def step_function(args: argparse.Namespace):
    """One training step of the chosen sizes as a function, warmed up."""
    gpu = args.device == "cuda"
    recipe = Recipe(args.teacher, args.student, args.image, args.patch) if not args.tiny else Recipe(
        "micro", "micro", image=32, patch=8, decoder_width=64, decoder_blocks=2, decoder_heads=2
    )  # fmt: skip
    torch.manual_seed(0)
    name = "exact_eager" if gpu and "exact_eager" in EXACT_MODES else "exact"
    mode = Mode(name, args.dtype, released.DMAE(recipe), args.device)
    batch = Batch.random(recipe, args.batch, pin=gpu).to(args.device)
    for _ in range(3):
        mode.step(batch, args.ratio)
    return lambda: mode.step(batch, args.ratio)


def kernels(step, device: str, steps: int) -> list[dict]:
    """Rows (kernel, calls, microseconds a step, share), the longest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start-up messages would fill the screen
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    total: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if device == "cuda" and on_device and not event.is_user_annotation:
            total[event.name].append(event.device_time)
        elif device == "cpu" and event.self_cpu_time_total > 0 and "fastkd." not in event.name:
            total[event.name].append(event.self_cpu_time_total)
    everything = sum(map(sum, total.values()))
    rows = [
        dict(kernel=name, calls=len(t) / steps, microseconds=sum(t) / steps, share=sum(t) / everything)
        for name, t in total.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def function_name(kernel: str) -> str:
    """The bare function of a demangled kernel: what Nsight Compute filters by."""
    kernel = re.sub(r"^(void|auto) ", "", kernel)
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", kernel)) != kernel:
        kernel = shorter
    return kernel.split("::")[-1].strip()


def counters(hottest: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Counters of each kernel, the mean over up to 8 launches of one step, by bare function name."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    names = {function_name(kernel) for kernel in hottest}
    command = [
        tool, "--csv", "--profile-from-start", "off", "--kernel-name-base", "function",
        "--kernel-name", f"regex:^({'|'.join(map(re.escape, sorted(names)))})$", "--launch-count", str(8 * len(names)),
        "--metrics", ",".join(COUNTERS.values()), sys.executable, __file__, "--one-step",
    ]  # fmt: skip
    for name in ("device", "teacher", "student", "batch", "ratio", "dtype", "image", "patch"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=args.limit)
    if done.returncode:
        print("Nsight Compute:", (done.stdout + done.stderr)[-800:])
    return read_counters(done.stdout)


def read_counters(output: str) -> dict[str, dict[str, float]]:
    """Means by function name from Nsight Compute's CSV, which follows whatever the program itself printed."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ours = {metric: name for name, metric in COUNTERS.items()}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") in ours:
            value = float(row["Metric Value"].replace(",", ""))
            unit = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(row["Metric Unit"], 1.0)
            values[function_name(row["Kernel Name"])][ours[row["Metric Name"]]].append(value * unit)
    return {kernel: {name: sum(v) / len(v) for name, v in found.items()} for kernel, found in values.items()}


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "calls", "us a step", "share", "dram %", "SM %", "tensor %", "occupancy %", "registers")
    for row in rows:
        found = [row.get(n) for n in ("dram_percent", "sm_percent", "tensor_percent", "occupancy_percent", "registers")]
        table.add_row(
            row["kernel"][:70], f"{row['calls']:.4g}", f"{row['microseconds']:.4g}", f"{100 * row['share']:.1f} %",
            *(f"{v:.3g}" if v is not None else "-" for v in found),
        )  # fmt: skip
    Console(width=150).print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--teacher", default="large" if gpu else "small")
    parser.add_argument("--student", default="base" if gpu else "tiny")
    parser.add_argument("--batch", type=int, default=128 if gpu else 4)
    parser.add_argument("--ratio", type=float, default=0.95)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a model of no size: tests the script itself")
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--ncu", action="store_true", help="counters of the five hottest kernels too")
    parser.add_argument("--limit", type=float, default=120, help="seconds for Nsight Compute")
    parser.add_argument("--one-step", action="store_true", help="what Nsight Compute runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    step = step_function(args)
    if args.one_step:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return []
    rows = kernels(step, args.device, steps=3)[: args.top]
    if args.ncu:
        del step
        if args.device == "cuda":
            torch.cuda.empty_cache()
        found = counters([row["kernel"] for row in rows[:5]], args)
        rows = [row | {k: v for k, v in found.get(function_name(row["kernel"]), {}).items() if k != "microseconds"}
                for row in rows]  # fmt: skip
    known = dict(benchmark="step_profile", mask_ratio=args.ratio, batch=args.batch, dtype=args.dtype)
    rows = [known | row | provenance(args.device) for row in rows]
    write_rows(args.out / f"step_profile_{args.device}_{round(100 * args.ratio)}.jsonl", rows)
    show(rows)
    return rows


if __name__ == "__main__":
    main()
