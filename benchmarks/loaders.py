"""Images per second of each loader side by side: random-resized crops of 224 x 224 and flips, nothing trained.

    python benchmarks/loaders.py [--data FOLDER] [--workers 1] [--batch 64] [--rounds 5]

Loaders: pil (files, decoded each time), tar (the same files in one archive), packed (pixels of fastkd pack, cropped by
the C++ op; on a GPU pinned, copied and cropped there) and dali where it is installed. They take turns, each starting
anew, so that none works in the background while another is timed; a round times whole batches after a warm-up, figures
are medians over rounds. Batches are checked first: on the same seed packed and archived ones must equal those of the
files, bit for bit. Without --data photo-like JPEG files are made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, paired_ratio, provenance, quartiles, synchronize, version, write_rows
from PIL import Image

from fastkd.data import ImageLoader, pack

SIDE = 224


def make_pictures(folder: Path, count: int) -> Path:
    """JPEG files of about 500 x 375 pixels, 100 kB: smooth shapes with fine grain, as photographs have."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        size = (500, 375) if index % 3 else (375, 500)
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = random.normal(0, 12, (*size[::-1], 1)).astype(np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{index:05}.jpg", quality=90)
    return folder


def archived(folder: Path, out: Path) -> Path:
    """All files of a folder in one archive."""
    with tarfile.open(out, "w") as archive:
        archive.add(folder, arcname="")
    return out


def check(folder: Path, scratch: Path, device: str) -> None:
    """Archived and packed batches equal those of the files where packing changes nothing: below the short side."""
    small = scratch / "small"
    small.mkdir()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:8]:
        with Image.open(path) as image:
            image.convert("RGB").resize((150, 120)).save(small / f"{path.stem}.png")
    pack(small, scratch / "small_packed")
    expected = next(iter(ImageLoader(small, (SIDE, SIDE), 8)))
    for source in (scratch / "small_packed", archived(small, scratch / "small.tar")):
        batch = next(iter(ImageLoader(source, (SIDE, SIDE), 8, device=device)))
        if not torch.equal(batch.images.cpu(), expected.images) or not torch.equal(batch.keys.cpu(), expected.keys):
            raise SystemExit(f"batches of {source.name} are NOT those of the files; nothing was timed")


def seconds_per_image(loader: ImageLoader, count: int, device: str) -> float:
    """From a fresh start and after a warm-up: the time of `count` batches, on the device and finished."""
    with contextlib.closing(iter(loader)) as batches:
        for _ in range(2):
            next(batches)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        synchronize(device)
        return (time.perf_counter() - start) / (count * loader.batch_size)


def loaders(folder: Path, scratch: Path, args: argparse.Namespace) -> dict[str, ImageLoader]:
    options = dict(size=(SIDE, SIDE), batch_size=args.batch, workers=args.workers, device=args.device)
    wanted = args.loaders or ("pil", "tar", "packed", "dali")
    found = {}
    if "pil" in wanted:
        found["pil"] = ImageLoader(folder, **options)
    if "tar" in wanted:
        found["tar"] = ImageLoader(archived(folder, scratch / "pictures.tar"), **options)
    if "packed" in wanted:
        found["packed"] = ImageLoader(scratch / "packed", **options)
    if "dali" in wanted and (version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120")):
        from fastkd.data.dali import DaliLoader

        found["dali"] = DaliLoader(folder, **options)
    return found


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: pictures made here")
    parser.add_argument("--pictures", type=int, default=256, help="how many are made without --data")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loaders", nargs="+", choices=("pil", "tar", "packed", "dali"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short-side", type=int, default=256, help="of the packed images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = args.data or make_pictures(scratch / "pictures", args.pictures)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        check(folder, scratch, args.device)
        start = time.perf_counter()
        packing = pack(folder, scratch / "packed", short_side=args.short_side, workers=args.workers)
        packing_speed = packing.images / (time.perf_counter() - start)
        found = loaders(folder, scratch, args)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(args.rounds):
            for name, loader in found.items():
                seconds[name].append(seconds_per_image(loader, args.batches, args.device))
    rows, known = [], provenance(args.device)
    for name, mine in seconds.items():
        low, middle, high = quartiles([1 / s for s in mine])
        row = dict(
            benchmark="loaders", loader=name, images_per_second=middle, images_per_second_quartiles=[low, high],
            speedup_vs_pil=paired_ratio(seconds["pil"], mine) if "pil" in seconds else None, side=SIDE,
            batch=args.batch, workers=args.workers, rounds=args.rounds, short_side=args.short_side,
            pictures=args.data.name if args.data else f"{args.pictures} made, 500 x 375",
            packing_images_per_second=packing_speed, pillow=version("pillow"),
            dali=version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120"),
        )  # fmt: skip
        rows.append(row | known)
        ratio = f", {row['speedup_vs_pil']:.2f} x pil" if row["speedup_vs_pil"] else ""
        print(f"{name:8} {middle:8.0f} img/s ({low:.0f} - {high:.0f}){ratio}")
    print(f"packing: {packing_speed:.0f} img/s, once")
    write_rows(args.out / f"loaders_{args.device}.jsonl", rows)
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
