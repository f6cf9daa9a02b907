"""What every loader hands out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
