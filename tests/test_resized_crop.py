"""resized_crop beside Pillow itself: the same bits, on every backend."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from conftest import backends_of, device_of
from PIL import Image

from fastkd.ops import SPECS, backend, resized_crop

each_backend_of_it = pytest.mark.parametrize("name", backends_of(SPECS["resized_crop"]))
KNOWS_ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def by_pillow(image: np.ndarray, box, size) -> np.ndarray:
    """The crop by Pillow, one axis at a time: older versions always take columns first."""
    top, left, tall, wide = box
    height, width = size
    crop = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image)
    crop = crop.crop((left, top, left + wide, top + tall))
    steps = [(width, tall), (width, height)]
    if tall > height and tall - height > 2 * (wide - width):
        steps[0] = (wide, height)
    whole = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
    for step in steps:
        crop = crop.resize(step, Image.Resampling.BICUBIC)
    if KNOWS_ROWS_FIRST or steps[0] == (width, tall):
        np.testing.assert_array_equal(np.asarray(crop), whole)
    return np.asarray(crop).reshape(height, width, -1)


def random_batch(random: np.random.Generator, count: int, most: int, channels: int):
    """(images, boxes, flip): hard edges, so that sums leave 0..255 before and after the first pass."""
    images, boxes = [], []
    for _ in range(count):
        height, width = random.integers(1, most + 1, 2)
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        images.append((pixels > 127).astype(np.uint8) * 255 if random.random() < 0.5 else pixels)
        tall, wide = random.integers(1, height + 1), random.integers(1, width + 1)
        boxes.append((random.integers(0, height - tall + 1), random.integers(0, width - wide + 1), tall, wide))
    return images, np.array(boxes), random.random(count) < 0.5


def arguments(images, boxes, flip, device="cpu") -> dict:
    offsets = np.cumsum([0, *(image.size for image in images)])[:-1]
    found = dict(
        pixels=np.concatenate([image.ravel() for image in images]), offsets=offsets,
        sizes=np.array([image.shape[:2] for image in images]), boxes=boxes, flip=np.array(flip),
    )  # fmt: skip
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)).to(device) for key, value in found.items()}
    return dict(**tensors, channels=images[0].shape[2], max_box=tuple(int(n) for n in np.array(boxes)[:, 2:].max(0)))


@each_backend_of_it
@pytest.mark.parametrize("channels", [1, 3])
def test_the_bits_are_those_of_pillow(name, channels):
    random = np.random.default_rng(channels)
    for _ in range(4 if name == "triton" and device_of(name) == "cpu" else 25):
        images, boxes, flip = random_batch(random, 4, 120, channels)
        size = tuple(int(side) for side in random.integers(1, 60, 2))
        with backend(name):
            ours = resized_crop(**arguments(images, boxes, flip, device_of(name)), size=size).cpu().numpy()
        for image, box, mirrored, got in zip(images, boxes, flip, ours):
            want = by_pillow(image, box, size)
            np.testing.assert_array_equal(got, want[:, ::-1] if mirrored else want, err_msg=f"{box} to {size}")


@each_backend_of_it
@pytest.mark.parametrize("tall, wide", [(43, 19), (44, 21), (45, 22), (44, 22)], ids=str)
def test_order_of_the_axes(name, tall, wide):
    """40 x 20 is wanted: rows go first where the height shrinks by more than twice as many pixels as the width."""
    image = (np.random.default_rng(0).random((tall, wide, 1)) > 0.5).astype(np.uint8) * 255
    box = (0, 0, tall, wide)
    with backend(name):
        ours = resized_crop(**arguments([image], [box], [False], device_of(name)), size=(40, 20)).cpu().numpy()
    np.testing.assert_array_equal(ours[0], by_pillow(image, box, (40, 20)))


def test_every_length_has_the_weights_of_pillow():
    """Windows cut at the border, whole factors, one pixel, much larger and much smaller."""
    ramp = np.random.default_rng(1).integers(0, 256, (1, 700), dtype=np.uint8)
    for length in range(1, 700, 3):
        image = ramp[:, :length, None]
        for width in (1, 7, 64, 224):
            ours = resized_crop(**arguments([image], [(0, 0, 1, length)], [False]), size=(1, width)).numpy()
            np.testing.assert_array_equal(ours[0], by_pillow(image, (0, 0, 1, length), (1, width)))


GOOD = dict(arguments([np.zeros((4, 5, 3), np.uint8)] * 2, [(0, 0, 4, 5)] * 2, [False] * 2), size=3)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(pixels=torch.zeros(120)), "pixels: got float32, expected uint8"),
        (dict(boxes=torch.tensor([[0, 0, 4, 5], [1, 0, 4, 5]])), r"boxes: got \(1, 0, 4, 5\) in image 1 of size"),
        (dict(boxes=torch.tensor([[0, -1, 4, 5], [0, 0, 4, 5]])), r"boxes: got \(0, -1, 4, 5\) in image 0"),
        (dict(boxes=torch.tensor([[0, 0, 0, 5], [0, 0, 4, 5]])), "boxes: .* expected boxes inside of their images"),
        (dict(max_box=(3, 5)), r"at most \(3, 5\) pixels"),
        (dict(offsets=torch.tensor([0, 61])), "offsets: got images from byte 0 to 121, expected .* the 120 bytes"),
        (dict(offsets=torch.tensor([-1, 60])), "offsets: got images from byte -1"),
        (dict(sizes=torch.tensor([[4, 5]])), r"sizes: got shape \(1, 2\), expected \(2, 2\)"),
        (dict(flip=torch.zeros(2)), "flip: got float32, expected bool"),
        (dict(channels=4), "channels: got 4, expected 3"),
        (dict(size=(3, 0)), r"size: got \(3, 0\)"),
    ],
)
def test_errors_name_the_argument(changes, said):
    with pytest.raises((ValueError, TypeError), match=f"resized_crop: .*{said}|resized_crop: {said}"):
        resized_crop(**GOOD | changes)


def test_largest_box_is_found_on_the_cpu():
    random = np.random.default_rng(3)
    given = arguments(*random_batch(random, 3, 40, 3))
    assert torch.equal(resized_crop(**given, size=9), resized_crop(**given | dict(max_box=None), size=9))
