"""What loaders, packing and evaluation read from: labelled pictures by number, wherever they lie."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .transforms import center_crop, open_image


class ImageSource(abc.ABC):
    """Labelled pictures by number.

    Attributes:
        root: where they lie, a `Path`.
        paths: their names, in the order of their numbers; what a checkpoint knows the source by.
        classes: sorted names of the classes.
        labels: for each picture the index of its class, -1 for none.
    """

    root: Path
    paths: Sequence[str]
    classes: list[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """The names, hashed: the same for the same pictures in folders, archives or packed."""
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()[:16]

    @abc.abstractmethod
    def path(self, index: int) -> str:
        """Where a picture lies, for messages."""

    @abc.abstractmethod
    def picture(self, index: int, channels: int = 3) -> Image.Image:
        """A picture, whole and upright, RGB (channels=3) or grey (1)."""

    @abc.abstractmethod
    def center_crop(self, index: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
        """Evaluation view of a picture, uint8 [height, width, channels] (see `fastkd.data.center_crop`)."""


class ImageFiles(ImageSource):
    """Pictures that have to be decoded: `read` brings the bytes of one, nothing else touches the disk."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """The content of an image file. OSError where it cannot be read."""

    @abc.abstractmethod
    def stamps(self) -> Iterator[tuple[int, ...] | None]:
        """For each picture what changes when its content does: sizes and times; reads no content."""

    def picture(self, index: int, channels: int = 3) -> Image.Image:
        return open_image(self.read(index), channels)

    def center_crop(self, index: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
        return center_crop(self.read(index), size, channels=channels)


def by_folder(paths: Sequence[str]) -> tuple[list[str], list[int]]:
    """(classes, label of each path): the class is the first folder of a path; -1 where there is none."""
    owners = [path.split("/", 1)[0] if "/" in path else "" for path in paths]
    classes = sorted(set(owners) - {""})
    index = {name: place for place, name in enumerate(classes)} | {"": -1}
    return classes, [index[owner] for owner in owners]
