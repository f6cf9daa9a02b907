"""From encoded pictures to batches: decoded and augmented in the workers, unreadable ones replaced."""

from __future__ import annotations

import contextlib
import random as python_random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from .batch import Batch
from .reading import printable
from .source import ImageSource
from .transforms import random_resized_crop

ATTEMPTS = 20  # files in a row that may be unreadable


class FileViews(torch.utils.data.Dataset):
    """Decodes the images of one batch; lives in the workers."""

    def __init__(self, folder: ImageSource, size, channels, draw, augmentation, transform) -> None:
        self.folder, self.size, self.channels, self.draw = folder, tuple(size), channels, draw
        self.augmentation, self.transform = augmentation, transform

    def __getitem__(self, places: list[tuple[int, int, int]]) -> Batch:
        images = torch.empty((len(places), *self.size, self.channels), dtype=torch.uint8)
        pixels, indices = images.numpy(), torch.full((len(places),), -1)
        keys, failures = [], []
        for row, place in enumerate(places):
            random, drawn = self.draw(place)
            keys.append(drawn)
            pixels[row], index = self.view(place[-1], random, failures)
            indices[row] = index
            if index < 0:
                break  # the batch will be refused: no need to try the other files
        return Batch(images, torch.from_numpy(np.concatenate(keys)), indices, tuple(failures))

    def view(self, index: int, random: np.random.Generator, failures: list) -> tuple[np.ndarray | int, int]:
        """The augmented image and its index, which is another one where files are unreadable; (0, -1) in the end."""
        for _ in range(ATTEMPTS):
            try:
                if self.transform is None:
                    data, options = self.folder.read(index), self.augmentation
                    return random_resized_crop(data, self.size, random, channels=self.channels, **options), index
                image = self.folder.picture(index, self.channels)
            except Exception as error:  # Pillow's decoders raise many types on broken files
                failures.append((printable(self.folder.path(index)), f"{type(error).__name__}: {error}"))
                index = int(random.integers(len(self.folder)))
            else:
                return self._transformed(image, random, self.folder.path(index)), index
        return 0, -1

    def _transformed(self, image: Image.Image, random: np.random.Generator, path: str) -> np.ndarray:
        wanted = (*self.size, self.channels)
        try:
            with seeded(int(random.integers(1 << 32))):
                view = np.asarray(self.transform(image))
        except Exception as error:
            raise RuntimeError(f"transform: {type(error).__name__} on {path}: {error}") from error
        if view.dtype != np.uint8 or view.shape[:2] != self.size or view.size != np.prod(wanted):
            raise ValueError(f"transform: got {view.dtype} {view.shape} from {path}, expected uint8 {wanted}")
        return view.reshape(wanted)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of python, numpy and torch (CPU alone) start from a seed; afterwards they are as before."""
    before = python_random.getstate(), np.random.get_state(), torch.get_rng_state()
    python_random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPU, which training draws from
    try:
        yield
    finally:
        python_random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
