"""fastkd pack, the packed format and batches from it: the same ones as from the folder that was packed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import as_arguments, fastkd
from tiny_run import tiny_config, write_models, write_pictures

from fastkd.data import ImageFolder, ImageLoader, PackedImages, open_image, open_images, pack
from fastkd.data.crops import Crops

SIZE = (16, 20)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def packed(pictures, tmp_path):
    pack(pictures, tmp_path / "packed")
    return tmp_path / "packed"


def take(loader: ImageLoader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.images, b.images) and torch.equal(a.keys, b.keys) and torch.equal(a.indices, b.indices)


def test_packed_images_are_the_decoded_ones(pictures, packed):
    folder, images = ImageFolder(pictures), open_images(packed)
    assert isinstance(images, PackedImages) and len(images) == len(folder)
    assert (images.paths, images.labels, images.classes) == (folder.paths, folder.labels, folder.classes)
    for index in range(len(folder)):
        image = images.image(index)
        np.testing.assert_array_equal(image, np.asarray(open_image(folder.path(index))))
        assert image.base is not None and not image.flags.writeable and images.is_whole(index)
        np.testing.assert_array_equal(images.center_crop(index, (9, 8)), folder.center_crop(index, (9, 8)))
        np.testing.assert_array_equal(images.center_crop(index, (9, 8), 1), folder.center_crop(index, (9, 8), 1))


def test_short_side_shrinks_upright_and_never_enlarges(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "in/a.png")
    Image.new("CMYK", (60, 40)).save(tmp_path / "in/b.jpg", exif=exif)
    Image.new("L", (8, 300)).save(tmp_path / "in/c.png")
    pack(tmp_path / "in", tmp_path / "out", short_side=20, channels=1)
    images = PackedImages(tmp_path / "out")
    assert images.sizes.tolist() == [[20, 30], [30, 20], [300, 8]] and images.channels == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_left_out_and_named(pictures, tmp_path, workers):
    (pictures / "cat/broken.jpg").write_bytes(b"this is no picture")
    seen = []
    done = pack(pictures, tmp_path / "out", workers=workers, progress=lambda *counts: seen.append(counts))
    assert [name for name, _ in done.failures] == ["cat/broken.jpg"] and done.images == 12
    assert seen[-1] == (13, 1) and len(PackedImages(tmp_path / "out")) == 12
    assert "UnidentifiedImageError" in done.failures[0][1]


def test_packing_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    small = dict(short_side=600, shard_mb=4)  # two images a shard
    whole = pack(pictures, tmp_path / "whole", **small)
    shards = json.loads((tmp_path / "whole/packed.json").read_text())["shards"]
    assert len(shards) == 6 and whole.resumed == 0

    def stop(done: int, failed: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(pictures, tmp_path / "out", **small, progress=stop)
    with pytest.raises(ValueError, match="packing is not finished; repeat the same fastkd pack command"):
        open_images(tmp_path / "out")
    decoded = []
    monkeypatch.setitem(pack.__globals__, "shrink", lambda *task, shrink=pack.__globals__["shrink"]: (
        decoded.append(task), shrink(*task))[1])  # fmt: skip
    assert pack(pictures, tmp_path / "out", **small).resumed == 2 and len(decoded) == 8
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_pack_refuses_what_it_would_spoil(pictures, packed):
    with pytest.raises(ValueError, match="begun with other settings .short_side: got 10, expected 256"):
        pack(pictures, packed, short_side=10)
    with pytest.raises(ValueError, match="got a folder with other files"):
        pack(pictures, pictures)
    for wrong, said in ((dict(channels=4), "channels: got 4"), (dict(short_side=0), "short_side: got 0")):
        with pytest.raises(ValueError, match=said):
            pack(pictures, packed, **wrong)


def test_damaged_folders_are_told(packed, tmp_path):
    with pytest.raises(FileNotFoundError, match="make it with fastkd pack"):
        PackedImages(tmp_path)
    pixels = (packed / "00000.pixels").read_bytes()
    (packed / "00000.pixels").write_bytes(bytes([pixels[0] ^ 1]) + pixels[1:])
    images = PackedImages(packed)
    assert [images.is_whole(index) for index in range(3)] == [False, True, True]
    (packed / "00000.pixels").write_bytes(pixels[:-1])
    with pytest.raises(ValueError, match=r"00000\.pixels: got \d+ bytes, expected \d+; delete it"):
        PackedImages(packed)
    header = json.loads((packed / "packed.json").read_text())
    (packed / "packed.json").write_text(json.dumps(header | dict(version=2)))
    with pytest.raises(ValueError, match="fastkd-packed version 2, expected fastkd-packed version 1"):
        PackedImages(packed)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(pictures, packed, workers):
    options = dict(size=SIZE, batch_size=4, seed=5, scale=(0.1, 0.9))
    folder = take(ImageLoader(pictures, **options), 5)
    assert_same(take(ImageLoader(packed, workers=workers, **options), 5), folder)
    ranks = [take(ImageLoader(packed, **options | dict(batch_size=2), rank=r, world_size=2), 2) for r in range(2)]
    for one, first, second in zip(folder, *ranks):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))


def test_resumed_loader_continues_with_the_same_batches(packed):
    whole = take(ImageLoader(packed, SIZE, 4), 7)
    first = ImageLoader(packed, SIZE, 4, workers=1)
    take(first, 4)
    second = ImageLoader(packed, SIZE, 4)
    second.load_state_dict(first.state_dict())
    assert_same(take(second, 3), whole[4:])


def test_what_goes_to_a_gpu_is_one_buffer_of_crops(packed):
    loader = ImageLoader(packed, SIZE, 4)
    expected = take(loader, 1)[0]
    loader._views.on_gpu = True  # as on a device of type cuda
    crops = pickle.loads(pickle.dumps(loader._views))[next(loader._keys(0))]
    assert isinstance(crops, Crops) and len(crops.pixels) == int(crops.boxes[:, 2:].prod(1).sum()) * 3
    pinned = torch.utils.data._utils.pin_memory.pin_memory(crops) if torch.cuda.is_available() else crops
    moved = pinned.to("cpu")
    assert torch.equal(moved.images, expected.images) and torch.equal(moved.keys, expected.keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("masks", [1, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(packed, masks):
    options = dict(size=SIZE, batch_size=4, masks_per_image=masks)
    ours = take(ImageLoader(packed, device="cuda", workers=1, **options), 5)
    assert all(batch.images.is_cuda and batch.keys.is_cuda for batch in ours)
    assert_same([batch.to("cpu") for batch in ours], take(ImageLoader(packed, **options), 5))


def test_channels_must_be_those_that_were_packed(packed):
    with pytest.raises(ValueError, match="channels: got 1, expected 3 as packed .* pack again with --channels 1"):
        ImageLoader(packed, SIZE, 4, channels=1)


@pytest.mark.parametrize("source", ["pictures", "packed"])
def test_several_masks_per_view(pictures, packed, source):
    folder = dict(pictures=pictures, packed=packed)[source]
    loader = ImageLoader(folder, SIZE, 6, masks_per_image=3)
    batches = take(loader, 8)
    assert loader.batches_per_epoch == 2 and loader.batches_per_pass == 6 and loader.epoch == 4
    for batch in batches:
        assert batch.images.shape == (6, *SIZE, 3) and len(batch.keys.unique()) == 6
        views, indices = batch.images.unflatten(0, (2, 3)), batch.indices.view(2, 3)
        assert (views == views[:, :1]).all() and (indices == indices[:, :1]).all()
    seen = torch.cat([batch.indices[::3] for batch in batches[:6]])
    assert sorted(seen.tolist()) == list(range(12))  # a pass decodes every image once
    resumed = ImageLoader(folder, SIZE, 6, masks_per_image=3)
    resumed.load_state_dict(loader.state_dict())
    assert_same(take(resumed, 2), take(loader, 2))
    halves = [take(ImageLoader(folder, SIZE, 3, masks_per_image=3, rank=r, world_size=2), 2) for r in range(2)]
    for one, first, second in zip(batches, *halves):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))
    with pytest.raises(ValueError, match="masks per image: got 1, expected 3 as in the checkpoint"):
        ImageLoader(folder, SIZE, 6).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="masks_per_image: got 4, expected at least 1 and a divisor of batch_size 6"):
        ImageLoader(folder, SIZE, 6, masks_per_image=4)


def test_pack_command_and_training_from_packed_images(capsys, pictures, tmp_path):
    (pictures / "cat/broken.jpg").write_bytes(b"no")
    code, _, err = fastkd(capsys, "pack", pictures, tmp_path / "packed", "--workers", "0", "--short-side", "24")
    assert code == 0 and "12 images packed in" in err and "1 unreadable ones left out" in err
    assert "left out, unreadable: cat/broken.jpg: UnidentifiedImageError" in err
    code, _, err = fastkd(capsys, "pack", pictures, tmp_path / "packed", "--short-side", "25")
    assert code == 2 and "short_side: got 25, expected 24" in err
    code, _, err = fastkd(capsys, "pack", tmp_path / "nowhere", tmp_path / "x")
    assert code == 2 and "no such folder" in err

    write_models(tmp_path)
    config = tiny_config(tmp_path, data=tmp_path / "packed", val_data=tmp_path / "packed", masks_per_image=2, steps=4)
    code, _, err = fastkd(capsys, "distill", *as_arguments(config))
    assert code == 0 and "12 images at 16 x 16" in err and "finished after 4 steps" in err
    for changes, said in (
        (dict(loader="pil"), "--loader: got pil, expected what reads"),
        (dict(masks_per_image=3), "--masks-per-image: got 3, expected a divisor of --batch-size 4"),
        (dict(in_chans=1, student="vit_tiny_patch4_16"), "channels: got 1, expected 3 as packed"),
    ):
        wrong = dataclasses.replace(config, out=tmp_path / "other", teacher="none", **changes)
        code, _, err = fastkd(capsys, "distill", *as_arguments(wrong))
        assert code == 2 and said in err
