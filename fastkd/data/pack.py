"""Writes a packed folder (see `fastkd.data.packed`): every image is decoded once, in parallel, shard by shard.

A shard is complete when its .json exists; files get their names when they are whole. So a run that was stopped goes
on with the first shard that is missing, and never leaves a half-written one behind that could be read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from .folder import ImageFolder
from .packed import COLUMNS, FORMAT, HEADER, PLAN, VERSION
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
    folder: ImageFolder | str | os.PathLike,
    out: str | os.PathLike,
    *,
    short_side: int = 256,
    channels: int = 3,
    shard_mb: int = 512,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> Packed:
    """Decodes the images of a folder and writes them to `out`; goes on where an earlier call was stopped.

    Args:
        folder: `ImageFolder` or path.
        out: folder to write.
        short_side: images are shrunk (bicubic, antialiased) until their shorter side has that many pixels; smaller ones
            stay as they are.
        channels: 3 (RGB) or 1 (grey).
        shard_mb: size of a shard in 10^6 bytes, roughly.
        workers: decoding processes; 0 decodes in this process.
        progress: called with the number of images done and of those that could not be read.

    Raises:
        ValueError: wrong arguments, or `out` holds something else.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: got {channels}, expected 3 (RGB) or 1 (grey)")
    for name, value in (("short_side", short_side), ("shard_mb", shard_mb)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    folder = folder if isinstance(folder, ImageFolder) else ImageFolder(folder)
    out = Path(out).expanduser()
    per_shard = max(1, int(shard_mb * 1e6 / (short_side**2 * TYPICAL_RATIO * channels)))
    names = hashlib.sha256("\n".join(folder.paths).encode()).hexdigest()[:16]
    plan = dict(short_side=short_side, channels=channels, images_per_shard=per_shard, images=len(folder), names=names)
    _begin(out, plan)
    shards = [range(start, min(start + per_shard, len(folder))) for start in range(0, len(folder), per_shard)]
    resumed, done, failures = 0, 0, []
    with _Decoders(workers, short_side, channels) as decode:
        for number, members in enumerate(shards):
            index = out / f"{number:05}.json"
            if index.exists():
                failed, resumed = json.loads(index.read_text())["failures"], resumed + 1
            else:
                before, lost = done, len(failures)
                failed = _write_shard(
                    index, folder, members, decode, lambda n, f, b=before, k=lost: progress(b + n, k + f)
                )
            failures += [tuple(failure) for failure in failed]
            done += len(members)
            progress(done, len(failures))
    header = dict(
        format=FORMAT, version=VERSION, channels=channels, short_side=short_side, classes=folder.classes,
        shards=[f"{number:05}" for number in range(len(shards))], images=len(folder) - len(failures),
        failures=len(failures),
    )  # fmt: skip
    _write(out / HEADER, json.dumps(header, indent=1).encode())
    return Packed(out, header["images"], tuple(failures), resumed)


def _begin(out: Path, plan: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).exists():
        before = json.loads((out / PLAN).read_text())
        changed = [
            f"{key}: got {plan[key]}, expected {before.get(key)}" for key in plan if plan[key] != before.get(key)
        ]
        if changed:
            raise ValueError(f"{out}: was begun with other settings ({'; '.join(changed)}); choose another folder")
    elif any(out.iterdir()):
        raise ValueError(f"{out}: got a folder with other files, expected an empty or new one")
    else:
        _write(out / PLAN, json.dumps(plan).encode())


def _write_shard(index: Path, folder: ImageFolder, members: range, decode, progress) -> list[tuple[str, str]]:
    """Writes the pixels and then the index of one shard; returns its failures."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    failures, end = [], 0
    pixels = index.with_suffix(".pixels")
    unfinished = pixels.with_suffix(".pixels.part")
    with open(unfinished, "wb") as file:
        for done, (member, found) in enumerate(zip(members, decode([folder.path(m) for m in members])), 1):
            if isinstance(found, str):
                failures.append((folder.paths[member], found))
            else:
                image, crc = found
                file.write(image)
                row = (folder.paths[member], folder.labels[member], end, *image.shape[:2], crc)
                for column, value in zip(columns.values(), row):
                    column.append(value)
                end += image.nbytes
            progress(done, len(failures))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, pixels)
    _write(index, json.dumps(columns | dict(failures=failures)).encode())
    return failures


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


class _Decoders:
    """Decodes files in order, in processes of its own or (workers=0) in this one."""

    def __init__(self, workers: int, short_side: int, channels: int) -> None:
        self.options = short_side, channels
        self.pool = multiprocessing.Pool(workers, _ignore_interrupt) if workers else None

    def __enter__(self) -> Callable[[list[str]], Iterable]:
        return self._decode_all

    def _decode_all(self, paths: list[str]) -> Iterable:
        tasks = [(path, *self.options) for path in paths]
        return self.pool.imap(_decode, tasks, chunksize=4) if self.pool else map(_decode, tasks)

    def __exit__(self, *error) -> None:
        if self.pool:
            self.pool.terminate()
            self.pool.join()


def _decode(task: tuple[str, int, int]) -> tuple[np.ndarray, int] | str:
    """(image, checksum), or why it cannot be read."""
    try:
        image = np.ascontiguousarray(shrink(*task))
        return image, zlib.crc32(image)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        return f"{type(error).__name__}: {error}"


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides, and ends its workers
