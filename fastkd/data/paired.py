"""Batches of two folders at once: labelled images of one domain beside unlabelled images of another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .batch import Batch
from .loader import ImageLoader


class PairedLoader:
    """Batches of one loader with the images of another one as `others`; epochs are those of the first.

    Args:
        first, second: loaders of batches of one size. Both positions are kept and restored.
    """

    def __init__(self, first: ImageLoader, second: ImageLoader) -> None:
        self.first, self.second = first, second
        self.folder, self.global_batch, self.batches_per_epoch = (
            first.folder,
            first.global_batch,
            first.batches_per_epoch,
        )

    @property
    def epoch(self) -> float:
        """Epochs of the first folder consumed so far."""
        return self.first.epoch

    @property
    def skipped(self) -> int:
        """Unreadable files met and replaced so far, in both folders."""
        return self.first.skipped + self.second.skipped

    @property
    def wait_seconds(self) -> float:
        """Time that this process has waited for batches."""
        return self.first.wait_seconds + self.second.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        with contextlib.closing(iter(self.first)) as ours, contextlib.closing(iter(self.second)) as theirs:
            for batch, other in zip(ours, theirs):
                yield batch._replace(others=other.images)

    def state_dict(self) -> dict:
        """Positions of both."""
        return dict(first=self.first.state_dict(), second=self.second.state_dict())

    def load_state_dict(self, state: dict) -> None:
        """Continues both; ValueError as `ImageLoader.load_state_dict`."""
        self.first.load_state_dict(state["first"])
        self.second.load_state_dict(state["second"])
