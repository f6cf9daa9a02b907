"""Batches by DALI beside those by Pillow: the same views, up to the rounding of decoder and resize."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import ImageLoader, pack

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from fastkd.data.dali import DaliLoader  # noqa: E402

SIZE = (24, 20)
MEAN, MOST = 1.0, 6  # grey levels that a view may differ by: on average, and anywhere


@pytest.fixture
def pictures(tmp_path):
    """Mostly JPEG files, and one of each kind that Pillow has to decode."""
    random = np.random.default_rng(3)
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(12):
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = coarse.resize((60 + index, 40), Image.Resampling.BICUBIC)
        name, options = f"a/{index:02}.jpg", dict(quality=95)
        if index == 3:
            image = image.convert("L")
        if index == 4:
            name = "a/04.png"
        if index == 5:
            image = image.convert("CMYK")
        if index == 6:
            options["exif"] = exif
        image.save(folder / name, **options if name.endswith("jpg") else {})
    return folder


def take(loader: ImageLoader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def assert_close(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.indices, b.indices)
        difference = (a.images.int() - b.images.int()).abs().flatten(1).float()
        assert difference.mean(1).max() <= MEAN and difference.max() <= MOST


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_those_of_pillow(pictures, workers, channels):
    options = dict(size=SIZE, batch_size=4, seed=5, channels=channels, scale=(0.1, 0.9))
    assert_close(take(DaliLoader(pictures, workers=workers, **options), 6), take(ImageLoader(pictures, **options), 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_views_decoded_on_a_gpu(pictures):
    options = dict(size=SIZE, batch_size=4, seed=5)
    ours = take(DaliLoader(pictures, workers=2, device="cuda", **options), 6)
    assert all(batch.images.is_cuda for batch in ours)
    assert_close([batch.to("cpu") for batch in ours], take(ImageLoader(pictures, **options), 6))


def test_resumed_ranks_and_masks(pictures):
    options = dict(size=SIZE, masks_per_image=2)
    whole = take(ImageLoader(pictures, batch_size=8, **options), 6)
    for rank in range(2):
        shared = dict(batch_size=4, rank=rank, world_size=2, **options)
        first = DaliLoader(pictures, **shared)
        half = [
            b._replace(**{k: getattr(b, k)[4 * rank : 4 * rank + 4] for k in ("images", "keys", "indices")})
            for b in whole
        ]
        assert_close(take(first, 2), half[:2])
        second = DaliLoader(pictures, **shared)
        second.load_state_dict(first.state_dict())
        assert_close(take(second, 4), half[2:])


def test_unreadable_and_cut_files_are_replaced_as_elsewhere(pictures):
    (pictures / "a/90.jpg").write_bytes(b"this is no picture")
    whole = (pictures / "a/00.jpg").read_bytes()
    (pictures / "a/91.jpg").write_bytes(whole[: len(whole) // 2])
    ours, theirs = (kind(pictures, SIZE, 7) for kind in (DaliLoader, ImageLoader))
    assert_close(take(ours, 4), take(theirs, 4))
    assert ours.skipped == theirs.skipped > 0


def test_a_file_that_dali_refuses_goes_to_pillow(pictures, caplog):
    """Right at both ends, garbage between: Pillow finds grey in it, or a reason."""
    whole = (pictures / "a/00.jpg").read_bytes()
    middle = whole.rindex(b"\xff\xda")
    (pictures / "a/92.jpg").write_bytes(whole[:middle] + b"\xff\xc4\x00\x03\x99" + b"\xff\xd9")
    ours, theirs = (kind(pictures, SIZE, 6) for kind in (DaliLoader, ImageLoader))
    assert_close(take(ours, 4), take(theirs, 4))
    assert ours.skipped == theirs.skipped > 0
    assert "Pillow takes it" in caplog.text


def test_packed_images_are_refused(pictures, tmp_path):
    pack(pictures, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds packed images"):
        DaliLoader(tmp_path / "packed", SIZE, 2)
