"""Odd, broken and hostile pictures on every path: an image of the right colours, or named, counted and skipped."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
from archives import write_tar
from odd_pictures import Odd, encoded, odd_pictures, two_halves, write_odd
from PIL import Image

from fastkd.data import ImageFolder, ImageLoader, PackedImages, TarImages, UnreadableError, center_crop, pack
from fastkd.data.reading import MAX_PIXELS

SIZE = (16, 20)
ODD = odd_pictures()
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow on cut files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_odd(tmp_path_factory.mktemp("odd") / "files", ODD)


def in_archive(tmp_path):
    return write_tar(
        tmp_path / "odd.tar", [(name, odd.content) for name, odd in ODD.items() if odd.content is not None]
    )


def loader_of(kind: str, source, **options) -> ImageLoader:
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        from fastkd.data.dali import DaliLoader

        return DaliLoader(source, **options)
    return ImageLoader(source, **options)


def check_colours(name: str, view: np.ndarray) -> None:
    """The halves of a view of the whole picture."""
    assert view.dtype == np.uint8
    if ODD[name].colours:
        part = max(1, view.shape[1] * 2 // 5)
        for half, colour in zip((view[:, :part], view[:, -part:]), ODD[name].colours):
            assert np.abs(half.reshape(-1, 3).mean(0) - colour).max() < 6, name


def check_failures(failures: dict[str, str], present) -> None:
    """Exactly the files that must be skipped, each for its reason."""
    expected = {name for name in present if ODD[name].reason}
    assert set(failures) == expected
    for name, reason in failures.items():
        assert re.search(ODD[name].reason, reason), (name, reason)


@pytest.mark.parametrize("name", ODD)
def test_evaluation_view(folder, name):
    if ODD[name].reason:
        with pytest.raises(Exception) as error:
            center_crop(folder / name, SIZE, share=1.0)
        assert re.search(ODD[name].reason, f"{type(error.value).__name__}: {error.value}")
    else:
        check_colours(name, center_crop(folder / name, SIZE, share=1.0))


@pytest.mark.parametrize("kind, workers", [("pil", 0), ("pil", 2), ("dali", 1), ("archive", 0)])
def test_training_views(folder, tmp_path, kind, workers, caplog):
    source = in_archive(tmp_path) if kind == "archive" else folder
    images = TarImages(source) if kind == "archive" else ImageFolder(source)
    whole = dict(scale=(1, 1), ratio=(0.001, 1000), flip=0)
    loader = loader_of(kind, images, size=SIZE, batch_size=len(images), workers=workers, **whole)
    (batch,) = itertools.islice(iter(loader), 1)
    names = [name.rpartition("/")[2] for name in images.paths]
    assert set(names) == {name for name in ODD if kind != "archive" or ODD[name].content is not None}
    check_failures({re.split("[/:]", path)[-1]: reason for path, reason in batch.failures}, names)
    assert loader.skipped == len(batch.failures) and all(name in caplog.text for name in names if ODD[name].reason)
    assert {names[index] for index in batch.indices} == {name for name in names if not ODD[name].reason}
    for index, view in zip(batch.indices, batch.images):
        height, width = images.picture(index).size[::-1]
        if 1 / 20 < height / width < 20:  # of a longer strip no box of ten random ones need be the whole
            check_colours(names[index], view.numpy())


@pytest.mark.parametrize("kind, workers", [("files", 2), ("archive", 0)])
def test_packing(folder, tmp_path, kind, workers):
    done = pack(in_archive(tmp_path) if kind == "archive" else folder, tmp_path / "out", workers=workers)
    present = [name for name in ODD if kind == "files" or ODD[name].content is not None]
    check_failures(dict(done.failures), present)
    packed = PackedImages(tmp_path / "out")
    assert len(packed) + len(done.failures) == len(present)
    for index, name in enumerate(packed.paths):
        assert min(packed.sizes[index]) <= 256
        check_colours(name, packed.image(index))


def test_the_limit_is_told_before_pixels_are_decoded_and_warns_of_nothing_below(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.new("1", (100_000_000, 1)).save(tmp_path / "large.png")
        center_crop(tmp_path / "large.png", (2, 2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some scripts do
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    write_odd(tmp_path / "bombs", {name: ODD[name] for name in ODD if ODD[name].reason == "DecompressionBombError"})
    for path in (tmp_path / "bombs").glob("*.*g*f*"):
        if path.is_file():
            with pytest.raises(Image.DecompressionBombError, match=f"limit of {MAX_PIXELS}"):
                center_crop(path, SIZE)


@pytest.mark.parametrize("kind, workers", [("pil", 0), ("pil", 2), ("dali", 1), ("archive", 1)])
def test_nothing_usable_is_an_error(tmp_path, kind, workers):
    useless = {name: odd for name, odd in ODD.items() if odd.reason and odd.content is not None}
    source = write_odd(tmp_path / "files", useless)
    if kind == "archive":
        source = write_tar(tmp_path / "a.tar", [(name, odd.content) for name, odd in useless.items()])
    with pytest.raises(UnreadableError, match="20 files in a row cannot be read, the last one .* is this a folder of"):
        next(iter(loader_of(kind, source, size=SIZE, batch_size=8, workers=workers)))
    with pytest.raises(UnreadableError, match="no image can be read, .* is this the right folder"):
        pack(source, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_damaged_files_are_an_image_or_a_counted_failure(tmp_path, kind):
    random = np.random.default_rng(len(kind))
    noise = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((64, 48))
    options = dict(compression="tiff_lzw") if kind == "TIFF" else dict(exif=Image.Exif()) if kind != "GIF" else {}
    whole = np.frombuffer(encoded(noise, kind, **options), np.uint8)
    write_odd(tmp_path, {f"whole{number}.jpg": Odd(encoded(two_halves(), "JPEG")) for number in range(80)})
    for number in range(120):
        damaged = whole.copy()
        places = random.integers(0, random.choice((64, len(whole))), random.integers(0, 6))
        damaged[places] = random.integers(0, 256, len(places))
        end = len(whole) if number % 2 else random.integers(1, len(whole))
        (tmp_path / f"{number}.jpg").write_bytes(damaged[:end].tobytes())
    loader = ImageLoader(tmp_path, SIZE, 200)
    (batch,) = itertools.islice(iter(loader), 1)
    assert batch.indices.min() >= 0 and batch.images.shape == (200, *SIZE, 3)
    assert loader.skipped == len(batch.failures) > 20
    assert not any("whole" in path for path, _ in batch.failures)
