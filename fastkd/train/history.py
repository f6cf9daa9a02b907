"""Losses since the last report: they wait on the device, are read all at once, and are looked at for NaN and inf."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint
from .distributed import Processes
from .track import RunFolder

if TYPE_CHECKING:
    from fastkd.data import ImageSource

logger = logging.getLogger("fastkd")
SHOWN = 3  # files of a batch that a message names itself


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what is still good."""


class History:
    """What the steps since the last report said, one row each.

    Args:
        names: of the columns: losses, which each process has its own of, then what all processes share (grad_norm).
        losses: how many of them are losses.
        scaled: whether gradients are scaled for float16. They overflow now and then, which their scaler sees to: losses
            alone must be finite then, else all columns.
        capacity: steps between two reports.
        tolerated: steps of the whole run that may fail. The caller leaves their updates out.
        group: this process; values are kept on its device.
        run: where the files of a batch are listed that failed: nonfinite/step_N.txt.
        images: which the indices of a batch refer to.

    Attributes:
        filled: rows so far.
        nonfinite: steps that failed, up to the last report.
    """

    def __init__(
        self, names: Sequence[str], losses: int, scaled: bool, capacity: int, tolerated: int, group: Processes,
        run: RunFolder, images: ImageSource,
    ) -> None:  # fmt: skip
        self.names, self.losses, self.tolerated = tuple(names), losses, tolerated
        self._judged = losses if scaled else len(names)
        self.group, self.run, self.images = group, run, images
        self.filled = self.nonfinite = self._told = 0
        self._values = torch.zeros(capacity, len(names), device=group.device)
        self._indices: list[Sequence[Tensor]] = []

    def load(self, rows: Tensor, nonfinite: int) -> None:
        """Goes on from a checkpoint. Rows with other columns, of a run with other options, are left out."""
        self.nonfinite = nonfinite
        if rows.shape[1] == len(self.names):
            self.filled = self._told = len(rows)
            self._values = torch.cat([rows.to(self._values), self._values])[: max(len(rows), len(self._values))]
            self._indices = [()] * len(rows)

    def add(self, values: Tensor, indices: Sequence[Tensor]) -> None:
        """Keeps the losses of a step, and which images it saw."""
        self._values[self.filled] = values
        self._indices.append(indices)
        self.filled += 1

    def read(self, step: int, everywhere: bool = False) -> Tensor:
        """All rows on the CPU, those of this process or (called by all of them) the means over processes.

        Raises:
            TrainingError: more steps than are tolerated failed. `step` is the number of the last one.
        """
        own = self._values[: self.filled]
        rows = (self.group.mean(own) if everywhere else own).cpu()
        for count, row in enumerate(self._failed(rows).nonzero().flatten().tolist(), self.nonfinite + 1):
            beyond = count > self.tolerated
            if not beyond and row < self._told:
                continue
            number = step - self.filled + row + 1
            what = ", ".join(f"{name} is {value:.4g}" for name, value in zip(self.names, rows[row].tolist()))
            elsewhere = self.group.world_size > 1 and not (everywhere and rows[row, : self.losses].isfinite().all())
            what += self._files(number, row, elsewhere)
            if beyond:
                more = f" ({count} such steps, {self.tolerated} are tolerated)" if self.tolerated else ""
                raise TrainingError(not_finite(number, what, self.run, more))
            logger.warning("step %d is left out (%d of %d tolerated): %s", number, count, self.tolerated, what)
        self._told = self.filled
        return rows

    def report(self, step: int) -> dict[str, float]:
        """Means over the steps that did not fail, by name, and the number of those that did; then begins anew.

        Called by all processes. TrainingError as for `read`.
        """
        rows = self.read(step, everywhere=True)
        failed = self._failed(rows)
        self.nonfinite += int(failed.sum())
        means = torch.where(rows.isfinite() & ~failed[:, None], rows, torch.nan).nanmean(0)
        self.filled = self._told = 0
        self._indices = []
        found = dict(zip(self.names, means.tolist()))
        return {**found, "nonfinite": self.nonfinite} if self.tolerated else found

    def _failed(self, rows: Tensor) -> Tensor:
        return ~rows[:, : self._judged].isfinite().all(1)

    def _files(self, number: int, row: int, elsewhere: bool) -> str:
        """Which images a step saw, for a message; the list of all of them goes into a file.

        Where another process may have met the bad batch, one with finite losses points there.
        """
        if elsewhere and self._values[row, : self.losses].isfinite().all():
            return "; the losses of this process are finite: see what the others say"
        if not len(self._indices[row]):
            return ""
        indices = torch.cat([part.flatten() for part in self._indices[row]]).unique().tolist()
        files = [self.images.path(index) for index in indices]
        rank = f"_rank_{self.group.rank}" if self.group.world_size > 1 else ""
        listing = self.run.root / f"nonfinite/step_{number}{rank}.txt"
        listing.parent.mkdir(exist_ok=True)
        listing.write_text("".join(f"{file}\n" for file in files))
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        return f"; the batch is {', '.join(files[:SHOWN])}{more} (listed in {listing})"


def not_finite(step: int, what: str, run: RunFolder, more: str = "") -> str:
    """The message with which training stops."""
    good = checkpoint.find(run.root)
    kept = f"the last good checkpoint is kept: {good}" if good else "no checkpoint was written yet"
    return (
        f"step {step}: {what}. Training stops{more}; {kept}. Try a lower --blr, more --warmup-epochs, --clip-grad 1, "
        "or --amp off; --skip-nonfinite N leaves N such steps out"
    )
