"""Batches of augmented images: the same ones for the same seed, however many workers, ranks or restarts.

Everything random about a sample (crop, flip, replacement of an unreadable file, key of the mask) comes from a generator
seeded by (seed, epoch, repeat, image index) in the worker that decodes it. So neither the number of workers nor the
point of resuming changes a batch, and ranks that share a global batch see exactly what one process would see.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .folder import ImageFolder
from .prefetch import on_device
from .transforms import random_resized_crop

logger = logging.getLogger("fastkd")

SECONDS_AFTER_SIGTERM = 300  # that a worker goes on, for the last step of the main process


class UnreadableError(RuntimeError):
    """Image after image cannot be read."""


class Batch(NamedTuple):
    """One batch.

    Attributes:
        images: [B, height, width, channels] uint8.
        keys: [B] int64, what fixes the mask of each image (see `fastkd.ops.random_masking`).
        indices: [B] int64, index of each image in the folder.
        failures: ((path, reason), ...) of the files that could not be read and were replaced.
    """

    images: Tensor
    keys: Tensor
    indices: Tensor
    failures: tuple[tuple[str, str], ...]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with images and keys on a device; the copy does not block."""
        images, keys = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.keys))
        return self._replace(images=images, keys=keys)


class ImageLoader:
    """Endless iterator of training batches over an image folder.

    An epoch is one random order of the images cut into global batches of ``batch_size * world_size``; the incomplete
    last one is left out. Rank r takes rows ``[r * batch_size, (r + 1) * batch_size)`` of each global batch. A folder
    with fewer images than a global batch is repeated within the batch, each time with another crop and mask.

    Args:
        folder: `ImageFolder` or path.
        size: (height, width) of the images.
        batch_size: images per batch and process.
        channels: 3 (RGB) or 1 (grey).
        seed: fixes everything.
        workers: decoding processes; 0 decodes in this process.
        rank, world_size: this process among those that share a global batch.
        device: where images and keys are wanted; batches for a GPU are copied two ahead (see `on_device`).
        augmentation: keyword arguments of `random_resized_crop` (scale, ratio, flip).

    Attributes:
        batches_per_epoch: global batches in an epoch.
        skipped: unreadable files met and replaced so far by this process.
        wait_seconds: time that this process has waited for batches.
    """

    def __init__(
        self,
        folder: ImageFolder | str | os.PathLike,
        size: tuple[int, int],
        batch_size: int,
        *,
        channels: int = 3,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        **augmentation,
    ) -> None:
        folder = folder if isinstance(folder, ImageFolder) else ImageFolder(folder)
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 3 (RGB) or 1 (grey)")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.folder = folder
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.device = torch.device(device)
        self.global_batch = batch_size * world_size
        self.batches_per_epoch = max(1, len(folder) // self.global_batch)
        self._views = _Views(folder, size, channels, seed, augmentation)
        self._options = dict(
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # leaves the global generator alone
        )
        self._position = 0  # batches handed out since the very first
        self._reported: set[str] = set()
        self.skipped = 0
        self.wait_seconds = 0.0

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, as a fraction."""
        return self._position / self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the current position; batches that were only prefetched do not count as consumed.

        Raises:
            UnreadableError: many files in a row cannot be read.
        """
        if len(self.folder) < self.global_batch and self.rank == 0:
            logger.warning(
                "%s has %d images, fewer than one batch of %d: they are repeated within the batch, each time with "
                "another crop and mask (a smaller batch size avoids this)",
                self.folder.root, len(self.folder), self.global_batch,
            )  # fmt: skip
        with contextlib.closing(on_device(self._loaded(), self.device)) as batches:
            for batch in batches:
                self._position += 1
                self._report(batch)
                yield batch

    def _loaded(self) -> Iterator[Batch]:
        """Batches on the CPU; the time that they keep this process waiting counts."""
        batches = iter(DataLoader(self._views, sampler=self._keys(self._position), **self._options))
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - start
            yield batch

    def _keys(self, position: int) -> Iterator[list[tuple[int, int, int]]]:
        """(epoch, repeat, index) of the images of this rank's batches, from a position on, without end."""
        count = len(self.folder)
        for epoch in itertools.count(position // self.batches_per_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(count)
            start = position % self.batches_per_epoch if epoch == position // self.batches_per_epoch else 0
            for batch in range(start, self.batches_per_epoch):
                first = batch * self.global_batch + self.rank * self.batch_size
                places = range(first, first + self.batch_size)
                yield [(epoch, place // count, int(order[place % count])) for place in places]

    def _report(self, batch: Batch) -> None:
        self.skipped += len(batch.failures)
        for path, reason in batch.failures:
            if path not in self._reported:
                self._reported.add(path)
                logger.warning("skipped unreadable image %s: %s (another image takes its place)", path, reason)
        if batch.indices.numpy().min() < 0:
            raise UnreadableError(
                f"{self.folder.root}: {_Views.attempts} files in a row cannot be read, the last one "
                f"{batch.failures[-1][0]} ({batch.failures[-1][1]}); is this a folder of images?"
            )

    def state_dict(self) -> dict:
        """Position and what it depends on; plain numbers and strings."""
        return dict(
            position=self._position, skipped=self.skipped, seed=self.seed, global_batch=self.global_batch,
            images=len(self.folder), fingerprint=self._fingerprint(),
        )  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Continues after the last batch that was consumed when `state` was taken.

        Raises:
            ValueError: other images, another seed or another global batch: the batches would not be the same.
        """
        here = self.state_dict()
        for name in ("seed", "global_batch", "images", "fingerprint"):
            if state[name] != here[name]:
                what = "names of the images" if name == "fingerprint" else name.replace("_", " ")
                raise ValueError(
                    f"cannot resume on {self.folder.root}: {what}: got {here[name]}, expected {state[name]} as in the "
                    f"checkpoint; restore it, or start a new run"
                )
        self._position, self.skipped = state["position"], state["skipped"]

    def _fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.folder.paths).encode()).hexdigest()[:16]


class _Views(torch.utils.data.Dataset):
    """Decodes the images of one batch; lives in the workers."""

    attempts = 20

    def __init__(self, folder: ImageFolder, size, channels, seed, augmentation) -> None:
        self.folder, self.size, self.channels = folder, tuple(size), channels
        self.seed, self.augmentation = seed, augmentation

    def __getitem__(self, keys: list[tuple[int, int, int]]) -> Batch:
        images = torch.empty((len(keys), *self.size, self.channels), dtype=torch.uint8)
        pixels = images.numpy()
        masks, indices = (torch.empty(len(keys), dtype=torch.int64) for _ in range(2))
        failures: list[tuple[str, str]] = []
        for row, (epoch, repeat, index) in enumerate(keys):
            random = np.random.default_rng((self.seed, epoch, repeat, index))
            masks[row] = int(random.integers(1 << 63))  # drawn first: an unreadable file keeps the mask
            pixels[row], indices[row] = self._view(index, random, failures)
        return Batch(images, masks, indices, tuple(failures))

    def _view(self, index: int, random: np.random.Generator, failures: list) -> tuple[np.ndarray | int, int]:
        """The augmented image and its index, which is another one where files are unreadable; (0, -1) in the end."""
        for _ in range(self.attempts):
            path = self.folder.path(index)
            try:
                options = self.augmentation
                return random_resized_crop(path, self.size, random, channels=self.channels, **options), index
            except Exception as error:  # Pillow's decoders raise many types on broken files
                failures.append((path, f"{type(error).__name__}: {error}"))
                index = int(random.integers(len(self.folder)))
        return 0, -1


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach all processes: the main one decides, workers go on serving its last step.
    # They end with it: by its word, or when they see that it is gone. Should it wait for them without a word, as an
    # interpreter does that exits with an iterator alive, SIGTERM ends them after all, late.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
