"""The contract of `fastkd.data.Loader`, held by every loader on every source that it reads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from archives import write_shards
from PIL import Image

from fastkd.data import ImageLoader, Loader, PairedLoader, pack

SIZE, BATCH = (16, 20), 6
KINDS = ["files", "tars", "packed", "paired", "transform", "dali files", "dali tars"]


@pytest.fixture(autouse=True, scope="module")
def sources(tmp_path_factory):
    """JPEG files in two classes, one of 25 broken, as files, archives and packed."""
    root, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(1)
    for index in range(25):
        folder = root / "files" / ("cat" if index % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40 + index, 30), Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg", quality=95)
    (root / "files/cat/001.jpg").write_bytes(b"this is no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        write_shards(root / "files", root / "tars", shards=3)
        pack(root / "tars", root / "packed")
        yield root


def shrunk(image: Image.Image) -> Image.Image:
    return image.rotate(int(torch.randint(360, ()))).resize(SIZE[::-1])


def make(kind: str, root, batch: int = BATCH, **options) -> Loader:
    if kind.startswith("dali"):
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        from fastkd.data.dali import DaliLoader

        return DaliLoader(root / kind.removeprefix("dali "), SIZE, batch, **options)
    if kind == "paired":
        return PairedLoader(make("files", root, batch, **options), make("packed", root, batch, **options))
    if kind == "transform":
        return ImageLoader(root / "tars", SIZE, batch, transform=shrunk, **options)
    return ImageLoader(root / kind, SIZE, batch, **options)


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def assert_same(ours, theirs, part: slice = slice(None)) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(tensor, b.tensors[name][part]) for name, tensor in a.tensors.items())
        assert torch.equal(a.indices, b.indices[part])


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind, sources):
    loader = make(kind, sources, seed=3)
    assert isinstance(loader, Loader)
    labels, broken = torch.tensor(loader.folder.labels), [n for n, p in enumerate(loader.folder.paths) if "001" in p]
    assert loader.folder.classes == ["cat", "dog"] and len(broken) == (kind != "packed")
    batches = take(loader, loader.batches_per_epoch)
    for batch in batches:
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (BATCH, *SIZE, 3)
        assert batch.images.is_contiguous() and batch.images.float().std() > 10
        assert torch.equal(batch.labels, labels[batch.indices])
    assert loader.batches_per_epoch == 4 and loader.epoch == 1.0 and loader.global_batch == BATCH
    seen = torch.cat([batch.indices for batch in batches])
    assert len(seen.unique()) >= 23 and not torch.isin(seen, torch.tensor(broken)).any()
    assert loader.wait_seconds > 0
    assert loader.skipped == sum(len(batch.failures) for batch in batches) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_counted_once_an_epoch(kind, sources):
    loader = make(kind, sources, 5)  # 25 images, 5 batches: every image has its turn
    batches = take(loader, 10 if kind != "packed" else 4)
    assert loader.skipped == (0 if kind == "packed" else 2)
    assert {path.rpartition("/")[2] for batch in batches for path, _ in batch.failures} <= {"001.jpg"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_batches_with_any_number_of_workers(kind, sources):
    reference = take(make(kind, sources, seed=3), 6)
    for workers in (0, 1, 3):
        assert_same(take(make(kind, sources, seed=3, workers=workers), 6), reference)
    (other,) = take(make(kind, sources, seed=4), 1)
    assert not torch.equal(other.keys, reference[0].keys) and not torch.equal(other.images, reference[0].images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 4, 6])  # before, inside, at the end of and after the first epoch
def test_a_resumed_loader_goes_on_with_the_same_batches(kind, sources, done):
    whole = take(make(kind, sources), 7)
    first = make(kind, sources, workers=1)  # reads ahead of what is consumed
    assert_same(take(first, done), whole[:done])
    second = make(kind, sources)
    second.load_state_dict(first.state_dict())
    assert second.epoch == first.epoch == done / 4 and second.skipped == first.skipped
    assert_same(take(second, 7 - done), whole[done:])
    with pytest.raises(ValueError, match="cannot resume on .*: seed: got 1, expected 0"):
        make(kind, sources, seed=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hand_out_disjoint_parts_of_the_batch_of_one_process(kind, sources):
    whole = take(make(kind, sources), 5)
    for rank in range(2):
        mine = make(kind, sources, BATCH // 2, rank=rank, world_size=2)
        assert mine.global_batch == BATCH and mine.batches_per_epoch == 4
        assert_same(take(mine, 5), whole, slice(rank * 3, rank * 3 + 3))
