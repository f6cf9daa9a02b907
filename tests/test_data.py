"""Image folders, decoding, crops and the loader's promise: the same batches whatever the workers, ranks or restarts."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from process import run_python
from tiny_run import write_pictures

from fastkd.data import (
    ImageFolder,
    ImageLoader,
    UnreadableError,
    center_crop,
    load_images,
    loader,
    open_image,
    random_resized_crop,
)
from fastkd.data.prefetch import on_device
from fastkd.data.transforms import random_box

SIZE = (16, 20)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def take(loader: ImageLoader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.images, b.images) and torch.equal(a.keys, b.keys) and torch.equal(a.indices, b.indices)


def test_folder_lists_images_at_any_depth_with_first_level_classes(tmp_path):
    for name in ("b/x.JPG", "a/deep/er/y.png", "a/z.webp", "root.ppm", ".hidden/no.png", "a/.no.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["a/deep/er/y.png", "a/z.webp", "b/x.JPG", "root.ppm"]
    assert folder.classes == ["a", "b"]
    assert folder.labels == [0, 0, 1, -1]
    assert folder.path(3) == f"{tmp_path}/root.ppm"


def test_folder_errors_say_what_to_do(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got a file, expected a folder"):
        ImageFolder(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="got no image, expected .* jpg"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(pictures, workers):
    options = dict(size=SIZE, batch_size=4, seed=5)
    assert_same(take(ImageLoader(pictures, workers=workers, **options), 8), take(ImageLoader(pictures, **options), 8))


@pytest.mark.parametrize("done", [2, 3, 7])  # inside, at the end of, and after two epochs of three batches
def test_resumed_loader_continues_with_the_same_batches(pictures, done):
    options = dict(size=SIZE, batch_size=4)
    whole = take(ImageLoader(pictures, **options), done + 4)
    first = ImageLoader(pictures, workers=2, **options)  # prefetches beyond what is consumed
    take(first, done)
    second = ImageLoader(pictures, **options)
    second.load_state_dict(first.state_dict())
    assert second.epoch == done / 3
    assert_same(take(second, 4), whole[done:])


def test_ranks_share_the_batch_of_one_process(pictures):
    whole = take(ImageLoader(pictures, SIZE, 4), 5)
    halves = [take(ImageLoader(pictures, SIZE, 2, rank=r, world_size=2), 5) for r in range(2)]
    for one, first, second in zip(whole, *halves):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))
        assert torch.equal(one.keys, torch.cat([first.keys, second.keys]))


def test_resume_refuses_what_would_change_the_batches(pictures):
    state = ImageLoader(pictures, SIZE, 4).state_dict()
    with pytest.raises(ValueError, match="seed: got 1, expected 0"):
        ImageLoader(pictures, SIZE, 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="global batch: got 2, expected 4"):
        ImageLoader(pictures, SIZE, 2).load_state_dict(state)
    (pictures / "cat/001.png").rename(pictures / "cat/0010.png")
    with pytest.raises(ValueError, match="names of the images"):
        ImageLoader(pictures, SIZE, 4).load_state_dict(state)


def test_epochs_visit_every_image_once_in_another_order_with_other_crops(pictures):
    batches = take(ImageLoader(pictures, SIZE, 4), 6)
    epochs = batches[:3], batches[3:]
    orders = [torch.cat([b.indices for b in epoch]) for epoch in epochs]
    assert all(sorted(order.tolist()) == list(range(12)) for order in orders)
    assert not torch.equal(*orders)
    views = [torch.cat([b.images for b in epoch])[order.argsort()] for epoch, order in zip(epochs, orders)]
    assert all(not torch.equal(a, b) for a, b in zip(*views))


def test_small_folder_is_repeated_with_other_crops_and_masks(tmp_path, caplog):
    write_pictures(tmp_path, count=3)
    with caplog.at_level(logging.WARNING, "fastkd"):
        (batch,) = take(ImageLoader(tmp_path, SIZE, 8), 1)
    assert "3 images, fewer than one batch of 8" in caplog.text
    assert sorted(batch.indices.bincount().tolist()) == [2, 3, 3]
    same = (batch.indices == batch.indices[0]).nonzero().flatten()
    assert not torch.equal(*batch.images[same[:2]]) and not torch.equal(*batch.keys[same[:2]])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_reported_once(pictures, caplog, workers):
    (pictures / "cat/broken.jpg").write_bytes(b"this is no picture")
    whole = (pictures / "dog/000.png").read_bytes()
    (pictures / "dog/cut.png").write_bytes(whole[: len(whole) // 2])
    loader = ImageLoader(pictures, SIZE, 7, workers=workers)
    with caplog.at_level(logging.WARNING, "fastkd"):
        batches = take(loader, 6)  # three epochs
    assert loader.skipped >= 6 and loader.state_dict()["skipped"] == loader.skipped
    assert caplog.text.count("broken.jpg") == 1 and caplog.text.count("cut.png") == 1
    assert "UnidentifiedImageError" in caplog.text
    bad = [i for i, path in enumerate(loader.folder.paths) if "broken" in path or "cut" in path]
    assert not any(torch.isin(batch.indices, torch.tensor(bad)).any() for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_broken_files_ends_with_an_error(tmp_path, workers):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"no")
    with pytest.raises(
        UnreadableError, match=r"20 files in a row cannot be read, .*\.png .*is this a folder of images"
    ):
        take(ImageLoader(tmp_path, SIZE, 2, workers=workers), 1)


def test_loader_leaves_the_global_random_state_alone_and_measures_waiting(pictures):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = ImageLoader(pictures, SIZE, 4, workers=1)
    batches = take(loader, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.wait_seconds > 0
    assert batches[0].images.dtype == torch.uint8 and batches[0].images.shape == (4, *SIZE, 3)


def test_loader_arguments_are_checked(pictures):
    with pytest.raises(ValueError, match="channels: got 4"):
        ImageLoader(pictures, SIZE, 4, channels=4)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        ImageLoader(pictures, SIZE, 0)


def rgb(image: Image.Image, tmp_path, name: str, channels: int = 3, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return np.asarray(open_image(tmp_path / name, channels))


def test_transparency_is_pasted_on_white(tmp_path):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3, 3] = 255  # left half opaque black, right half transparent black
    opened = rgb(Image.fromarray(pixels), tmp_path, "a.png")
    assert (opened[:, :3] == 0).all() and (opened[:, 3:] == 255).all()
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) % 2, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    opened = rgb(palette, tmp_path, "p.png", transparency=1)
    assert (opened[:, 0] == (10, 20, 30)).all() and (opened[:, 1] == 255).all()


def test_every_mode_becomes_rgb_or_grey(tmp_path):
    ramp = np.linspace(0, 255, 24).reshape(4, 6)
    grey = rgb(Image.fromarray(ramp.astype(np.uint8)), tmp_path, "g.png")
    assert grey.shape == (4, 6, 3) and (grey[..., 0] == ramp.astype(np.uint8)).all()
    one = rgb(Image.fromarray(ramp.astype(np.uint8)), tmp_path, "g1.png", channels=1)
    assert one.shape == (4, 6)
    deep = rgb(Image.fromarray((ramp * 257).astype(np.uint16)), tmp_path, "deep.png")
    assert np.abs(deep[..., 0] - ramp).max() <= 1
    cmyk = rgb(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), tmp_path, "c.jpg", quality=95)
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (255, 0, 0)
    upright[:16, 24:] = (0, 255, 0)
    upright[16:, :24] = (0, 0, 255)
    stored = Image.fromarray(upright)
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    if orientation in undo:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "o.jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(np.asarray(open_image(tmp_path / "o.jpg")).astype(int) - upright).mean() < 4
    whole = center_crop(tmp_path / "o.jpg", (32, 48), share=1.0)
    assert np.abs(whole.astype(int) - upright).mean() < 4
    big = stored.resize((stored.width * 16, stored.height * 16), Image.Resampling.NEAREST)
    big.save(tmp_path / "big.jpg", exif=exif, quality=100, subsampling=0)  # decoded at an eighth of its size
    assert np.abs(center_crop(tmp_path / "big.jpg", (32, 48), share=1.0).astype(int) - upright).mean() < 8


def test_crops_equal_torchvision_pixel_for_pixel(pictures):
    functional = pytest.importorskip("torchvision.transforms.functional")
    for seed, name in enumerate(ImageFolder(pictures).paths):
        path = pictures / name
        image = Image.open(path).convert("RGB")
        box = random_box(np.random.default_rng(seed), image.size[::-1])
        expected = functional.resized_crop(image, *box, list(SIZE), interpolation=Image.Resampling.BICUBIC)
        ours = random_resized_crop(path, SIZE, np.random.default_rng(seed), flip=0)
        np.testing.assert_array_equal(ours, np.asarray(expected))
        mirrored = random_resized_crop(path, SIZE, np.random.default_rng(seed), flip=1)
        np.testing.assert_array_equal(mirrored, ours[:, ::-1])


def test_large_jpeg_is_decoded_smaller_with_nearly_the_same_pixels(tmp_path):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (10, 15, 3), dtype=np.uint8))
    big = coarse.resize((1200, 800), Image.Resampling.BICUBIC)
    big.save(tmp_path / "big.jpg", quality=95)
    big.save(tmp_path / "big.png")
    ours = random_resized_crop(tmp_path / "big.jpg", (32, 32), np.random.default_rng(1), flip=0).astype(int)
    exact = random_resized_crop(tmp_path / "big.png", (32, 32), np.random.default_rng(1), flip=0).astype(int)
    assert np.abs(ours - exact).mean() < 1


def test_random_boxes_cover_the_asked_areas_and_ratios():
    random = np.random.default_rng(0)
    boxes = np.array([random_box(random, (300, 400)) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, ratio = height * width / 120_000, width / height
    assert 0.19 < area.min() < 0.25 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78 and 1.29 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05  # as many tall boxes as wide ones
    assert random_box(random, (10, 1000)) == (0, 493, 10, 13)  # nothing fits: centre, widest allowed ratio
    assert random_box(random, (1000, 10)) == (493, 0, 13, 10)


def test_evaluation_views(pictures):
    folder = ImageFolder(pictures)
    images = load_images([folder.path(i) for i in range(3)], 16)
    assert images.dtype == torch.uint8 and images.shape == (3, 16, 16, 3)
    assert load_images([folder.path(0)], (8, 12), channels=1).shape == (1, 8, 12, 1)
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, 30:] = 200
    Image.fromarray(half).save(pictures / "half.png")
    view = center_crop(pictures / "half.png", (8, 8))
    assert (view[:, :3] < 10).all() and (view[:, 5:] > 190).all()


def test_a_process_that_exits_with_an_iterator_alive_does_not_wait_for_its_workers_for_ever(pictures):
    code = """
import sys
from fastkd.data import ImageLoader, loader
loader.SECONDS_AFTER_SIGTERM = 1
batches = iter(ImageLoader(sys.argv[1], (16, 20), 2, workers=1))
next(batches)
kept = lambda: kept, batches  # a cycle: nothing ends the iterator before the interpreter
"""
    assert run_python("-c", code, pictures).returncode == 0


def test_a_worker_whose_main_process_was_killed_before_it_began_ends(pictures, monkeypatch):
    begin, (gone, held) = loader.begin_worker, os.pipe()

    def begin_late(worker: int) -> None:
        main = os.getppid()
        os.kill(main, signal.SIGKILL)
        while os.getppid() == main:
            time.sleep(0.01)
        begin(worker)

    monkeypatch.setattr(loader, "begin_worker", begin_late)
    process = os.fork()
    if process == 0:
        try:
            os.setpgid(0, 0)
            take(ImageLoader(pictures, SIZE, 4, workers=1), 1)
        finally:
            os._exit(1)
    os.close(held)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    if not select.select([gone], [], [], 60)[0]:
        os.killpg(process, signal.SIGKILL)
        pytest.fail("the worker waits for ever")
    os.close(gone)


def test_batches_wait_on_the_gpu_two_ahead(monkeypatch):
    """Order and synchronisation of the copies, with streams that write down what is asked of them."""
    log = []

    class Tensor:
        def __init__(self, number):
            self.number = number

        def record_stream(self, stream):
            log.append(("kept for", stream.name, self.number))

    class Stream:
        def __init__(self, device=None, name="copies"):
            self.name = name

        def record_event(self):
            return log[-1][1]

        def wait_event(self, event):
            log.append(("waited for", event))

    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            self.after = [step for what, step, *_ in log if what == "used"][-1]

        def synchronize(self):
            log.append(("host waited for", self.after))

    class OnHost(NamedTuple):
        images: int
        keys: int

        @property
        def tensors(self):
            return dict(images=self.images, keys=self.keys)

        def to(self, device):
            assert device.type == "cuda" and inside == ["copies"]
            log.append(("copied", self.images))
            return OnHost(Tensor(self.images), Tensor(self.keys))

    inside = []

    @contextlib.contextmanager
    def stream(chosen):
        inside.append(chosen.name)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="main"))
    for batch in on_device((OnHost(i, i) for i in range(3)), "cuda"):
        log.append(("used", batch.images.number))
    kept = [[("kept for", "main", i)] * 2 for i in range(3)]
    assert log == [
        ("copied", 0), ("copied", 1), ("waited for", 0), *kept[0], ("used", 0),
        ("copied", 2), ("waited for", 1), *kept[1], ("used", 1),
        ("waited for", 2), *kept[2], ("used", 2), ("host waited for", 0),
    ]  # fmt: skip


def test_on_a_cpu_batches_are_not_taken_ahead():
    taken = []
    batches = on_device((taken.append(i) or i for i in range(3)), "cpu")
    assert next(batches) == 0 and taken == [0]
