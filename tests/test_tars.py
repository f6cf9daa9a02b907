"""Tar archives as a source: members read in place, labels, and what is refused, cut or damaged."""

from __future__ import annotations

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import torch
from archives import write_shards, write_tar
from PIL import Image
from test_cli import as_arguments, fastkd
from tiny_run import tiny_config, write_models, write_pictures

from fastkd.data import ImageFolder, ImageLoader, TarImages, UnreadableError, open_images, pack, tars

SIZE = (16, 20)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def take(loader: ImageLoader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("prefix", ["", "./"])
def test_archives_stand_in_for_the_folder(pictures, tmp_path, prefix):
    shards = write_shards(pictures, tmp_path / "shards", prefix=prefix)
    before = sorted(tmp_path.rglob("*"))
    folder, images = ImageFolder(pictures), open_images(shards)
    assert isinstance(images, TarImages) and not images.refused
    assert (images.paths, images.classes, images.labels) == (folder.paths, folder.classes, folder.labels)
    assert images.path(3) == f"{shards}/00001.tar:cat/007.png"
    for index in range(len(folder)):
        assert images.read(index) == folder.read(index)
        np.testing.assert_array_equal(images.center_crop(index, SIZE), folder.center_crop(index, SIZE))
    state = ImageLoader(pictures, SIZE, 4).state_dict()
    ImageLoader(shards, SIZE, 4).load_state_dict(state)  # the same names: one may continue the other's run
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


def test_one_archive_is_a_source_too_and_packs_to_the_same_bytes(pictures, tmp_path):
    archive = write_shards(pictures, tmp_path / "shards", shards=1) / "00000.tar"
    done = pack(archive, tmp_path / "ours", short_side=20)
    pack(pictures, tmp_path / "theirs", short_side=20)
    assert done.images == 12
    for path in (tmp_path / "theirs").iterdir():
        if path.name != "plan.json":
            assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_image_files_come_before_archives_beside_them(pictures, tmp_path):
    write_tar(pictures / "download.tar", [("a.png", png())])
    assert isinstance(open_images(pictures), ImageFolder)
    (tmp_path / "deep/er").mkdir(parents=True)
    (pictures / "download.tar").rename(tmp_path / "deep/er/x.tar")
    assert open_images(tmp_path / "deep").paths == ["a.png"]


def test_an_archive_is_scanned_once_and_again_when_it_changed(pictures, tmp_path, monkeypatch):
    shards = write_shards(pictures, tmp_path / "shards", shards=1)
    first = TarImages(shards)
    monkeypatch.setattr(tars, "_scan", lambda path: pytest.fail("scanned again"))
    second = TarImages(shards)
    assert second.paths == first.paths and second.read(5) == first.read(5) and second.labels == first.labels
    monkeypatch.undo()
    write_tar(shards / "00000.tar", [("cat/new.png", png())])
    assert TarImages(shards).paths == ["cat/new.png"]


def test_without_a_place_for_the_cache_it_works_as_well(pictures, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(TarImages(write_shards(pictures, tmp_path / "shards"))) == 12


@pytest.mark.parametrize(
    "members, classes, labels",
    [
        ({"0.cls": b"2", "1.cls": b" 0\n"}, ["0", "1", "2"], [2, 0, -1]),
        ({"0.json": b'{"label": 1}', "2.json": b'{"label": 0, "more": []}', "1.json": b"[]"}, ["0", "1"], [1, -1, 0]),
        ({"0.json": b'{"label": "b"}', "1.cls": b"a", "1.json": b'{"label": "c"}'}, ["a", "b"], [1, 0, -1]),
        ({}, [], [-1, -1, -1]),
    ],
)
def test_labels(tmp_path, members, classes, labels):
    files = {f"{n}.png": png() for n in range(3)} | members
    images = TarImages(write_tar(tmp_path / "a.tar", files.items()))
    assert (images.classes, images.labels, images.refused) == (classes, labels, ())


def test_own_labels_come_before_class_folders_in_all_archives(tmp_path):
    write_tar(tmp_path / "a.tar", [("cat/0.png", png())])
    write_tar(tmp_path / "b.tar", [("dog/1.png", png()), ("dog/1.cls", b"1")])
    images = TarImages(tmp_path)
    assert (images.classes, images.labels) == (["0", "1"], [-1, 1])
    (batch,) = take(ImageLoader(tmp_path, SIZE, 2), 1)
    assert batch.labels.tolist() == [images.labels[index] for index in batch.indices]


def test_labels_that_make_no_sense_are_told(tmp_path):
    bad = {"0.cls": b"-1", "1.cls": b"99999999999", "2.json": b"{", "3.json": b"[" * 100_000,
           "4.json": b'{"label": []}', "5.cls": b"\xff", "6.cls": b""}  # fmt: skip
    archive = write_tar(tmp_path / "a.tar", [*((f"{n}.png", png()) for n in range(7)), *bad.items()])
    images = TarImages(archive)
    assert images.labels == [-1] * 7
    assert [place.rpartition(":")[2] for place, _ in images.refused] == list(bad)
    write_tar(archive, [("0.png", png()), ("0.cls", b"cat"), ("1.png", png()), ("1.cls", b"4")])
    with pytest.raises(ValueError, match="got class numbers and class names"):
        TarImages(archive)


def header(name: str, kind: bytes, **values) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type = kind
    for key, value in values.items():
        setattr(found, key, value)
    return found


def test_members_that_could_escape_or_are_no_files_are_refused_and_told(tmp_path, caplog):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    sparse = header("s.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,4", "GNU.sparse.size": "4"})
    refused = [
        (str(secret), "points out"), ("../up.png", "points out"), ("a/../../up.png", "points out"),
        (header("link.png", tarfile.SYMTYPE, linkname=str(secret)), "link"),
        (header("hard.png", tarfile.LNKTYPE, linkname="good.png"), "link"),
        (header("device.png", tarfile.CHRTYPE, devmajor=1, devminor=5), "device"),
        (header("pipe.png", tarfile.FIFOTYPE), "device or pipe"), (sparse, "sparse"),
    ]  # fmt: skip
    silent = [
        (header("dir.png", tarfile.DIRTYPE), b""),
        ("._good.png", b"x"),
        ("notes.txt", b"x"),
        (".git/a.png", b"x"),
    ]
    content = [(member, b"data" if member is sparse else b"") for member, _ in refused]
    images = TarImages(write_tar(tmp_path / "a.tar", [("good.png", png(1)), *content, *silent]))
    assert images.paths == ["good.png"] and images.read(0) == png(1)
    assert len(images.refused) == len(refused) and "8 members not read" in caplog.text
    for (place, why), (member, expected) in zip(images.refused, refused):
        assert place.endswith(member if isinstance(member, str) else member.name) and expected in why


def test_of_a_cut_archive_the_members_before_the_cut_are_used(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", png(n) + bytes(600)) for n in range(4)])
    whole, images = path.read_bytes(), TarImages(path)
    last = int(images._offset[-1])
    for length in (last + 300, last, last - 100, last - 512, last - 600, int(images._offset[1]) + 5):
        path.write_bytes(whole[:length])
        cut = TarImages(path)
        expected = [name for name, end in zip(images.paths, images._offset + images._size) if end <= length]
        assert cut.paths == expected and any("cut" in why for _, why in cut.refused), length
        assert all(cut.read(n) == png(n) + bytes(600) for n in range(len(cut)))
    path.write_bytes(whole[: last + 5])
    assert len(images) == 4
    with pytest.raises(OSError, match="became shorter"):
        images.read(3)


def test_what_follows_the_end_mark_is_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png())])
    path.write_bytes(path.read_bytes() * 2)  # cat a.tar b.tar
    assert "another archive" in TarImages(path).refused[0][1]


def test_wrong_archives_are_clear_errors(tmp_path):
    (tmp_path / "z").mkdir()
    for name in ("x.tar.gz", "x.tgz"):
        with tarfile.open(tmp_path / "z" / name, "w:gz"):
            pass
        for place in (tmp_path / "z", tmp_path / "z" / name):
            with pytest.raises(ValueError, match=r"got a compressed archive, expected a plain \.tar, .*gunzip"):
                open_images(place)
        (tmp_path / "z" / name).rename(tmp_path / "z" / "y.tar")
        with pytest.raises(ValueError, match="y.tar': not a plain tar archive .* uncompress it first"):
            open_images(tmp_path / "z")
        (tmp_path / "z/y.tar").unlink()
    write_tar(tmp_path / "z/empty.tar", [("readme.txt", b"hello")])
    with pytest.raises(ValueError, match="got no image in 1 archives"):
        open_images(tmp_path / "z")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        TarImages(tmp_path / "nowhere.tar")


def test_archives_of_broken_pictures_end_with_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"no picture") for n in range(9)])
    with pytest.raises(UnreadableError, match=r"20 files in a row cannot be read, .*a\.tar:\d\.jpg"):
        take(ImageLoader(tmp_path, SIZE, 2), 1)


def test_names_that_are_no_utf8_and_names_that_repeat(tmp_path):
    odd = header("caf\udce9.png", tarfile.REGTYPE)
    for shard, shade in (("b.tar", 2), ("a.tar", 1)):
        write_tar(tmp_path / shard, [("0.png", png(shade))])
    with tarfile.open(tmp_path / "c.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        odd.size = 2
        archive.addfile(odd, io.BytesIO(b"no"))
    images = TarImages(tmp_path)
    assert images.paths[:2] == ["0.png", "0.png"] and images.read(0) == png(1) and images.read(1) == png(2)
    loader = ImageLoader(tmp_path, SIZE, 3)
    (batch,) = take(loader, 1)
    assert loader.skipped >= 1 and "caf?.png" in batch.failures[0][0]
    assert json.dumps(loader.state_dict())


def test_damaged_archives_never_do_worse_than_an_error(pictures, tmp_path):
    random = np.random.default_rng(0)
    path = write_shards(pictures, tmp_path / "shards", shards=1) / "00000.tar"
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    headers = np.flatnonzero([block.tobytes()[257:262] == b"ustar" for block in whole.reshape(-1, 512)]) * 512
    opened = 0
    for _ in range(150):
        damaged = whole.copy()
        where = random.choice(headers, 3) + random.integers(0, 512, 3)
        damaged[where] = random.integers(0, 256, 3)
        for field in random.choice(headers, random.integers(2)):  # a size with a right checksum
            damaged[field + 124 : field + 136] = np.frombuffer(b"%011o\0" % random.integers(1 << 33), np.uint8)
            damaged[field + 148 : field + 156] = 32
            damaged[field + 148 : field + 155] = np.frombuffer(b"%06o\0" % damaged[field : field + 512].sum(), np.uint8)
        path.write_bytes(damaged[: random.integers(len(damaged) // 2, len(damaged) + 1)].tobytes())
        try:
            images = TarImages(path)
        except ValueError:
            continue
        opened += 1
        for index in range(len(images)):
            try:
                assert len(images.read(index)) == images._size[index]
            except OSError:
                pass
    assert opened > 50


def test_batches_do_not_depend_on_workers(pictures, tmp_path):
    shards = write_shards(pictures, tmp_path / "shards")
    ours, theirs = take(ImageLoader(shards, SIZE, 4, workers=2), 5), take(ImageLoader(pictures, SIZE, 4), 5)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.keys, b.keys) for a, b in zip(ours, theirs))


def test_training_from_archives(capsys, pictures, tmp_path):
    write_models(tmp_path)
    shards = write_shards(pictures, tmp_path / "shards")
    config = tiny_config(tmp_path, data=shards, val_data=shards / "00001.tar", steps=2)
    code, _, err = fastkd(capsys, "distill", *as_arguments(config))
    assert code == 0 and "12 images at 16 x 16" in err and "finished after 2 steps" in err
    (shards / "x.tar.gz").touch()
    other = tiny_config(tmp_path, out="other", data=shards)
    code, _, err = fastkd(capsys, "distill", *as_arguments(other))
    assert code == 2 and "--data: archive " in err and "got a compressed archive" in err
