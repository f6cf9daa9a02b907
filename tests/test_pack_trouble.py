"""Packing that is killed, runs out of space or meets other images, and packed folders that are damaged later."""

from __future__ import annotations

import os
import select
import signal
import time

import numpy as np
import pytest
from archives import write_shards
from test_cli import fastkd
from tiny_run import write_pictures

from fastkd.data import ImageFolder, PackedImages, pack

SMALL = dict(short_side=600, shard_mb=4)  # two images a shard: six shards
OPTIONS = ("--short-side", "600", "--shard-mb", "4", "--workers", "0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def packed(pictures, tmp_path):
    pack(pictures, tmp_path / "packed", **SMALL)
    return tmp_path / "packed"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(pictures, packed, tmp_path, workers):
    random, out = np.random.default_rng(workers), tmp_path / "out"

    def child() -> tuple[int, int]:
        """A process that packs, and what can be read once it and its workers are gone."""
        gone, held = os.pipe()
        process = os.fork()
        if process:
            os.close(held)
            return process, gone
        try:
            os.setpgid(0, 0)
            pack(pictures, out, workers=workers, **SMALL)
            os._exit(0)
        finally:
            os._exit(1)

    start = time.monotonic()
    pack(pictures, tmp_path / "timed", workers=workers, **SMALL)
    whole, killed = time.monotonic() - start, 0
    for _ in range(6 if workers else 15):
        process, gone = child()
        time.sleep(random.uniform(0, whole / 2))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        if not select.select([gone], [], [], 60)[0]:
            os.killpg(process, signal.SIGKILL)
            pytest.fail("workers outlive the process that they decode for")
        os.close(gone)
    assert killed >= 3
    process, gone = child()
    _, status = os.waitpid(process, 0)
    os.close(gone)
    assert status == 0 and contents(out) == contents(packed)


def test_a_full_disk_is_told_and_the_same_command_goes_on(capsys, pictures, packed, tmp_path):
    out = tmp_path / "out"

    def stop(done: int, failed: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(pictures, out, **SMALL, progress=stop)
    (out / "00002.pixels.part").unlink()
    (out / "00002.pixels.part").symlink_to("/dev/full")
    code, _, err = fastkd(capsys, "pack", pictures, out, *OPTIONS)
    assert code == 1 and "No space left on device" in err and "the same command goes on there" in err
    (out / "00002.pixels.part").unlink()
    code, _, err = fastkd(capsys, "pack", pictures, out, *OPTIONS)
    assert code == 0 and "(2 shards were already there)" in err and contents(out) == contents(packed)
    (tmp_path / "file").touch()
    code, _, err = fastkd(capsys, "pack", pictures, tmp_path / "file/out", *OPTIONS)
    assert code == 1 and "Not a directory" in err


class Deadly(ImageFolder):
    def read(self, index: int) -> bytes:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)  # as a system does that runs out of memory
        return super().read(index)


def test_a_killed_worker_is_an_error_and_not_a_hang(pictures, packed, tmp_path):
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)"):
        pack(Deadly(pictures), tmp_path / "out", workers=1, **SMALL)
    pack(pictures, tmp_path / "out", workers=1, **SMALL)
    assert contents(tmp_path / "out") == contents(packed)


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_images_that_changed_since_are_refused(pictures, tmp_path, kind):
    source, out = pictures, tmp_path / "out"
    if kind == "tars":
        source = write_shards(pictures, tmp_path / "tars")
    pack(source, out)
    assert pack(source, out).resumed == 1
    changed = source / ("00000.tar" if kind == "tars" else "cat/003.png")
    before = changed.stat()
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    with pytest.raises(ValueError, match="begun from other images: got other files, or files that were written since"):
        pack(source, out)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pack(source, out).resumed == 1
    if kind == "files":
        changed.unlink()
        with pytest.raises(ValueError, match="begun from other images: got 11 images, expected 12; choose another"):
            pack(source, out)


def test_verify_names_what_is_damaged(capsys, pictures, packed):
    code, _, err = fastkd(capsys, "pack", packed, "--verify")
    assert code == 0 and "12 images in" in err and "are whole" in err
    path = packed / "00001.pixels"
    pixels = path.read_bytes()
    path.write_bytes(pixels[:100] + bytes([pixels[100] ^ 1]) + pixels[101:])
    code, _, err = fastkd(capsys, "pack", packed, "--verify")
    name = PackedImages(packed).paths[2]
    assert code == 1 and f"damaged: {path}:{name}" in err and "1 of 12 images" in err and err.count("damaged:") == 1
    path.unlink()
    code, _, err = fastkd(capsys, "pack", packed, "--verify")
    assert code == 1 and "00001.pixels: missing; delete 00001.json where it is there, and repeat the same" in err
    (packed / "00001.json").unlink()
    code, _, err = fastkd(capsys, "pack", pictures, packed, *OPTIONS)
    assert code == 0 and path.read_bytes() == pixels
    index = (packed / "00004.json").read_text()
    (packed / "00004.json").write_text(index.replace('"label": [1', '"label": [0'))
    code, _, err = fastkd(capsys, "pack", packed, "--verify")
    assert code == 1 and "00004.json: damaged, its checksum differs" in err
    with pytest.raises(ValueError, match="00004.json: damaged"):
        PackedImages(packed)


def test_wrong_arguments(capsys, pictures, packed, tmp_path):
    for arguments, said in (
        ((pictures,), "OUT: got none, expected the folder to write"),
        ((packed, tmp_path / "x", "--verify"), "expected none with --verify"),
        ((packed, tmp_path / "x"), "packed already, expected image files or archives"),
        ((tmp_path / "nowhere", tmp_path / "x"), "FOLDER: image folder"),
    ):
        code, _, err = fastkd(capsys, "pack", *arguments)
        assert code == 2 and said in err
    code, _, err = fastkd(capsys, "pack", pictures, "--verify")
    assert code == 1 and "no packed.json there" in err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no")
    code, _, err = fastkd(capsys, "pack", broken, tmp_path / "y")
    assert code == 1 and "no image can be read, a.jpg: UnidentifiedImageError" in err
