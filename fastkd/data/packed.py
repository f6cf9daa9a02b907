"""Images decoded once and kept as pixels: what ``fastkd pack`` writes, and random access to it without a copy.

A packed folder holds

    packed.json        {"format": "fastkd-packed", "version": 1, "channels": 3, "short_side": 256, "classes": [...],
                        "shards": ["00000", ...], "index_crc32": [... of each .json], "images": 50000, "failures": 0};
                       written last: it says "complete"
    00000.pixels       the images of a shard one behind the other, each uint8 [height, width, channels], no header
    00000.json         columns of equal length, one entry per image: "name", "label" (-1: no class), "offset" (byte at
                       which it begins), "height", "width", "crc32" (of its bytes); and "failures" [[name, reason], ...]
    plan.json          what the folder is made of, so that packing can be continued
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from .source import ImageSource
from .transforms import center_box

FORMAT, VERSION = "fastkd-packed", 1
HEADER, PLAN = "packed.json", "plan.json"
AGAIN = "repeat the same fastkd pack command"
COLUMNS = ("name", "label", "offset", "height", "width", "crc32")


class PackedImages(ImageSource):
    """The images of a packed folder; stands in for `ImageFolder` wherever images are loaded.

    Args:
        root: folder that ``fastkd pack`` wrote.

    Attributes:
        root: the folder, a `Path`.
        paths: names of the images: their paths relative to the folder that was packed.
        classes: sorted names of the classes.
        labels: for each image the index of its class, -1 for none.
        channels: 3 (RGB) or 1 (grey).
        sizes: [N, 2] int64, (height, width) of each image.

    Raises:
        FileNotFoundError: not a packed folder, or a shard is missing.
        ValueError: not finished, another version, or a shard that is shorter than its index says.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser()
        if not (self.root / HEADER).exists():
            if (self.root / PLAN).exists():
                raise ValueError(f"packed images {str(root)!r}: packing is not finished; {AGAIN}")
            raise FileNotFoundError(f"packed images {str(root)!r}: no {HEADER} there; make it with fastkd pack")
        header = json.loads((self.root / HEADER).read_text())
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            got = f"{header['format']} version {header['version']}"
            raise ValueError(
                f"packed images {str(root)!r}: got {got}, expected {FORMAT} version {VERSION}; pack again, or use "
                "the fastkd that wrote it"
            )
        self.channels, self.classes = header["channels"], header["classes"]
        self._shards = [self.root / f"{name}.pixels" for name in header["shards"]]
        checksums = header.get("index_crc32", itertools.repeat(None))  # missing in early folders
        parts = [self._part(name, crc) for name, crc in zip(header["shards"], checksums)]
        name, label, offset, height, width, crc = ([v for part in parts for v in part[key]] for key in COLUMNS)
        self.paths, self.labels = name, label
        self.sizes = np.stack([np.array(height, np.int64), np.array(width, np.int64)], 1).reshape(-1, 2)
        self._offsets, self._crc = np.array(offset, np.int64), np.array(crc, np.int64)
        self._shard = np.repeat(np.arange(len(parts)), [len(part["name"]) for part in parts])
        self._maps: dict[int, np.ndarray] = {}
        if not self.paths:
            raise ValueError(f"packed images {str(root)!r}: got no image")
        ends = self._offsets + self.sizes.prod(1) * self.channels
        for shard, path in enumerate(self._shards):
            here, need = path.stat().st_size, int(ends[self._shard == shard].max(initial=0))
            if here < need:
                raise ValueError(f"{path}: got {here} bytes, expected {need}; delete it with its .json and {AGAIN}")

    def _part(self, name: str, crc: int | None) -> dict:
        """The index of a shard."""
        path = self.root / f"{name}.json"
        for file in (path, path.with_suffix(".pixels")):
            if not file.exists():
                raise FileNotFoundError(f"{file}: missing; delete {path.name} where it is there, and {AGAIN}")
        content = path.read_bytes()
        if crc is not None and zlib.crc32(content) != crc:
            raise ValueError(f"{path}: damaged, its checksum differs; delete it and {AGAIN}")
        return json.loads(content)

    def path(self, index: int) -> str:
        return f"{self._shards[self._shard[index]]}:{self.paths[index]}"

    def image(self, index: int) -> np.ndarray:
        """uint8 [height, width, channels], a read-only view of the mapped file."""
        start, (height, width) = self._offsets[index], self.sizes[index]
        flat = self._map(int(self._shard[index]))[start : start + height * width * self.channels]
        return flat.reshape(height, width, self.channels)

    def picture(self, index: int, channels: int = 3) -> Image.Image:
        return self._picture(self.image(index), channels)

    def center_crop(self, index: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
        image = self.image(index)
        top, left, tall, wide = center_box(image.shape[:2], size)
        picture = self._picture(image[top : top + tall, left : left + wide], channels)
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, channels)

    def _picture(self, pixels: np.ndarray, channels: int) -> Image.Image:
        image = Image.fromarray(pixels if self.channels == 3 else pixels[..., 0])
        return image.convert("L" if channels == 1 else "RGB")

    def is_whole(self, index: int) -> bool:
        """Whether the pixels are those that were written."""
        return zlib.crc32(self.image(index)) == self._crc[index]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:  # at the first use, in the process that uses it
            path = self._shards[shard]
            empty = path.stat().st_size == 0
            self._maps[shard] = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r").view(np.ndarray)
        return self._maps[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(_maps={})  # a worker maps the files itself


def is_packed(folder: str | os.PathLike) -> bool:
    """Whether a folder was written by ``fastkd pack``, finished or not."""
    folder = Path(folder).expanduser()
    return (folder / HEADER).exists() or (folder / PLAN).exists()
