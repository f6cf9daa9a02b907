"""Writes the embedded subset of Fashion-MNIST: 600 train and 200 test pictures of each class, drawn with seed 0.

python -m fastkd.demos.subset --fashion /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np

from . import pictures

SEED = 0
PER_CLASS = {"train": 600, "test": 200}


def write(fashion: Path, path: Path) -> None:
    """Draws the subset from the full data and writes it as an .npz, LZMA-compressed (3.0 MB; deflate makes 3.5)."""
    with zipfile.ZipFile(path, "w") as archive:
        for (part, per_class), full in zip(PER_CLASS.items(), pictures.fashion(fashion)):
            chosen = full.balanced(per_class, SEED)
            arrays = {"images": chosen.images[..., 0].numpy(), "labels": chosen.labels.numpy().astype(np.uint8)}
            for name, array in arrays.items():
                # A fixed date: the same data give the same bytes.
                entry = zipfile.ZipInfo(f"{part}_{name}.npy")
                entry.compress_type = zipfile.ZIP_LZMA
                with archive.open(entry, "w") as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(array))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fastkd.demos.subset", description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", type=Path, required=True, help="folder with the four idx files")
    parser.add_argument("--out", type=Path, default=pictures.SUBSET)
    options = parser.parse_args()
    write(options.fashion, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
