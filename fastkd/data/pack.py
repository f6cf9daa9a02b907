"""Writes a packed folder (see `fastkd.data.packed`): every image is decoded once, in parallel, shard by shard.

A shard is complete when its .json exists; files get their names when they are whole. So a run that was stopped, by
whatever means, goes on with the first shard that is missing, and never leaves a half-written one that could be read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastkd.files import write_whole

from .loader import UnreadableError, as_it_is, begin_worker, open_images
from .packed import COLUMNS, FORMAT, HEADER, PLAN, VERSION
from .reading import printable
from .source import ImageFiles, ImageSource
from .transforms import shrink

TYPICAL_RATIO = 4 / 3  # long side over short side of a usual photo: decides how many images make a shard


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` did.

    Attributes:
        root: the packed folder.
        images: images in it.
        failures: ((name, reason), ...) of the files that could not be read and are left out.
        resumed: shards that were already there.
    """

    root: Path
    images: int
    failures: tuple[tuple[str, str], ...]
    resumed: int


def pack(
    folder: ImageFiles | str | os.PathLike,
    out: str | os.PathLike,
    *,
    short_side: int = 256,
    channels: int = 3,
    shard_mb: int = 512,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> Packed:
    """Decodes the images of a folder or of archives and writes them to `out`; goes on where an earlier call stopped.

    Args:
        folder: `ImageFolder`, `TarImages` or the path of one.
        out: folder to write.
        short_side: images are shrunk (bicubic, antialiased) until their shorter side has that many pixels; smaller ones
            stay as they are.
        channels: 3 (RGB) or 1 (grey).
        shard_mb: size of a shard in 10^6 bytes, roughly.
        workers: decoding processes; 0 decodes in this process.
        progress: called with the number of images done and of those that could not be read.

    Raises:
        ValueError: wrong arguments; `out` holds something else, or was begun from other images or with other settings.
        UnreadableError: no image can be read.
        OSError: `out` cannot be written. The same call goes on once it can.
        RuntimeError: a decoding process was killed, as for lack of memory. The same call goes on.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: got {channels}, expected 3 (RGB) or 1 (grey)")
    for name, value in (("short_side", short_side), ("shard_mb", shard_mb)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    folder = folder if isinstance(folder, ImageSource) else open_images(folder)
    if not isinstance(folder, ImageFiles):
        raise ValueError(f"folder: got {folder.root}, packed already, expected image files or archives")
    out = Path(out).expanduser()
    per_shard = max(1, int(shard_mb * 1e6 / (short_side**2 * TYPICAL_RATIO * channels)))
    stamps = hashlib.sha256()
    for stamp in folder.stamps():
        stamps.update(repr(stamp).encode())
    settings = dict(short_side=short_side, channels=channels, images_per_shard=per_shard)
    source = dict(images=len(folder), names=folder.fingerprint(), stamps=stamps.hexdigest()[:16])
    _begin(out, settings, source)

    starts = range(0, len(folder), per_shard)
    shards = {out / f"{n:05}.json": range(start, min(start + per_shard, len(folder))) for n, start in enumerate(starts)}
    missing = [member for index, members in shards.items() if not index.exists() for member in members]
    decoded = _decode(folder, missing, workers, short_side, channels)
    resumed, done, failures, checksums = 0, 0, [], []

    def tell(here: int, failed: int) -> None:
        progress(done + here, len(failures) + failed)

    for index, members in shards.items():
        if index.exists():
            resumed += 1
        else:
            _write_shard(index, folder, members, decoded, tell)
        content = index.read_bytes()
        checksums.append(zlib.crc32(content))
        failures += [tuple(failure) for failure in json.loads(content)["failures"]]
        done += len(members)
        tell(0, 0)
    if len(failures) == len(folder):
        raise UnreadableError(
            f"{folder.root}: no image can be read, {': '.join(failures[0])}; is this the right folder?"
        )
    header = dict(
        format=FORMAT, version=VERSION, channels=channels, short_side=short_side, classes=list(folder.classes),
        shards=[index.stem for index in shards], index_crc32=checksums, images=len(folder) - len(failures),
        failures=len(failures),
    )  # fmt: skip
    write_whole(out / HEADER, json.dumps(header, indent=1))
    return Packed(out, header["images"], tuple(failures), resumed)


def _begin(out: Path, settings: dict, source: dict) -> None:
    """Writes down what is packed and how, or checks that it is what was begun."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / PLAN
    if not plan.exists():
        if any(path.name != f"{PLAN}.part" for path in out.iterdir()):
            raise ValueError(f"{out}: got a folder with other files, expected an empty or new one")
        write_whole(plan, json.dumps(settings | source))
        return
    before = json.loads(plan.read_text())
    changed = [
        f"{key}: got {settings[key]}, expected {before[key]}" for key in settings if settings[key] != before[key]
    ]
    if changed:
        raise ValueError(f"{out}: was begun with other settings ({'; '.join(changed)}); choose another folder")
    if any(source[key] != before.get(key, source[key]) for key in source):
        now, then = source["images"], before["images"]
        what = f"{now} images, expected {then}" if now != then else "other files, or files that were written since"
        raise ValueError(
            f"{out}: was begun from other images: got {what}; choose another folder, or delete this one to pack afresh"
        )


def _write_shard(index: Path, folder: ImageFiles, members: range, decoded: Iterator, progress) -> None:
    """Writes the pixels and then the index of one shard; takes its images from `decoded`."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    failures, end = [], 0
    pixels = index.with_suffix(".pixels")
    unfinished = pixels.with_suffix(".pixels.part")
    with open(unfinished, "wb") as file:
        for done, (member, found) in enumerate(zip(members, itertools.islice(decoded, len(members))), 1):
            if isinstance(found, str):
                failures.append((printable(folder.paths[member]), printable(found)))
            else:
                image, crc = found
                file.write(image)
                row = (folder.paths[member], int(folder.labels[member]), end, *image.shape[:2], crc)
                for column, value in zip(columns.values(), row):
                    column.append(value)
                end += image.nbytes
            progress(done, len(failures))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, pixels)
    write_whole(index, json.dumps(columns | dict(failures=failures)))


def _decode(folder: ImageFiles, members: list[int], workers: int, short_side: int, channels: int) -> Iterator:
    """In order: a shrunk image, uint8 [height, width, channels], and its checksum, or why it cannot be read.

    By torch's loader, whose workers end with this process however it ends, and are missed when one is killed.
    """
    if not members:
        return iter(())
    return iter(
        DataLoader(
            _Shrunk(folder, short_side, channels),
            sampler=members,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )  # fmt: skip
    )


class _Shrunk(torch.utils.data.Dataset):
    def __init__(self, folder: ImageFiles, short_side: int, channels: int) -> None:
        self.folder, self.options = folder, (short_side, channels)

    def __getitem__(self, member: int) -> tuple[np.ndarray, int] | str:
        try:
            image = np.ascontiguousarray(shrink(self.folder.read(member), *self.options))
            return image, zlib.crc32(image)
        except Exception as error:  # Pillow's decoders raise many types on broken files
            return f"{type(error).__name__}: {error}"
