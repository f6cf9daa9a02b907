"""What configs of image classifiers share: options, and building student and teacher from names and files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.train.config import ConfigError, RunConfig, problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastkd.data import ImageSource


@dataclasses.dataclass(kw_only=True)
class ClassifierConfig(RunConfig):
    """A classifier that learns on class folders: the first folder level of --data is the class."""

    data: Path
    """Folder of images, where the first folder level is the class; or .tar archives, or what fastkd pack wrote of
    them."""
    val_data: Path | None = None
    """Folder of held-out images in the same class folders: their accuracy (centre crops) goes to metrics.jsonl."""
    student: str
    """What learns: a timm name, or a run or checkpoint of fastkd to start from."""
    student_checkpoint: Path | None = None
    """Weights to start from, for a timm name."""
    student_pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded; the head is new."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image that a random crop covers, smallest and largest."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    blr: float = 5e-4
    """Base learning rate: the peak is blr * effective batch / 256."""
    cuda_graph: bool = False
    """Run the training step as one CUDA graph where one process trains on a GPU."""

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("student_checkpoint", "teacher_checkpoint"):
            path = getattr(self, name, None)
            self._need(found, name, path is None or path.expanduser().is_file(), "an existing file")
        if self.student_pretrained and self.student_checkpoint is not None:
            self._need(found, "student_checkpoint", False, "one of it and --student-pretrained")
        return found

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from fastkd.train.held_out import HeldOutClasses

        return HeldOutClasses(self, method, device, amp)

    def summary(self, method: nn.Module) -> str:
        millions = sum(p.numel() for p in method.student.parameters()) / 1e6
        teacher = getattr(self, "teacher", "none")
        return f"{self.method}: student {self.student} ({millions:.1f} M parameters), teacher {teacher}"


@dataclasses.dataclass(kw_only=True)
class PairConfig(ClassifierConfig):
    """A classifier that learns from another one."""

    teacher: str
    """What teaches: a timm name (weights are downloaded unless --teacher-checkpoint has them), a run or checkpoint of
    fastkd, or none. It must know the classes of --data, in the order of their sorted names."""
    teacher_checkpoint: Path | None = None
    """Weights of a teacher by timm name."""
    student_taps: tuple[str, ...] = ()
    """Where the student's features are taken: paths of submodules, or indices of blocks or stages."""
    teacher_taps: tuple[str, ...] = ()
    """Their partners in the teacher."""

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.student_taps) != len(self.teacher_taps):
            self._need(found, "teacher_taps", False, f"{len(self.student_taps)} places, as many as --student-taps")
        return found

    def taps(self) -> dict[str, tuple[str | int, ...]] | None:
        """Both sides' places, indices as numbers; None where none are given."""
        if not self.student_taps:
            return None
        sides = dict(student=self.student_taps, teacher=self.teacher_taps)
        return {side: tuple(int(p) if p.lstrip("-").isdigit() else p for p in here) for side, here in sides.items()}


def class_folders(config: ClassifierConfig) -> tuple[list[str], list[str]]:
    """Classes of the training images, and what is wrong with them."""
    from fastkd.data import open_images

    try:
        folder = open_images(config.data)
    except (OSError, ValueError) as error:
        return [], [f"--data: {error}"]
    return folder.classes, not_in_classes("data", folder, 2)


def not_in_classes(argument: str, folder: ImageSource, least: int) -> list[str]:
    """What is wrong with class folders: too few of them, or images outside; empty where nothing is."""
    loose = sum(label < 0 for label in folder.labels)
    if len(folder.classes) >= least and not loose:
        return []
    got = f"{len(folder.classes)} class folders" + (f" and {loose} images outside of them" if loose else "")
    expected = "every image in one of two or more class folders" if least > 1 else "every image in a class folder"
    return [problem(argument, got, expected)]


def build_pair(config: ClassifierConfig) -> tuple[nn.Module, nn.Module | None, ClassifierConfig]:
    """Student, teacher (None without) and the config with image size and precision resolved; all problems at once."""
    import torch

    from fastkd.models.classifiers import load_classifier
    from fastkd.train.build import EXPECTED, weights_of

    classes, problems = class_folders(config)
    shape = dict(num_classes=len(classes) or None, in_chans=config.in_chans, img_size=config.img_size)
    torch.manual_seed(config.seed)
    models: dict[str, nn.Module | None] = {"teacher": None}
    for side in ("student", "teacher"):
        source = getattr(config, side, "none")
        if source == "none":
            continue
        own = getattr(config, f"{side}_checkpoint", None)
        # A student's pretrained weights belong to another head, a teacher's must fit as they are.
        pretrained = config.student_pretrained if side == "student" else own is None
        try:
            models[side] = load_classifier(weights_of(source), checkpoint=own, pretrained=pretrained, **shape)
        except EXPECTED as error:
            problems.append(f"--{side}: {error}")
    if problems:
        raise ConfigError(problems)
    return (
        models["student"],
        models["teacher"],
        dataclasses.replace(config, img_size=image_size(config.img_size, models["student"], models["teacher"])),
    )


def image_size(size: int | tuple[int, int] | None, *models: nn.Module | None) -> tuple[int, int]:
    """The size that was given, or what the first model that knows says of itself, or 224."""
    for model in models:
        known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if size is None and known is not None:
            size = tuple(known[1:])
    size = size or 224
    return (size, size) if isinstance(size, int) else tuple(size)


def finish(method: nn.Module, config: ClassifierConfig, device: torch.device) -> tuple[nn.Module, ClassifierConfig]:
    """The method on its device in training mode, and the config with the precision resolved."""
    from fastkd.train.build import choose_amp

    return method.to(device).train(), dataclasses.replace(config, amp=choose_amp(config.amp, device))
