"""``fastkd pack``: `pack` with a progress bar and a word at the end, or a check of what it wrote."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastkd.train.config import ConfigError

from .loader import UnreadableError, open_images
from .pack import pack
from .packed import PackedImages
from .reading import printable

if TYPE_CHECKING:
    from fastkd.cli import Pack


def run(options: Pack) -> int:
    """Packs or checks: 0 when done, 1 where it failed or something is damaged; unreadable files are named, counted."""
    if options.verify and options.out is not None:
        raise ConfigError([f"OUT: got {options.out}, expected none with --verify: fastkd pack PACKED --verify"])
    if options.out is None and not options.verify:
        raise ConfigError(["OUT: got none, expected the folder to write: fastkd pack FOLDER OUT"])
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    return _verify(options, console) if options.verify else _pack(options, console)


def _pack(options: Pack, console: Console) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        folder = open_images(options.folder)
    except (ValueError, OSError) as error:
        raise ConfigError([f"FOLDER: {error}"]) from error
    try:
        with _bar("packing", console) as bar:
            task = bar.add_task("", total=len(folder), bad="")

            def progress(done: int, failed: int) -> None:
                bar.update(task, completed=done, bad=f"{failed} unreadable" if failed else "")

            done = pack(
                folder, options.out, short_side=options.short_side, channels=options.channels,
                shard_mb=options.shard_mb, workers=cores if options.workers < 0 else options.workers,
                progress=progress,
            )  # fmt: skip
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    except UnreadableError as error:
        console.print(f"fastkd pack: {error}")
        return 1
    except (OSError, RuntimeError) as error:  # a full disk, no permission; a worker that was killed
        console.print(f"fastkd pack: {options.out}: {error}. Finished shards are kept: the same command goes on there")
        return 1
    for name, reason in done.failures:
        console.print(f"left out, unreadable: {name}: {reason}")
    left_out = f", {len(done.failures)} unreadable ones left out" if done.failures else ""
    resumed = f" ({done.resumed} shards were already there)" if done.resumed else ""
    said = f"{done.images} images packed in {done.root}{left_out}{resumed}"
    console.print(f"{said}; fastkd distill --data {done.root} trains on them")
    return 0


def _verify(options: Pack, console: Console) -> int:
    try:
        images = PackedImages(options.folder)
    except (ValueError, OSError) as error:
        console.print(f"fastkd pack: {error}")
        return 1
    damaged = 0
    with _bar("checking", console) as bar:
        task = bar.add_task("", total=len(images), bad="")
        for index in range(len(images)):
            if not images.is_whole(index):
                damaged += 1
                console.print(f"damaged: {printable(images.path(index))}")
            bar.update(task, advance=1, bad=f"{damaged} damaged" if damaged else "")
    if damaged:
        fix = "delete the files of their shards (.pixels and .json) and pack again: only these are made anew"
        console.print(f"{damaged} of {len(images)} images in {images.root} are damaged; {fix}")
        return 1
    console.print(f"{len(images)} images in {images.root} are whole")
    return 0


def _bar(what: str, console: Console) -> Progress:
    return Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip
