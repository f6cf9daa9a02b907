"""The same batches decoded by NVIDIA DALI: on a GPU in its JPEG hardware, region by region; on a CPU by libjpeg-turbo.

Order, boxes, flips, keys, resuming and ranks are those of `ImageLoader`; only who decodes and resizes differs, and with
it the rounding of pixels. DALI gets upright RGB or grey JPEG files that are whole. Everything else (other formats, EXIF
rotations, CMYK, cut files) takes Pillow's way in the worker that reads it, so it looks the same under every loader.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .batch import Batch
from .loader import ImageLoader
from .reading import opened, orientation_of
from .source import ImageFiles
from .transforms import random_box

logger = logging.getLogger("fastkd")
DEPTH = 2  # batches that DALI prepares ahead


class DaliLoader(ImageLoader):
    """`ImageLoader` whose JPEG files are decoded, cropped, resized and flipped by DALI.

    On a GPU images come out on the device. `workers` is the number of DALI's threads; a quarter as many processes read
    the files and choose the boxes.

    Raises:
        ImportError: DALI is not installed.
        ValueError: the images are packed: there is nothing to decode.
    """

    def __init__(self, folder, size, batch_size, *, workers: int = 0, **options) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ImportError(f"DALI does not import ({error}); pip install 'fastkd[dali]' brings it") from error
        super().__init__(folder, size, batch_size, workers=(workers + 3) // 4, **options)
        if not isinstance(self.folder, ImageFiles):
            raise ValueError(f"{self.folder.root} holds packed images, expected image files for DALI")
        if self._views.transform is not None:
            raise ValueError("transform: got one for DALI, which crops and flips by itself; expected --loader pil")
        self._threads = max(1, workers)
        self._files = _Files(self._views)

    def _loaded(self) -> Iterator[Batch]:
        with contextlib.closing(self._read()) as read:  # DALI may keep `source`; the workers end here all the same
            yield from self._decoded(read)

    def _read(self) -> Iterator[Files]:
        options = self._options | dict(pin_memory=False)
        yield from DataLoader(self._files, sampler=self._keys(self._position), **options)

    def _decoded(self, read: Iterator[Files]) -> Iterator[Batch]:
        waiting: deque[Files] = deque()

        def source() -> tuple[list[np.ndarray], ...]:
            files = next(read)
            waiting.append(files)
            pieces = np.split(files.data.numpy(), files.ends[:-1])
            return pieces, list(files.boxes[:, :2]), list(files.boxes[:, 2:]), list(files.flips)

        pipeline = self._pipeline(source)
        while True:
            start = time.perf_counter()
            try:
                (views,) = pipeline.run()
            except RuntimeError as error:
                if not waiting:
                    raise
                logger.warning("DALI cannot decode a batch (%s); Pillow takes it and the next", str(error)[:300])
                for files in waiting:  # they are lost together with the pipeline
                    yield self._views[files.places]
                waiting.clear()
                pipeline = self._pipeline(source)
                continue
            files = waiting.popleft()
            images = self._to_torch(views, len(files.places))
            for row, image in files.ready:
                images[row] = torch.from_numpy(image)
            self.wait_seconds += time.perf_counter() - start
            yield Batch(images, files.keys, files.indices, files.failures)

    def _pipeline(self, source):
        from nvidia.dali import fn, pipeline_def, types

        gpu = self.device.type == "cuda"
        kind = types.RGB if self._views.channels == 3 else types.GRAY
        index = self.device.index
        if gpu and index is None:
            index = torch.cuda.current_device()

        @pipeline_def(
            batch_size=self.batch_size // self.masks_per_image, num_threads=self._threads, device_id=index,
            prefetch_queue_depth=DEPTH,
        )  # fmt: skip
        def views():
            files, corner, extent, flip = fn.external_source(source=source, num_outputs=4)
            images = fn.decoders.image_slice(
                files, start=corner, shape=extent, axes=(0, 1), device="mixed" if gpu else "cpu", output_type=kind,
                jpeg_fancy_upsampling=True,  # as libjpeg does it
            )  # fmt: skip
            images = fn.resize(images, size=self._views.size, interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.flip(images, horizontal=flip, vertical=0)

        built = views()
        built.build()
        return built

    def _to_torch(self, views, count: int) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        shape = count, *self._views.size, self._views.channels
        if self.device.type != "cuda":
            images = torch.empty(shape, dtype=torch.uint8)
            feed_ndarray(views.as_tensor(), images)
            return images
        # A stream of its own, which the copy may wait for without waiting for training.
        self._stream = getattr(self, "_stream", None) or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            images = torch.empty(shape, dtype=torch.uint8, device=self.device)
            feed_ndarray(views.as_tensor(), images, cuda_stream=self._stream)
        return images


class Files(NamedTuple):
    """The files of a batch before they are decoded.

    Attributes:
        data: [N] uint8, the files one behind the other; ends: [B], where each ends.
        boxes: [B, 4] int32, (top, left, height, width); flips: [B, 1] int32.
        ready: ((row, image), ...) of those that are decoded already.
        places: (pass, repeat, index) of each; keys, indices, failures: as in `Batch`.
    """

    data: Tensor
    ends: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    ready: tuple
    places: list
    keys: Tensor
    indices: Tensor
    failures: tuple


class _Files(torch.utils.data.Dataset):
    """Reads the files of one batch and chooses their boxes; lives in the workers."""

    def __init__(self, views) -> None:
        self.views = views
        self.flip = views.augmentation.get("flip", 0.5)
        self.box = {name: value for name, value in views.augmentation.items() if name != "flip"}
        stand_in = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stand_in, "JPEG")
        self.stand_in = np.frombuffer(stand_in.getvalue(), np.uint8)

    def __getitem__(self, places: list[tuple[int, int, int]]) -> Files:
        data, boxes, flips, ready, keys, indices, failures = [], [], [], [], [], [], []
        for row, place in enumerate(places):
            random, drawn = self.views.draw(place)
            keys.append(drawn)
            found = self._plain(place[-1])
            if found is None:
                image, index = self.views.view(place[-1], random, failures)
                ready.append((row, np.array(np.broadcast_to(image, (*self.views.size, self.views.channels)))))
                found, box, flip = self.stand_in, (0, 0, 8, 8), False
            else:
                index, (found, full) = place[-1], found
                box, flip = random_box(random, full, **self.box), random.random() < self.flip
            data.append(found)
            boxes.append(box)
            flips.append([flip])
            indices.append(index)
        return Files(
            torch.from_numpy(np.concatenate(data)), np.cumsum([len(piece) for piece in data]),
            np.array(boxes, np.int32), np.array(flips, np.int32), tuple(ready), places,
            torch.from_numpy(np.concatenate(keys)), torch.tensor(indices), tuple(failures),
        )  # fmt: skip

    def _plain(self, index: int) -> tuple[np.ndarray, tuple[int, int]] | None:
        """A file for DALI and its (height, width); None where Pillow must see to it."""
        try:
            data = self.views.folder.read(index)
            with opened(data) as image:
                plain = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation_of(image) == 1
                if plain and data.endswith(b"\xff\xd9"):
                    return np.frombuffer(data, np.uint8), image.size[::-1]
        except Exception:  # Pillow's decoders raise many types on broken files; its own way will say so
            return None
        return None
