"""What a run leaves behind and what it shows: metrics.jsonl, train.log, config.yaml and the progress bar."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastkd.files import write_whole

from .config import FACTS
from .trackers import Tracker

logger = logging.getLogger("fastkd")
CONFIG = "config.yaml"
HEADING = f"# What ran, in full: the same command with --config {CONFIG} --out NEW does it again, without '{FACTS}'.\n"
LOSSES = ("loss", "pixel_loss", "align_loss")


class RunFolder:
    """Files of one run.

    Args:
        root: the folder.
        writes: False reads alone: of several processes one writes.

    Attributes:
        root: the folder.
        checkpoints: ``checkpoints``, a folder.
        pictures: ``pictures``, a folder.
        exported: ``exported/student_timm.safetensors``; exported_ema: ``exported/student_ema_timm.safetensors``.
        trackers: who gets metrics and pictures as well (see `fastkd.train.trackers`).
    """

    def __init__(self, root: str | Path, writes: bool = True) -> None:
        self.root, self.writes = Path(root).expanduser(), writes
        self.checkpoints = self.root / "checkpoints"
        self.exported = self.root / "exported/student_timm.safetensors"
        self.exported_ema = self.root / "exported/student_ema_timm.safetensors"
        self.pictures = self.root / "pictures"
        self.trackers: list[Tracker] = []
        self._metrics = self.root / "metrics.jsonl"
        self._unwritten: list[str] = []

    def begin(self, config: dict, facts: dict) -> None:
        """Creates the folders and writes config.yaml: the config, and under `run` facts that no option sets."""
        for folder in (self.root, self.checkpoints, self.exported.parent, self.pictures):
            folder.mkdir(parents=True, exist_ok=True)
        content = {**self.plain(config), FACTS: self.plain({**facts, "versions": versions()})}
        text = HEADING + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        write_whole(self.root / CONFIG, text)

    @staticmethod
    def plain(config: dict) -> dict:
        """A config as it reads back from config.yaml (tuples are lists there)."""
        return json.loads(json.dumps(config))

    def config(self) -> dict:
        """The config of the run that is there; empty without one."""
        return self._written()[0]

    def facts(self) -> dict:
        """What else config.yaml says: `given` (the options before they were resolved), `classes`, `versions`."""
        return self._written()[1]

    def _written(self) -> tuple[dict, dict]:
        path = self.root / CONFIG
        content = yaml.safe_load(path.read_text()) if path.exists() else {}
        facts = content.pop(FACTS, {})
        return content, facts

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl; a last line that a crash cut off is left out."""
        rows = []
        for line in self._metrics.read_text(errors="replace").splitlines() if self._metrics.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Drops the metrics after a step (-1: all), which the run writes again, and what a crash left half-written."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_whole(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))
        for path in self.exported.parent.glob(".*.part"):
            path.unlink()

    def add(self, row: dict) -> None:
        """Appends a line to metrics.jsonl; on a full disk it is written later, with the next one or by `sync`."""
        if self.writes:
            self._unwritten.append(json.dumps(row) + "\n")
            try:
                self._append()
            except OSError as error:
                logger.error("%s cannot be written, which is tried again: %s", self._metrics, error)
        for tracker in self.trackers:
            tracker.add(row)

    def sync(self) -> None:
        """Brings all of metrics.jsonl to the disk: a checkpoint promises the lines up to its step. OSError if not."""
        self._append()
        with self._metrics.open("rb") as file:
            os.fsync(file.fileno())

    def _append(self) -> None:
        """Writes all waiting lines or none: half a line would hide those after it."""
        waiting = memoryview("".join(self._unwritten).encode())
        with self._metrics.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while waiting:
                    waiting = waiting[file.write(waiting) :]
            except OSError:
                file.truncate(before)
                raise
        self._unwritten.clear()

    def show(self, step: int) -> None:
        """Gives the pictures as they are now to the trackers."""
        for picture in sorted(self.pictures.glob("*.png")):
            for tracker in self.trackers:
                tracker.show(picture, step)

    def close(self) -> None:
        """Ends the trackers."""
        for tracker in self.trackers:
            tracker.close()


def versions() -> dict[str, str]:
    """Versions that the numbers of a run depend on."""
    import torch

    import fastkd

    return dict(fastkd=fastkd.__version__, torch=torch.__version__, python=platform.python_version())


class Reporter:
    """Progress bar on a terminal, one line per report elsewhere, and everything in train.log.

    A context manager; silent on processes that are not the main one.
    """

    def __init__(self, log: Path, total: int, start: int, quiet: bool = False, losses: Sequence[str] = LOSSES) -> None:
        self.quiet, self._losses = quiet, losses
        self._total, self._last = total, (0, 0.0)  # step and seconds of the report before
        self._console = Console(stderr=True, quiet=quiet)
        self._handlers: list[logging.Handler] = []
        if not quiet:
            self._handlers = [_Shown(self._console), _Log(log)]
            for handler in self._handlers:
                handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._bar = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(), console=self._console, disable=quiet or not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, completed=start, status="")

    def __enter__(self) -> Reporter:
        self._level, self._propagate = logger.level, logger.propagate
        logger.setLevel(logging.WARNING if self.quiet else logging.INFO)
        logger.propagate = False
        for handler in self._handlers:
            logger.addHandler(handler)
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(self._level)
        logger.propagate = self._propagate

    def step(self) -> None:
        self._bar.advance(self._task)

    def report(self, row: dict) -> None:
        """Shows a line of metrics."""
        losses = ", ".join(f"{name.removesuffix('_loss')} {row[name]:.4g}" for name in self._losses)
        status = f"{losses}, {row['images_per_second']:.4g} img/s, data_wait {row['data_wait']:.0%}"
        self._bar.update(self._task, status=status)
        (step, seconds), self._last = self._last, (row["step"], row["seconds"])
        left = (self._total - row["step"]) * (row["seconds"] - seconds) / max(1, row["step"] - step)
        eta = datetime.timedelta(seconds=round(left))
        record = f"step {row['step']} epoch {row['epoch']:.3g}: {status}, lr {row['lr']:.3g}, ETA {eta}"
        if self._bar.disable:
            logger.info(record)
        else:  # the bar already shows it
            for handler in self._handlers[1:]:
                handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, record, (), None))


class _Shown(logging.Handler):
    """Prints above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class _Log(logging.FileHandler):
    """train.log; a full disk costs lines of it, not the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The terminal has the line all the same."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Stopwatch:
    """Seconds of training: over restarts, and without what happens inside `pause`."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def pause(self):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin
