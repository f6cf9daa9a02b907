"""Checkpoints that are whole or absent: a folder is written aside, flushed to disk, then renamed into place.

* checkpoints/last/student.safetensors    the student; `fastkd.models.load_vit` reads it
* checkpoints/last/train_state.pt         projectors, optimiser, data position: tensors and numbers
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

STUDENT = "student.safetensors"
STATE = "train_state.pt"


def save(folder: Path, student: nn.Module, state: dict) -> None:
    """Replaces the checkpoint in `folder`. A crash at any point leaves the old one or the new one, complete."""
    fresh, previous = _beside(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_student(student, fresh / STUDENT)
    torch.save(state, fresh / STATE)
    for path in (fresh / STUDENT, fresh / STATE, fresh):
        _flush(path)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(fresh, folder)
    _flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def find(source: Path) -> Path | None:
    """The checkpoint that a run folder, ``checkpoints/last`` or a file in it stands for; None where there is none."""
    source = Path(source).expanduser().absolute()  # a name alone has no folder beside which another one could be
    for folder in (source.parent,) if source.is_file() else (source / "checkpoints/last", source):
        for candidate in (folder, _beside(folder)[1]):
            if (candidate / STUDENT).exists() and (candidate / STATE).exists():
                return candidate
    return None


def load_state(folder: Path, device: torch.device | str = "cpu") -> dict:
    """The training state saved beside the student. Never runs code from the file."""
    return torch.load(folder / STATE, map_location=device, weights_only=True)


def load_student(folder: Path, student: nn.Module) -> None:
    """Copies the saved student weights into `student`, strictly."""
    from safetensors.torch import load_file

    student.load_state_dict(load_file(folder / STUDENT))


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

    return (export_timm if isinstance(student, VisionTransformer) else save_classifier)(student, path)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.previous")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
