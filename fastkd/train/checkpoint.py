"""Checkpoints to trust: each is whole or absent, its bytes are checked before it is used, and the last few are kept.

    checkpoints/step_00001234/student.safetensors   the student; `fastkd.models.load_vit` reads it
                              train_state.pt        projectors, optimiser, data position: tensors and numbers
                              SHA256SUMS            of both files; ``sha256sum -c SHA256SUMS`` checks them as well
    checkpoints/last                                a link to the newest one

A checkpoint is written in a folder beside its place, flushed to the disk, read back for its checksums and renamed. Only
then older ones go. Nothing here trusts a name: what is found is compared with its checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

STUDENT = "student.safetensors"
STATE = "train_state.pt"
SUMS = "SHA256SUMS"
_FOLDER = re.compile(r"step_(\d+)")
_NEW, _DAMAGED = ".new", ".damaged"


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        good: the newest checkpoint whose bytes are those that were written; None without one.
        damaged: the newer ones, newest first, each with the reason why it cannot be used.
    """

    good: Path | None
    damaged: tuple[tuple[Path, str], ...]


def save(root: Path, student: nn.Module, state: dict, keep: int) -> Path:
    """Adds the checkpoint of ``state["step"]`` to `root`, then deletes older ones until `keep` are left.

    A crash or a full disk at any point leaves the older ones as they are. At most ``keep + 1`` exist at a time.

    Raises:
        OSError: it cannot be written; what was written of it is deleted again.
    """
    folder = root / f"step_{state['step']:08}"
    clean(root)
    if check(folder) is not None:
        if folder.exists():
            set_aside([folder])
        _write(folder, student, state)
    _flush(root)
    _link(root / "last", folder)
    _prune(root, state["step"], keep)
    return folder


def look(source: str | Path) -> Found:
    """The checkpoints of a run folder (or the one that is in a checkpoint folder, or around a file of it), checked."""
    damaged = []
    for folder in _candidates(Path(source).expanduser()):
        reason = check(folder)
        if reason is None:
            return Found(folder, tuple(damaged))
        damaged.append((folder, reason))
    return Found(None, tuple(damaged))


def find(source: str | Path) -> Path | None:
    """The newest good checkpoint of a run folder, or the good one that a folder or file in it is; else None."""
    return look(source).good


def weights_of(source: str | Path) -> str | Path:
    """The student's file in a run or checkpoint; any other source, and a file of weights, unchanged.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
    """
    if Path(source).name == STUDENT:
        return source
    found = look(source)
    if found.good is None and found.damaged:
        raise ValueError(f"{source} has no good checkpoint: {reasons(found)}")
    return source if found.good is None else found.good / STUDENT


def reasons(found: Found) -> str:
    """The damaged checkpoints with what is wrong with them, in a line."""
    return ", ".join(f"{folder} ({reason})" for folder, reason in found.damaged)


def check(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None where all its bytes are those that were written."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        digests = _digests(folder)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except UnicodeDecodeError:
        return f"{SUMS} is no text"
    wrong = [name for name, digest in digests.items() if written.get(name) != digest]
    sizes = ", ".join(f"{name} of {(folder / name).stat().st_size} bytes" for name in wrong)
    return f"not the checksum in {SUMS}: {sizes}" if wrong else None


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for one that was renamed."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def clean(root: Path) -> None:
    """Deletes what a crash left half-written; called by the one process that writes."""
    for path in root.glob(f"*{_NEW}"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def set_aside(folders: Iterable[Path]) -> None:
    """Renames damaged checkpoints, which are looked at no more; training deletes them when it has passed their step."""
    for folder in folders:
        aside = folder.with_name(folder.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def load_state(folder: Path) -> dict:
    """The training state saved beside the student, on the CPU. Never runs code from the file; ValueError if it asks."""
    from fastkd.models.reading import read_pickle

    return read_pickle(folder / STATE, mapped=False)


def load_student(folder: Path, student: nn.Module) -> None:
    """Copies the saved student weights into `student`, strictly."""
    from fastkd.models.reading import read_file

    student.load_state_dict(read_file(folder / STUDENT)[0])


def save_student(student: nn.Module, path: Path) -> None:
    """Writes a student so that `fastkd.models` can rebuild it from the file alone."""
    from fastkd.models import VisionTransformer
    from fastkd.models import save as save_vit
    from fastkd.models.classifiers import save_classifier

    (save_vit if isinstance(student, VisionTransformer) else save_classifier)(student, path)


def export(student: nn.Module, path: Path) -> str:
    """Writes a timm checkpoint of the student; the line of Python that loads it."""
    from fastkd.models import VisionTransformer, export_timm
    from fastkd.models.classifiers import save_classifier

    line = (export_timm if isinstance(student, VisionTransformer) else save_classifier)(student, path)
    _flush(path)
    _flush(path.parent)
    return line


def _candidates(source: Path) -> list[Path]:
    """What may be checkpoints, newest first."""
    if source.is_symlink():
        source = source.resolve()
    if source.is_file():
        return [source.parent.resolve()] if source.name in (STUDENT, STATE, SUMS) else []
    root = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if not root.is_dir():
        return []
    steps = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    copy = root / "last"  # no link where a run was copied without links
    others = [path for path in (copy, source) if (path / STATE).exists() and not path.is_symlink()]
    return sorted(steps, key=step_of, reverse=True) + others


def _write(folder: Path, student: nn.Module, state: dict) -> None:
    fresh = folder.with_name(folder.name + _NEW)
    try:
        fresh.mkdir(parents=True)
        save_student(student, fresh / STUDENT)
        _save_state(state, fresh / STATE)
        with ThreadPoolExecutor(1) as pool:  # read back while the disk still writes
            digests = pool.submit(_digests, fresh)
            _flush(fresh / STUDENT)
            _flush(fresh / STATE)
        lines = [f"{digest}  {name}\n" for name, digest in digests.result().items()]
        (fresh / SUMS).write_text("".join(lines))
        _flush(fresh / SUMS)
        _flush(fresh)
        os.replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # what a full disk needs first is room
        raise


def _save_state(state: dict, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's own complaint that its file is incomplete hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of both files, side by side."""
    names = STUDENT, STATE
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(_digest, [folder / name for name in names])))


def _digest(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _link(link: Path, folder: Path) -> None:
    """Lets `last` point to a checkpoint; a file system without links does without."""
    fresh = link.with_name(link.name + _NEW)
    with contextlib.suppress(OSError):
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        fresh.symlink_to(folder.name)
        os.replace(fresh, link)


def _prune(root: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints up to a step, and damaged ones that training has passed."""
    past = {path: int(match[1]) for path in root.iterdir() if (match := _FOLDER.match(path.name))}
    past = sorted((path for path in past if past[path] <= step), key=past.get)
    good = [path for path in past if step_of(path) is not None]
    for path in past:
        if path not in good[-keep:]:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
