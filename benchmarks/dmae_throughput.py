"""How fast one DMAE training step is, against the published recipe and against plain PyTorch.

    python benchmarks/dmae_throughput.py                    # fits the machine; under 3 minutes on two cores
    python benchmarks/dmae_throughput.py --full             # on a CPU: more of everything, about half an hour
    python benchmarks/dmae_throughput.py --ratios 0.95 --dtypes bfloat16 --modes released,exact --batch 16 --rounds 20

Modes, all from the same weights, pictures and masks, timed in turn round after round:

    released   what the public recipe executes (baselines/released.py)
    eager      the exact savings in plain PyTorch (baselines/eager.py), attention by SDPA or written out, whichever is
               faster on this machine
    compiled   torch.compile of eager
    exact_eager  fastkd, same loss and gradients
    exact      the same, on a GPU captured as one CUDA graph, as `fastkd distill` runs it (on a CPU there is none)
    decode_25  fastkd, reconstructing a random quarter of the masked patches (another loss: not exact)
    cross      fastkd, cross-attention decoder (another model: not exact)

A step is forward, backward and AdamW, from a batch on the device; the copy to a GPU, which a loader hides behind the
step before, is shown as `data` and not part of it. Nothing is timed before losses and gradients of all modes agree with
a float64 run of `released`. Ratios are medians of the ratios within each round.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path

import flops
import torch
from baselines import Recipe, released
from common import (
    DTYPES,
    ROOT,
    MatmulRoof,
    has_bf16_units,
    paired_ratio,
    provenance,
    quartiles,
    seconds,
    write_rows,
)  # fmt: skip
from gate import gate
from modes import EXACT_MODES, INEXACT_MODES, Batch, Mode, faster_attention
from plots import plot
from stages import STAGES, StageClock, medians, peak_bytes

from fastkd.train.host import keep_memory

MODES = EXACT_MODES + INEXACT_MODES
SAME_FLOPS = {"compiled": "eager", "decode_25": "exact", "exact_eager": "exact"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--teacher", help="tiny, small, base, large or huge (default: large on a GPU, small on a CPU)")
    parser.add_argument("--student", help="the same names (default: base on a GPU, tiny on a CPU)")
    parser.add_argument("--batch", type=int, help="images per step (default: 128 on a GPU, 6 on a CPU)")
    parser.add_argument("--ratios", default="0.75,0.9,0.95,0.98", help="mask ratios")
    parser.add_argument("--dtypes", help="float32, bfloat16, float16 (default: bfloat16; on a CPU float32 too)")
    parser.add_argument("--modes", help="default: all in the first dtype; released and exact in the others")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15 on a GPU, 3 on a CPU)")
    parser.add_argument(
        "--full", action="store_true",
        help="all exact modes in every dtype, whole-graph compilation; on a CPU 7 rounds",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, help="steps per mode and round (default: 3 on a GPU, 1 on a CPU)")
    parser.add_argument(
        "--compile", choices=("blocks", "whole"), help="what `compiled` compiles (default: whole on a GPU)"
    )
    parser.add_argument("--compile-mode", help="mode of torch.compile (default: max-autotune on a GPU)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no new ratio is begun")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--decoder", default="8x512x16", help="blocks x width x heads")
    parser.add_argument("--tag", default="", help="added to the names of the files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder for JSONL and PNG")
    args = parser.parse_args(argv)
    gpu, full = args.device == "cuda", args.full
    default = dict(
        teacher=("small", "large"), student=("tiny", "base"), batch=(6, 128),
        rounds=(7 if full else 3, 15), repeat=(1, 3),
        compile=("whole" if full else "blocks", "whole"), compile_mode=("default", "max-autotune"),
        dtypes=("bfloat16,float32" if has_bf16_units(args.device) else "float32", "bfloat16"),
    )  # fmt: skip
    for name, (on_cpu, on_gpu) in default.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    args.ratios = [float(r) for r in args.ratios.split(",")]
    args.dtypes = args.dtypes.split(",")
    default_modes = [mode for mode in MODES if gpu or mode != "exact_eager"]  # on a CPU it is `exact`
    chosen = args.modes.split(",") if args.modes else default_modes
    for name, given, allowed in (("modes", chosen, MODES), ("dtypes", args.dtypes, DTYPES)):
        unknown = set(given) - set(allowed)
        if unknown:
            parser.error(f"--{name}: got {', '.join(sorted(unknown))}, expected some of {', '.join(allowed)}")
    if "released" not in chosen:
        chosen.insert(0, "released")  # the gate needs it
    exact = [mode for mode in default_modes if mode in EXACT_MODES]
    fewer = chosen if args.modes else exact if full else ["released", "exact"]
    args.modes = {dtype: chosen if dtype == args.dtypes[0] else fewer for dtype in args.dtypes}
    return args


class Benchmark:
    def __init__(self, args: argparse.Namespace, say=print) -> None:
        self.args, self.say, self.device = args, say, args.device
        blocks, width, heads = map(int, args.decoder.split("x"))
        self.recipe = Recipe(
            args.teacher,
            args.student,
            args.image,
            args.patch,
            decoder_width=width,
            decoder_blocks=blocks,
            decoder_heads=heads,
        )
        torch.manual_seed(0)
        self.base = released.DMAE(self.recipe)
        host = Batch.random(self.recipe, args.batch, pin=args.device == "cuda")
        self.batch = host.to(args.device)
        self.copies = {  # seconds to bring the pictures to the device, as uint8 and as floats
            raw: seconds(partial((host.raw if raw else host.floats).to, args.device, non_blocking=True), args.device)
            for raw in (True, False)
        }
        self.roofs = {dtype: MatmulRoof(DTYPES[dtype], args.device) for dtype in args.dtypes}
        self.attention = {d: faster_attention(self.recipe, d, args.device, args.batch) for d in args.dtypes}
        self.modes: list[Mode] = []
        self.resident: dict[str, int] = {}
        for dtype in args.dtypes:
            for name in args.modes[dtype]:
                self._build(name, dtype)

    def _build(self, name: str, dtype: str) -> None:
        def build() -> None:
            args = self.args
            mode = Mode(name, dtype, self.base, args.device, args.compile, args.compile_mode, self.attention[dtype][0])
            optimizer = mode.run.optimizer
            for group in optimizer.param_groups:  # AdamW's state, so that it counts as resident
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            mode.restore()
            self.modes.append(mode)

        gc.collect()
        self.resident[f"{name} {dtype}"] = peak_bytes(build, self.device)[1]

    def run_ratio(self, ratio: float) -> list[dict]:
        """Gate and interleaved timing at one mask ratio."""
        args, started = self.args, time.perf_counter()
        gated = gate(self.modes, self.base, self.batch, ratio, self.device)
        for mode in self.modes:
            mode.restore()
        ready = time.perf_counter()
        times: dict[str, list[float]] = {mode.label: [] for mode in self.modes}
        stages: dict[str, list[dict]] = {mode.label: [] for mode in self.modes}
        for number in range(args.rounds):
            shift = number % len(self.modes)
            for mode in self.modes[shift:] + self.modes[:shift]:
                clocks = [StageClock(self.device) for _ in range(args.repeat)]
                unused = iter(clocks)

                def run() -> None:
                    clock = next(unused)  # noqa: B023
                    mode.step(self.batch, ratio, clock)  # noqa: B023
                    clock.end()

                times[mode.label].append(seconds(run, self.device, args.repeat))
                stages[mode.label] += [clock.stages() for clock in clocks]
            for roof in self.roofs.values():
                roof.sample()
        found = {m.label: None if m.is_whole else medians(stages[m.label]) for m in self.modes}
        for mode in self.modes:
            if found[mode.label]:
                found[mode.label]["data"] = self.copies[mode.raw] if self.device == "cuda" else 0.0
        self.say(
            f"{ratio:.0%} masking: gate passed after {ready - started:.0f} s, "
            f"{args.rounds} rounds in {time.perf_counter() - ready:.0f} s"
        )
        return [self._row(mode, ratio, times, gated[mode.label], found[mode.label]) for mode in self.modes]

    def _row(self, mode: Mode, ratio: float, times: dict, gated: dict, stages: dict | None) -> dict:
        args, mine = self.args, times[mode.label]
        counted = flops.step(
            self.recipe, SAME_FLOPS.get(mode.name, mode.name), ratio, args.batch,
            0.25 if mode.name == "decode_25" else 1.0,
        )  # fmt: skip
        low, middle, high = quartiles([args.batch / t for t in mine])
        row = dict(
            benchmark="dmae_throughput", mode=mode.name, exact=mode.exact, mask_ratio=ratio, dtype=mode.dtype,
            batch=args.batch, teacher=f"vit_{args.teacher}_patch{args.patch}_{args.image}",
            student=f"vit_{args.student}_patch{args.patch}_{args.image}",
            decoder=f"{self.recipe.decoder_blocks}x{self.recipe.decoder_width}",
            images_per_second=middle, images_per_second_quartiles=[low, high], rounds=args.rounds, repeat=args.repeat,
        )  # fmt: skip
        for other in ("released", "eager", "compiled", "exact"):
            label = f"{other} {mode.dtype}"
            row[f"speedup_vs_{other}"] = paired_ratio(times[label], mine) if label in times else None
        slowest = times.get("released float32")
        row["speedup_vs_released_float32"] = paired_ratio(slowest, mine) if slowest else None
        row |= dict(
            flops_per_image=sum(counted.values()),
            peak_memory_bytes=gated.pop("peak_bytes") + self.resident[mode.label],
            resident_memory_bytes=self.resident[mode.label],
            stage_seconds=stages, gate=gated, attention="written out" if self.attention[mode.dtype][0] else "sdpa",
        )  # fmt: skip
        if mode.name == "compiled":
            row["compile"] = f"{args.compile}, {args.compile_mode}"
        return row

    def finish(self, rows: list[dict]) -> list[dict]:
        """Adds what is known only at the end: roofs and provenance."""
        known = provenance(self.device)
        for row in rows:
            roof = self.roofs[row["dtype"]]
            row["tflops"] = row["images_per_second"] * row["flops_per_image"] / 1e12
            row["roof_tflops"], row["roof_shape"] = roof.best / 1e12, roof.shape
            row["roof_fraction"] = row["tflops"] / row["roof_tflops"]
        return [row | known for row in rows]


def table(rows: list[dict], ratio: float):
    from rich.table import Table

    first = rows[0]
    result = Table(
        title=f"{ratio:.0%} masking, {first['teacher']} -> {first['student']}, decoder {first['decoder']}, "
        f"batch {first['batch']}, {first['device']}"
    )
    speedups = ("released", "eager", "compiled")
    columns = ["mode", "dtype", "img/s", "quartiles", *(f"x {n}" for n in speedups), "peak MB", "TFLOP/s", "% roof"]
    for name in columns + [f"{s} ms" for s in STAGES]:
        result.add_column(name, justify="left" if name in ("mode", "dtype") else "right", no_wrap=True)
    for row in (r for r in rows if r["mask_ratio"] == ratio):
        cells = [row["mode"] if row["exact"] else f"{row['mode']} *", row["dtype"]]
        cells += [f"{row['images_per_second']:.3g}", "{:.3g}-{:.3g}".format(*row["images_per_second_quartiles"])]
        cells += [f"{row[f'speedup_vs_{n}']:.2f}" if row[f"speedup_vs_{n}"] else "-" for n in speedups]
        cells += [f"{row['peak_memory_bytes'] / 1e6:.0f}", f"{row['tflops']:.3g}", f"{100 * row['roof_fraction']:.0f}"]
        stages = row["stage_seconds"]
        cells += [f"{1e3 * stages[s]:.3g}" if stages else "-" for s in STAGES]
        result.add_row(*cells)
    return result


def main(argv: list[str] | None = None) -> list[dict]:
    from rich.console import Console

    args, started = arguments(argv), time.perf_counter()
    keep_memory()  # as `fastkd distill` does, for every mode
    console = Console(width=None if sys.stdout.isatty() else 190)
    benchmark = Benchmark(args, console.print)
    for dtype, (written_out, times) in benchmark.attention.items():
        compared = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in times.items())
        console.print(f"attention of the peers in {dtype}: {'written out' if written_out else 'sdpa'} ({compared})")
    rows: list[dict] = []
    name = f"dmae_throughput_{args.device}{args.tag}"
    for ratio in args.ratios:
        used = time.perf_counter() - started
        if used > args.budget:
            console.print(f"{ratio:.0%} masking is left out: {used:.0f} s are used, the budget is {args.budget:.0f} s")
            continue
        rows += benchmark.run_ratio(ratio)
        write_rows(args.out / f"{name}.jsonl", benchmark.finish(rows))  # after each ratio: nothing is lost on a limit
    if not rows:
        raise SystemExit("no ratio was run within the budget")
    rows = benchmark.finish(rows)
    for ratio in dict.fromkeys(row["mask_ratio"] for row in rows):
        console.print(table(rows, ratio))
    console.print(
        "* not exact: another loss or model. Stages: forward and backward; data (copy to a GPU) is not in the step; "
        "on a GPU, fastkd's teacher runs beside student and decoder, and shows only as far as they wait for it."
    )
    for dtype, roof in benchmark.roofs.items():
        console.print(f"matmul roof in {dtype}: {roof.best / 1e12:.4g} TFLOP/s at {roof.shape}")
    plot(rows, args.out / f"{name}.png")
    console.print(f"{time.perf_counter() - started:.0f} s; rows and plot: {args.out}/{name}.jsonl, .png")
    return rows


if __name__ == "__main__":
    main()
