"""Everything that needs a GPU, in one command: build, check, sanitise, measure. Fits in 9 minutes.

    python benchmarks/gpu_suite.py                                   # results under $OUT, else runs/gpu
    python benchmarks/gpu_suite.py --parts step --budget 500         # one part again, or what was left out
    python benchmarks/gpu_suite.py --device cpu --dry-run            # the suite's own logic, on any machine

    build      the CUDA library for this device, in place (setup.py build_ext --inplace)
    check      every op x backend x float32/bfloat16/float16 against float64, bit-equal reruns; golden data
    roofs      copy bandwidth and matrix products
    step       the whole training step (dmae_throughput.py), first without `compiled`, then with it
    ops        every op against its peers: eager and compiled PyTorch, SDPA, FlexAttention, Liger-Kernel (ops.py)
    profile    kernels of the step by time, and counters of the five hottest from Nsight Compute (step_profile.py)
    data       pictures per second of every loader, and of the step that they feed (loaders.py)
    teacher    the frozen teacher in 8 bits: error and speed (teacher_precision.py)
    sanitize   compute-sanitizer memcheck and racecheck on small cases of every kernel

Each part is a process of its own with its own time limit, so a crash or a hang in one does not lose the others; what
a part has measured before it was stopped is kept. Needs torch, triton, numpy, rich, matplotlib and pytest; no
network and no installed fastkd. Where there is no git, the commit comes from $FASTKD_COMMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# part: (share of the budget at most, seconds that it needs to be worth starting)
PARTS = {
    "build": (0.25, 5),
    "check": (0.3, 10),
    "roofs": (0.05, 5),
    "step": (0.5, 20),
    "ops": (0.25, 10),
    "profile": (0.15, 10),
    "data": (0.15, 10),
    "teacher": (0.1, 10),
    "sanitize": (0.3, 10),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"))
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and nothing built: tests the suite itself")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    return args


def run_part(part: str, args: argparse.Namespace, limit: float) -> dict:
    """Runs one part in a process group of its own; returns its row of the summary."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, "--out", str(args.out), "--device", args.device]
    command += ["--limit", f"{limit:.0f}"] + (["--dry-run"] if args.dry_run else [])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    (args.out / f"{part}.jsonl").unlink(missing_ok=True)
    with open(args.out / f"{part}.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit + 10)  # the part knows its limit: it should end by itself
            status = "ok" if code == 0 else f"failed, exit {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit + 10:.0f} s"
        except KeyboardInterrupt:
            status = "interrupted"
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind
        except ProcessLookupError:
            pass
        process.wait()
    return dict(part=part, status=status, seconds=time.monotonic() - started, says=last_words(args.out / f"{part}.log"))


def last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def rows_of(out: Path, name: str) -> list[dict]:
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(out: Path, summary: list[dict]) -> None:
    """A short table: it must fit at the end of a log."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150, no_color=True)
    table = Table("part", "status", "s", "last line")
    for row in summary:
        table.add_row(row["part"], row["status"], f"{row['seconds']:.0f}", row["says"])
    console.print(table)
    checks = [row for row in rows_of(out, "check") if "passed" in row]
    if checks:
        counts: dict[tuple, list[int]] = {}
        for row in checks:
            key = (row["op"], row.get("backend", ""))
            passed, total = counts.setdefault(key, [0, 0])
            counts[key] = [passed + row["passed"], total + 1]
        table = Table("op", "backend", "passed", title="checks on the device")
        for (op, backend), (passed, total) in counts.items():
            table.add_row(op, backend, f"{passed}/{total}")
        console.print(table)
        for row in [r for r in checks if not r["passed"]][:12]:
            names = [row.get(k) for k in ("op", "backend", "dtype", "case", "check")]
            console.print(f"FAILED {' '.join(str(n) for n in names if n)}: {row.get('message', '')[:200]}")
    for row in rows_of(out, "sanitize") + rows_of(out, "roofs"):
        console.print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k in (
            "tool", "errors", "summary", "roof", "dtype", "tflops", "gigabytes_per_second", "shape")))  # fmt: skip
    for path in sorted(out.glob("dmae_throughput_*.jsonl")):
        table = Table(
            "mode", "dtype", "mask", "img/s", "x released", "x eager", "x compiled", "% roof", "GB", title=path.stem
        )
        for row in (json.loads(line) for line in path.read_text().splitlines()):
            speedups = [row[f"speedup_vs_{n}"] for n in ("released", "eager", "compiled")]
            table.add_row(
                row["mode"], row["dtype"], f"{row['mask_ratio']:.0%}", f"{row['images_per_second']:.4g}",
                *(f"{s:.2f}" if s else "-" for s in speedups), f"{100 * row['roof_fraction']:.0f}",
                f"{row['peak_memory_bytes'] / 1e9:.1f}",
            )  # fmt: skip
        console.print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    previous = {row["part"]: row for row in rows_of(args.out, "summary")}
    for part, (share, least) in PARTS.items():
        if part not in args.parts:
            continue
        left = args.budget - (time.monotonic() - started) - 10
        limit = min(left, share * args.budget)
        if limit < least:
            row = dict(part=part, status="left out", seconds=0.0, says=f"{left:.0f} s of the budget are left")
        else:
            print(f"{part} (at most {limit:.0f} s) ...", flush=True)
            row = run_part(part, args, limit)
            print(f"{part}: {row['status']}, {row['seconds']:.0f} s: {row['says']}", flush=True)
        previous[part] = row
        (args.out / "summary.jsonl").write_text("".join(json.dumps(r) + "\n" for r in previous.values()))
    report(args.out, list(previous.values()))
    return [previous[part] for part in args.parts]


if __name__ == "__main__":
    failed = [row["part"] for row in main() if row["status"] != "ok"]
    sys.exit(f"not ok: {', '.join(failed)}" if failed else 0)
