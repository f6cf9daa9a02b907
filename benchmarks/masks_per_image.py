"""What several masks per decoded picture do to the features: the DMAE demo's student at equal steps and batch size.

    python benchmarks/masks_per_image.py [--masks 1 4 16] [--ratios 0.95] [--seeds 0 1 2] [--steps 400]

With K masks a batch of B views holds B / K pictures, each under K masks: the data path does 1 / K of the work for the
same number of training steps. Rows hold the held-out accuracy of nearest neighbours and of a linear probe on the frozen
features; initial weights are the same for a seed whatever K. Finished rows in --out are kept: a run can be continued.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import ROOT, provenance, read_rows, write_rows

from fastkd.demos.dmae import Config, Demo
from fastkd.demos.training import Recipe, fit, one_thread
from fastkd.evaluation.pictures import evaluate


def measure(demo: Demo, masks: int, ratio: float, seed: int) -> dict:
    """One training run and its probes."""
    config = demo.config
    method = demo._method("DMAE", seed)
    recipe = Recipe(config.steps, config.batch_size, config.lr, masks_per_image=masks)
    seconds = fit(method, demo.images, ratio, recipe, seed)
    scores = evaluate(method.student, *demo.probe)
    return dict(
        benchmark="masks_per_image", masks_per_image=masks, mask_ratio=ratio, seed=seed, steps=config.steps,
        batch=config.batch_size, pictures_decoded=config.steps * config.batch_size // masks, knn=scores.knn,
        linear=scores.linear, seconds=seconds,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.95])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    path = args.out / "masks_per_image.jsonl"
    rows = [row for row in (read_rows(path) if path.exists() else []) if row["steps"] == args.steps]
    done = {(row["masks_per_image"], row["mask_ratio"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        demo = Demo(Config(out=Path(scratch), steps=args.steps))
        known = provenance(str(demo.device))
        for seed in args.seeds:
            for ratio in args.ratios:
                for masks in args.masks:
                    if demo.config.batch_size % masks:
                        parser.error(f"--masks: got {masks}, expected divisors of {demo.config.batch_size}")
                    if (masks, ratio, seed) in done:
                        continue
                    row = measure(demo, masks, ratio, seed) | known | dict(threads=torch.get_num_threads())
                    rows.append(row)
                    write_rows(path, rows)
                    found = f"kNN {row['knn']:.1%}, linear {row['linear']:.1%}, {row['seconds']:.0f} s"
                    print(f"{masks} masks, {ratio:.0%} masked, seed {seed}: {found}", flush=True)
    return rows


if __name__ == "__main__":
    main()
