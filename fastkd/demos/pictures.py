"""Labelled pictures in memory: the embedded Fashion-MNIST subset, all of Fashion-MNIST, or any image folder."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
SUBSET = ASSETS / "fashion_mnist_subset.npz"
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
HOW_TO_GET = (
    "on Debian or Ubuntu: apt-get install dataset-fashion-mnist, then --fashion /usr/share/datasets/fashion-mnist; "
    "elsewhere give the folder with its four *-ubyte.gz files"
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Pictures(NamedTuple):
    """Pictures and their classes.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        classes: name of each class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def subset(self, index: Tensor | slice) -> Pictures:
        return Pictures(self.images[index], self.labels[index], self.classes)

    def balanced(self, per_class: int, seed: int) -> Pictures:
        """`per_class` pictures of each class (all of a smaller class), drawn with `seed`, in mixed order."""
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=random)
        chosen = [order[self.labels[order] == c][:per_class] for c in range(len(self.classes))]
        chosen = torch.cat(chosen)
        return self.subset(chosen[torch.randperm(len(chosen), generator=random)])


def embedded() -> tuple[Pictures, Pictures]:
    """The 6,000 train and 2,000 test pictures of Fashion-MNIST (28 x 28, grey) that come with the package."""
    with np.load(SUBSET) as data:
        return tuple(_pictures(data[f"{part}_images"], data[f"{part}_labels"]) for part in ("train", "test"))


def fashion(folder: str | Path) -> tuple[Pictures, Pictures]:
    """All 60,000 train and 10,000 test pictures from the four idx files of Fashion-MNIST.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get the data.
    """
    folder = Path(folder)
    parts = []
    for part in ("train", "t10k"):
        paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"--fashion: {path} does not exist; {HOW_TO_GET}")
        images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
        parts.append(_pictures(images[16:].reshape(-1, 28, 28), labels[8:]))
    return tuple(parts)


def folder(root: str | Path, size: int, channels: int, held_out: float = 0.25, seed: int = 0):
    """Every picture below `root`; its class is the first folder level.

    Pictures are cropped to the central square, resized to size x size and pasted on white where transparent.

    Args:
        root: folder with one folder per class, any depth below.
        size: side in pixels.
        channels: 1 for grey, 3 for colour.
        held_out: share of each class that is kept for the test part (at least one picture).
        seed: of the split.

    Returns:
        (train, test) `Pictures`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"pictures: {root} is not a folder; expected one folder per class inside it")
    names = sorted(d.name for d in root.iterdir() if d.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    counts = np.bincount([label for _, label in found], minlength=max(len(names), 1))
    if (counts >= 2).sum() < 2:
        raise ValueError(
            f"pictures: {root} has {(counts >= 2).sum()} class folders with two or more pictures, expected at least "
            f"two; put the pictures of each class into a folder of its own"
        )
    kept = [label for label in range(len(names)) if counts[label] >= 2]  # a class of one cannot be split
    found = [(path, kept.index(label)) for path, label in found if label in kept]
    pixels = np.stack([_read(path, size, channels) for path, _ in found])
    labels = torch.tensor([label for _, label in found])
    everything = Pictures(torch.from_numpy(pixels), labels, tuple(names[label] for label in kept))
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=random)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(kept)):
        members = order[labels[order] == label]
        test[members[: max(1, int(len(members) * held_out))]] = True
    return everything.subset(order[~test[order]]), everything.subset(order[test[order]])


def _pictures(images: np.ndarray, labels: np.ndarray) -> Pictures:
    # Copies: frombuffer gives read-only memory, which torch warns about.
    return Pictures(
        torch.from_numpy(images[..., None].copy()), torch.from_numpy(labels.astype(np.int64)), FASHION_CLASSES
    )


def _read(path: Path, size: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("L" if channels == 1 else "RGB")
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture).reshape(size, size, channels)
