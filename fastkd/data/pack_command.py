"""``fastkd pack``: `pack` with a progress bar and a word at the end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastkd.train.config import ConfigError

from .folder import ImageFolder
from .pack import pack

if TYPE_CHECKING:
    from fastkd.cli import Pack


def run(options: Pack) -> int:
    """Packs; 0 when done. Files that cannot be read are named, counted and left out."""
    console = Console(stderr=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bar = Progress(
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[unreadable]}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        folder = ImageFolder(options.folder)
        with bar:
            task = bar.add_task("", total=len(folder), unreadable="")

            def progress(done: int, failed: int) -> None:
                bar.update(task, completed=done, unreadable=f"{failed} unreadable" if failed else "")

            done = pack(
                folder, options.out, short_side=options.short_side, channels=options.channels,
                shard_mb=options.shard_mb, workers=cores if options.workers < 0 else options.workers,
                progress=progress,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    for name, reason in done.failures:
        console.print(f"left out, unreadable: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    left_out = f", {len(done.failures)} unreadable ones left out" if done.failures else ""
    resumed = f" ({done.resumed} shards were already there)" if done.resumed else ""
    said = f"{done.images} images packed in {done.root}{left_out}{resumed}"
    console.print(
        f"{said}; fastkd distill --data {done.root} trains on them", highlight=False, markup=False, soft_wrap=True
    )
    return 0
