"""Centre crops of a folder, all of them and in order, and what a frozen encoder makes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger("fastkd")


class CenterCrops:
    """Batches (images uint8 [B, H, W, C], indices [B] int64) of a folder's readable images, in order.

    Args:
        folder: `ImageFolder` or `PackedImages`.
        size: (height, width).
        batch_size: images per batch; fewer where files cannot be read.
        channels: 3 (RGB) or 1 (grey).
        workers: decoding processes; 0 decodes in this process.
        pin: page-lock the batches, for a GPU.
        indices: which images; default all.

    Attributes:
        failures: path -> reason of the files that could not be read, after a pass.
    """

    def __init__(
        self, folder, size: tuple[int, int], batch_size: int, *, channels: int = 3, workers: int = 0,
        pin: bool = False, indices: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.indices = folder, range(len(folder)) if indices is None else indices
        self.failures: dict[str, str] = {}
        starts = range(0, len(self.indices), batch_size)
        self._loader = DataLoader(
            _Crops(folder, tuple(size), channels), sampler=[self.indices[s : s + batch_size] for s in starts],
            batch_size=None, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, generator=torch.Generator(),
        )  # fmt: skip

    def __len__(self) -> int:
        """Images, unreadable ones included."""
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices, failures in self._loader:
            for path, reason in failures:
                if path not in self.failures:
                    logger.warning("left out unreadable image %s: %s", path, reason)
                self.failures[path] = reason
            if len(images):
                yield images, indices


class _Crops(Dataset):
    """Lives in the workers."""

    def __init__(self, folder, size: tuple[int, int], channels: int) -> None:
        self.folder, self.size, self.channels = folder, size, channels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        crops, read, failures = [np.empty((0, *self.size, self.channels), np.uint8)], [], []
        for index in indices:
            try:
                crops.append(self.folder.center_crop(index, self.size, self.channels)[None])
                read.append(index)
            except Exception as error:  # Pillow's decoders raise many types on broken files
                failures.append((self.folder.path(index), f"{type(error).__name__}: {error}"))
        return torch.from_numpy(np.concatenate(crops)), torch.tensor(read, dtype=torch.int64), failures


def _as_it_is(batch):
    return batch


class Extracted(NamedTuple):
    """What an encoder made of a folder, on the CPU.

    Attributes:
        features: [N, D]; float16 where mixed precision made them, else float32.
        labels: [N] int64, of the readable images.
        ranked: [N, 5] int64, best classes of the encoder's own head; None without one.
        unreadable: files left out.
    """

    features: Tensor
    labels: Tensor
    ranked: Tensor | None
    unreadable: int


@torch.no_grad()
def extract(
    encoder: nn.Module,
    crops: CenterCrops,
    labels: Tensor,
    device: torch.device,
    amp: torch.dtype | None,
    rank=None,
    seen=None,
) -> Extracted:
    """Features of every readable image, computed once.

    Args:
        encoder: images -> (features, logits or None); in eval mode, on the device.
        labels: [N] int64 of all images of the folder.
        amp: dtype of autocast; None computes in float32.
        rank: what is kept of the logits, such as `fastkd.evaluation.scores.ranking`; None keeps nothing.
        seen: called with the number of images after each batch, for a progress bar.

    Raises:
        ValueError: no image can be read, or features are not finite.
    """
    kept, ranked, read = None, [], []
    filled = 0
    for images, indices in _ahead(crops, device):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features, logits = encoder(images)
        if kept is None:  # all rows at once: a list of parts would need twice the memory when it is joined
            kept = torch.empty(len(crops), features.shape[1], dtype=torch.float16 if amp else torch.float32)
        kept[filled : filled + len(features)] = features
        filled += len(features)
        read.append(indices)
        if rank is not None and logits is not None:
            ranked.append(rank(logits))
        if seen is not None:
            seen(len(images))
    if kept is None:
        raise ValueError(f"{crops.folder.root}: no image can be read")
    kept = kept[:filled]
    if not all(part.isfinite().all() for part in kept.split(65536)):
        raise ValueError("features are not finite: the weights are damaged, or too large for --amp; try --amp off")
    return Extracted(kept, labels[torch.cat(read)], torch.cat(ranked) if ranked else None, len(crops) - filled)


def _ahead(crops: Iterable, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with images on the device."""
    for images, indices in crops:
        yield images.to(device, non_blocking=True), indices
