"""From packed images to batches: only the rows and columns of each crop are copied, then resized all at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.ops.images.resized_crop import resized_crop

from .batch import Batch
from .packed import PackedImages
from .transforms import random_box


class Crops(NamedTuple):
    """A batch before its crops are resized: they lie one behind the other in one buffer, a single copy to a GPU.

    Attributes:
        pixels: [N] uint8, the crops.
        offsets: [B] int64, where each begins.
        boxes: [B, 4] int64, (0, 0, height, width): the whole crop.
        flip: [B] bool.
        size: (height, width) that is wanted; max_box: the largest (height, width) in the batch; channels: 3 or 1.
        keys, indices, failures: as in `Batch`.
    """

    pixels: Tensor
    offsets: Tensor
    boxes: Tensor
    flip: Tensor
    size: tuple[int, int]
    max_box: tuple[int, int]
    channels: int
    keys: Tensor
    indices: Tensor
    failures: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The `Batch`: resized and flipped on the device, on its current stream; the copy does not block."""
        tensors = self.pixels, self.offsets, self.boxes, self.flip, self.keys
        pixels, offsets, boxes, flip, keys = (tensor.to(device, non_blocking=True) for tensor in tensors)
        images = resized_crop(
            pixels, offsets, boxes[:, 2:], boxes, flip, tuple(self.size), channels=self.channels,
            max_box=tuple(self.max_box),
        )  # fmt: skip
        return Batch(images, keys, self.indices, self.failures)


class PackedViews(torch.utils.data.Dataset):
    """Gathers the crops of one batch and, for a batch on the CPU, resizes them; lives in the workers.

    The same seed gives the same boxes, flips and keys as for the folder that was packed, drawn in the same order; on
    pictures that packing left as they were, the pixels are the same too.
    """

    def __init__(self, folder: PackedImages, size, channels, draw, augmentation, device: torch.device) -> None:
        if folder.channels != channels:
            raise ValueError(
                f"channels: got {channels}, expected {folder.channels} as packed in {folder.root}; pack again with "
                f"--channels {channels}"
            )
        self.folder, self.size, self.channels, self.draw = folder, tuple(size), channels, draw
        self.flip = augmentation.get("flip", 0.5)
        self.box = {name: value for name, value in augmentation.items() if name != "flip"}
        self.on_gpu = device.type == "cuda"

    def __getitem__(self, places: list[tuple[int, int, int]]):
        keys, crops, flips = [], [], []
        for place in places:
            random, drawn = self.draw(place)
            image = self.folder.image(place[-1])
            top, left, tall, wide = random_box(random, image.shape[:2], **self.box)
            crops.append(image[top : top + tall, left : left + wide])
            flips.append(random.random() < self.flip)
            keys.append(drawn)
        offsets = np.cumsum([0, *(crop.size for crop in crops)])
        pixels = torch.empty(int(offsets[-1]), dtype=torch.uint8)
        flat = pixels.numpy()
        for start, crop in zip(offsets, crops):
            flat[start : start + crop.size].reshape(crop.shape)[...] = crop
        boxes = torch.tensor([(0, 0, *crop.shape[:2]) for crop in crops])
        found = Crops(
            pixels, torch.from_numpy(offsets[:-1].copy()), boxes, torch.tensor(flips), self.size,
            tuple(boxes[:, 2:].amax(0).tolist()), self.channels, torch.from_numpy(np.concatenate(keys)),
            torch.tensor([place[-1] for place in places]),
        )  # fmt: skip
        return found if self.on_gpu else found.to("cpu")
