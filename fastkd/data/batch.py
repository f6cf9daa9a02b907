"""What every loader hands out and promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .source import ImageSource


class Batch(NamedTuple):
    """One batch.

    Attributes:
        images: [B, height, width, channels] uint8.
        keys: [B] int64, what fixes the mask of each image (see `fastkd.ops.random_masking`).
        indices: [B] int64, index of each image in the folder.
        failures: ((path, reason), ...) of the files that could not be read and were replaced.
        labels: [B] int64, class of each image, -1 for none; None until the loader has filled it in.
        others: images of a second folder (`PairedLoader`), or None.
    """

    images: Tensor
    keys: Tensor
    indices: Tensor
    failures: tuple[tuple[str, str], ...]
    labels: Tensor | None = None
    others: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What training reads, by name."""
        named = dict(images=self.images, keys=self.keys, labels=self.labels, others=self.others)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> Batch:
        """The batch with images, keys and labels on a device; the copy does not block."""
        return self._replace(**{name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})


@runtime_checkable
class Loader(Protocol):
    """An endless iterator of batches that training can trust; `tests/test_loaders.py` holds every loader to it.

    Batches depend on the images, the seed and the position alone: not on the number of workers, nor on how often the
    run was resumed. Processes that share a global batch hand out disjoint parts of the one that a single process would
    see. A file that cannot be read is named in `Batch.failures`, counted, and replaced by another image, the same one
    each time.

    Attributes:
        folder: where the images come from.
        global_batch: views per batch of all processes.
        batches_per_epoch: whole global batches in an epoch.
        epoch: epochs consumed so far, as a fraction.
        skipped: unreadable files met and replaced so far by this process.
        wait_seconds: time that this process has waited for batches.
    """

    folder: ImageSource
    global_batch: int
    batches_per_epoch: int
    epoch: float
    skipped: int
    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]:
        """Goes on after the last batch that was consumed; several iterators at once are not meant."""

    def state_dict(self) -> dict:
        """The position, as plain numbers and strings; batches that were only read ahead do not count."""

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken. ValueError where the batches would not be the same ones."""
