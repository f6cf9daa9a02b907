"""Batches of augmented images: the same ones for the same seed, however many workers, ranks or restarts.

Everything random about a sample (crop, flip, replacement of an unreadable file, key of the mask) comes from a generator
seeded by (seed, epoch, repeat, image index) in the worker that decodes it. So neither the number of workers nor the
point of resuming changes a batch, and ranks that share a global batch see exactly what one process would see.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from .batch import Batch
from .crops import PackedViews
from .folder import ImageFolder
from .packed import PackedImages, is_packed
from .prefetch import on_device
from .source import ImageSource
from .tars import TarImages, holds_archives, is_archive
from .views import ATTEMPTS, FileViews

logger = logging.getLogger("fastkd")

SECONDS_AFTER_SIGTERM = 300  # that a worker goes on, for the last step of the main process


class UnreadableError(RuntimeError):
    """Image after image cannot be read."""


def open_images(place: str | os.PathLike) -> ImageSource:
    """What images there are.

    Args:
        place: a folder that ``fastkd pack`` wrote, a .tar archive, a folder of image files, or one of .tar archives.
    """
    path = Path(place).expanduser()
    if is_packed(path):
        return PackedImages(path)
    return TarImages(path) if is_archive(path) or (path.is_dir() and holds_archives(path)) else ImageFolder(path)


def draw(seed: int, masks: int, place: tuple[int, int, int]) -> tuple[np.random.Generator, np.ndarray]:
    """The generator of the sample at (pass, repeat, index) and its mask keys, which come first.

    So an unreadable file keeps its masks, and crops do not depend on how the pixels are stored.
    """
    random = np.random.default_rng((seed, *place))
    return random, random.integers(1 << 63, size=masks)


class ImageLoader:
    """Endless iterator of training batches over an image folder or a packed one.

    A pass is one random order of the images cut into global batches of ``batch_size * world_size``; the incomplete
    last one is left out. Rank r takes rows ``[r * batch_size, (r + 1) * batch_size)`` of each global batch. A folder
    with fewer images than a global batch is repeated within the batch, each time with another crop and mask.

    With ``masks_per_image = K`` each view (crop and flip) of an image stands K times in a row in its batch, under K
    different masks. An epoch remains as many views as there are images, so schedules and costs of training stay what
    they are; but a pass then lasts K epochs, and only ``1 / K`` of the images are decoded per epoch.

    Args:
        folder: `ImageFolder`, `TarImages`, `PackedImages`, or what `open_images` takes.
        size: (height, width) of the images.
        batch_size: views per batch and process, a multiple of `masks_per_image`.
        channels: 3 (RGB) or 1 (grey).
        seed: fixes everything.
        workers: decoding processes; 0 decodes in this process.
        rank, world_size: this process among those that share a global batch.
        device: where images and keys are wanted; batches for a GPU are copied two ahead (see `on_device`).
        masks_per_image: masks K under which each decoded view is seen.
        transform: makes the training view instead of the random resized crop and flip, ``transform(image) -> array``:
            from the whole picture, upright, a `PIL.Image` of mode RGB (L for one channel), to uint8
            [height, width, channels], anything that `numpy.asarray` takes for one. It may draw from the global
            generators of python, numpy and torch (CPU), as timm's and torchvision's do: they are seeded per sample
            around each call, and left as they were. With workers it must be picklable where processes are spawned.
            What it raises ends the iteration with the picture's name: it is not the file that is broken.
        augmentation: keyword arguments of `random_resized_crop` (scale, ratio, flip).

    Attributes:
        batches_per_epoch: global batches in an epoch; batches_per_pass: until every image was decoded once.
        skipped: unreadable files met and replaced so far by this process.
        wait_seconds: time that this process has waited for batches.
    """

    def __init__(
        self,
        folder: ImageSource | str | os.PathLike,
        size: tuple[int, int],
        batch_size: int,
        *,
        channels: int = 3,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        masks_per_image: int = 1,
        transform: Callable[[Image.Image], np.ndarray] | None = None,
        **augmentation,
    ) -> None:
        folder = open_images(folder) if isinstance(folder, (str, os.PathLike)) else folder
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}, expected 3 (RGB) or 1 (grey)")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if masks_per_image < 1 or batch_size % masks_per_image:
            expected = f"at least 1 and a divisor of batch_size {batch_size}"
            raise ValueError(f"masks_per_image: got {masks_per_image}, expected {expected}")
        if transform is not None and augmentation:
            named = ", ".join(augmentation)
            raise ValueError(f"transform: got one together with {named}, expected it to crop and flip by itself")
        self.folder, self.masks_per_image = folder, masks_per_image
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.device = torch.device(device)
        self.global_batch = batch_size * world_size
        self.batches_per_epoch = max(1, len(folder) // self.global_batch)
        self.batches_per_pass = max(1, len(folder) // (self.global_batch // masks_per_image))
        drawn = functools.partial(draw, seed, masks_per_image)
        if isinstance(folder, PackedImages) and transform is None:
            self._views = PackedViews(folder, size, channels, drawn, augmentation, self.device)
        else:
            self._views = FileViews(folder, size, channels, drawn, augmentation, transform)
        self._options = dict(
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=begin_worker,
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
        if len(self.folder) < self.global_batch // self.masks_per_image and self.rank == 0:
            logger.warning(
                "%s has %d images, fewer than one batch of %d: they are repeated within the batch, each time with "
                "another crop and mask (a smaller batch size avoids this)",
                self.folder.root, len(self.folder), self.global_batch // self.masks_per_image,
            )  # fmt: skip
        with contextlib.closing(on_device(self._labelled(), self.device)) as batches:
            for batch in batches:
                self._position += 1
                self._report(batch)
                yield self._repeated(batch)

    def _repeated(self, batch: Batch) -> Batch:
        """Each view once per mask; on the device, so that a view travels once."""
        masks = self.masks_per_image
        if masks == 1:
            return batch
        images, indices, labels = (t.repeat_interleave(masks, 0) for t in (batch.images, batch.indices, batch.labels))
        return batch._replace(images=images, indices=indices, labels=labels)

    def _labelled(self) -> Iterator[Batch]:
        """Batches on the CPU, with labels."""
        labels = torch.tensor(self.folder.labels)
        with contextlib.closing(self._loaded()) as batches:
            for batch in batches:
                yield batch._replace(labels=labels[batch.indices])

    def _loaded(self) -> Iterator[Batch]:
        """Batches on the CPU; the time that they keep this process waiting counts."""
        batches = iter(DataLoader(self._views, sampler=self._keys(self._position), **self._options))
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - start
            yield batch

    def _keys(self, position: int) -> Iterator[list[tuple[int, int, int]]]:
        """(pass, repeat, index) of the images of this rank's batches, from a position on, without end."""
        count, mine = len(self.folder), self.batch_size // self.masks_per_image
        for number in itertools.count(position // self.batches_per_pass):
            order = np.random.default_rng((self.seed, number)).permutation(count)
            start = position % self.batches_per_pass if number == position // self.batches_per_pass else 0
            for batch in range(start, self.batches_per_pass):
                first = (batch * self.world_size + self.rank) * mine
                places = range(first, first + mine)
                yield [(number, place // count, int(order[place % count])) for place in places]

    def _report(self, batch: Batch) -> None:
        self.skipped += len(batch.failures)
        for path, reason in batch.failures:
            if path not in self._reported:
                self._reported.add(path)
                logger.warning("skipped unreadable image %s: %s (another image takes its place)", path, reason)
        if batch.indices.numpy().min() < 0:
            raise UnreadableError(
                f"{self.folder.root}: {ATTEMPTS} files in a row cannot be read, the last one "
                f"{batch.failures[-1][0]} ({batch.failures[-1][1]}); is this a folder of images?"
            )

    def state_dict(self) -> dict:
        """Position and what it depends on; plain numbers and strings."""
        return dict(
            position=self._position, skipped=self.skipped, seed=self.seed, global_batch=self.global_batch,
            masks_per_image=self.masks_per_image, images=len(self.folder), fingerprint=self.folder.fingerprint(),
        )  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Continues after the last batch that was consumed when `state` was taken.

        Raises:
            ValueError: other images, another seed or another global batch: the batches would not be the same.
        """
        here, state = self.state_dict(), {"masks_per_image": 1, **state}
        for name in ("seed", "global_batch", "masks_per_image", "images", "fingerprint"):
            if state[name] != here[name]:
                what = "names of the images" if name == "fingerprint" else name.replace("_", " ")
                raise ValueError(
                    f"cannot resume on {self.folder.root}: {what}: got {here[name]}, expected {state[name]} as in the "
                    f"checkpoint; restore it, or start a new run"
                )
        self._position, self.skipped = state["position"], state["skipped"]


def as_it_is(batch: Batch) -> Batch:
    return batch


def begin_worker(worker: int) -> None:
    """What every worker process begins with: who ends it, and when."""
    # Ctrl-C and a scheduler's signals reach all processes: the main one decides, workers go on serving its last step.
    # They end with it: by its word, or when they see that it is gone. Should it wait for them without a word, as an
    # interpreter does that exits with an iterator alive, SIGTERM ends them after all, late.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    # torch's own watch compares parents, and misses a main process that was killed before a worker first looked.
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
