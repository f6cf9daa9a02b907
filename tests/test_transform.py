"""A training view of one's own: `ImageLoader(transform=...)` draws from global generators, yet repeats itself."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_pictures

from fastkd.data import ImageLoader, pack

SIZE = (16, 20)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def take(loader: ImageLoader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def noisy(image: Image.Image) -> np.ndarray:
    """Draws from all three generators."""
    left, top, shift = random.randrange(4), np.random.randint(4), int(torch.randint(100, ()))
    view = image.crop((left, top, left + SIZE[1], top + SIZE[0]))
    return np.asarray(view) // 2 + np.uint8(shift)


def test_views_are_the_same_whatever_the_workers_and_after_resuming(pictures):
    options = dict(size=SIZE, batch_size=4, seed=5, transform=noisy)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = take(ImageLoader(pictures, **options), 7)
    first = ImageLoader(pictures, workers=2, **options)
    resumed = take(first, 4)
    second = ImageLoader(pictures, **options)
    second.load_state_dict(first.state_dict())
    resumed += take(second, 3)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.keys, b.keys)
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    views = torch.cat([batch.images for batch in whole[:6]])[torch.cat([b.indices for b in whole[:6]]).argsort()]
    assert all(not torch.equal(*pair) for pair in views.unflatten(0, (12, 2)))  # another draw in each epoch


def test_order_and_keys_are_those_without_it_and_packed_pictures_take_it_too(pictures, tmp_path):
    pack(pictures, tmp_path / "packed")
    plain = take(ImageLoader(pictures, SIZE, 4), 3)
    ours, packed = (take(ImageLoader(p, SIZE, 4, transform=noisy), 3) for p in (pictures, tmp_path / "packed"))
    for a, b, c in zip(plain, ours, packed):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.indices, b.indices)
        assert torch.equal(b.images, c.images) and torch.equal(b.keys, c.keys)


def test_a_broken_file_is_replaced_and_a_broken_transform_is_not_hidden(pictures):
    (pictures / "cat/broken.jpg").write_bytes(b"no")
    loader = ImageLoader(pictures, SIZE, 13, channels=1, transform=lambda image: image.resize(SIZE[::-1]))
    (batch,) = take(loader, 1)
    assert batch.images.shape == (13, *SIZE, 1) and loader.skipped == 1
    with pytest.raises(RuntimeError, match=r"transform: ZeroDivisionError on .*\.png"):
        take(ImageLoader(pictures, SIZE, 4, transform=lambda image: 1 // 0), 1)
    with pytest.raises(ValueError, match=r"transform: got float64 \(3,\) from .*, expected uint8 \(16, 20, 3\)"):
        take(ImageLoader(pictures, SIZE, 4, transform=lambda image: np.zeros(3)), 1)
    with pytest.raises(ValueError, match="transform: got one together with scale, flip"):
        ImageLoader(pictures, SIZE, 4, transform=noisy, scale=(0.5, 1), flip=0)


def test_timm_augmentation_is_repeatable(pictures):
    data = pytest.importorskip("timm.data")
    chain = data.create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", separate=True)
    transform = lambda image: np.asarray(chain[1](chain[0](image)))  # noqa: E731
    a, b = (take(ImageLoader(pictures, (16, 16), 4, seed=2, transform=transform), 6) for _ in range(2))
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b))
    assert not torch.equal(a[0].images, a[3].images)
