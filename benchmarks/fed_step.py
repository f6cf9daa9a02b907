"""How much of the step's speed is left when real JPEG files feed it: images/s from each loader over compute alone.

    python benchmarks/fed_step.py [--data FOLDER] [--workers 14] [--ratios 0.75,0.95]

The step is the exact one that `fastkd distill` runs. Rounds alternate between steps on one batch that stays on the
device and steps on what a loader brings: files decoded by Pillow, packed pixels, or DALI where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import loaders
import torch
from baselines import Recipe, released
from common import DTYPES, ROOT, paired_ratio, provenance, quartiles, synchronize, write_rows
from modes import Batch, FastStep

from fastkd.data import pack
from fastkd.train import CudaGraphs


def seconds_per_step(batches, step: FastStep, ratio: float, count: int, device: str) -> float:
    """Mean over `count` steps after two for warming up."""
    for number in range(count + 2):
        if number == 2:
            synchronize(device)
            start = time.perf_counter()
        images, keys = next(batches)
        step(images, keys, ratio)
    synchronize(device)
    return (time.perf_counter() - start) / count


def compare(step: FastStep, ratio: float, loader, still: Batch, args: argparse.Namespace) -> tuple[list, list]:
    """Seconds a step, round by round: (on one batch, fed by the loader)."""
    alone, fed = [], []
    same = iter(partial(lambda batch: (batch.raw, batch.keys), still), None)
    with contextlib.closing(iter(loader)) as batches:
        arriving = ((batch.images, batch.keys) for batch in batches)
        for _ in range(args.rounds):
            alone.append(seconds_per_step(same, step, ratio, args.steps, args.device))
            fed.append(seconds_per_step(arriving, step, ratio, args.steps, args.device))
    return alone, fed


def main(argv: list[str] | None = None) -> list[dict]:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: pictures made here")
    parser.add_argument("--pictures", type=int, default=512, help="how many are made without --data")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--teacher", default="large" if gpu else "tiny")
    parser.add_argument("--student", default="base" if gpu else "tiny")
    parser.add_argument("--batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--ratios", default="0.75,0.95")
    kinds = ("pil", "packed", "dali")
    parser.add_argument("--loaders", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--steps", type=int, default=20 if gpu else 3, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    recipe = Recipe(args.teacher, args.student)
    torch.manual_seed(0)
    base, rows = released.DMAE(recipe), []
    still = Batch.random(recipe, args.batch).to(args.device)
    graphs = partial(CudaGraphs, torch.device(args.device)) if args.device == "cuda" else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or loaders.make_pictures(Path(scratch) / "pictures", args.pictures)
        pack(folder, Path(scratch) / "packed", short_side=256, workers=args.workers)
        for name, loader in loaders.loaders(folder, Path(scratch), args).items():
            for ratio in map(float, args.ratios.split(",")):
                step = FastStep(base, DTYPES[args.dtype], args.device, graphs=graphs)
                alone, fed = compare(step, ratio, loader, still, args)
                low, middle, high = quartiles([a / b for a, b in zip(alone, fed)])
                rows.append(dict(
                    benchmark="fed_step", loader=name, mask_ratio=ratio, share=middle, share_quartiles=[low, high],
                    images_per_second=args.batch / quartiles(fed)[1], rounds=args.rounds, batch=args.batch,
                    compute_images_per_second=args.batch / quartiles(alone)[1], workers=args.workers,
                    speedup_of_compute=paired_ratio(fed, alone), teacher=args.teacher, student=args.student,
                    dtype=args.dtype, pictures=args.data.name if args.data else f"{args.pictures} made, 500 x 375",
                ) | provenance(args.device))  # fmt: skip
                print(f"{name} {ratio:.0%}: {rows[-1]['images_per_second']:.4g} img/s, {100 * middle:.1f} % of compute")
                write_rows(args.out / f"fed_step_{args.device}.jsonl", rows)
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
