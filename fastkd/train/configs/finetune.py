"""``fastkd finetune``: any encoder or classifier becomes a classifier of the classes of a folder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from fastkd.train.config import ConfigError

from ._classifier import ClassifierConfig, class_folders, finish, image_size

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class FinetuneConfig(ClassifierConfig):
    """Fine-tune an encoder on class folders: the first folder level of --data is the class.

    fastkd finetune runs/student --data photos/train --val-data photos/val --out runs/classifier

    trains all weights under a new head as published for DMAE's ViT-B (100 epochs of batches of 1024: here --batch-size
    times --accumulate times processes). The result is a timm model; result.json has its accuracy.
    """

    HIDDEN: ClassVar[str] = "method student_pretrained shard_teacher"
    GROUPS: ClassVar[dict[str, str]] = {
        "Where it starts": "student_checkpoint pool",
        "Augmentation": "augment mixup cutmix smoothing erase",
        "Regularisation": "layer_decay drop_path",
    }

    method: Literal["finetune"] = "finetune"
    """What trains the student."""
    student: tyro.conf.Positional[str]
    """What is fine-tuned: a run or checkpoint, of a masked autoencoder, encoder or classifier, or a timm name with its
    pretrained weights (untrained:NAME: random ones)."""
    pool: Literal["avg", "token"] = "avg"
    """What a ViT's new head reads: the mean of the patch tokens through a new LayerNorm, or the class token."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment; none: crop and flip alone, which is also what grey images and --loader dali take."""
    mixup: float = 0.8
    """Alpha of mixup; 0 leaves it out."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 leaves it out. With both, each batch takes one of them."""
    smoothing: float = 0.1
    """Label smoothing."""
    erase: float = 0.25
    """Share of the images in which a rectangle is erased."""
    layer_decay: float = 0.75
    """Factor from each layer's learning rate to that of the layer below; 1: all alike."""
    drop_path: float = 0.15
    """Rate of stochastic depth in the last block, linear from 0 in the first one."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    val_images: int = 0
    """How many of them, at most; 0: all."""

    @property
    def find_unused(self) -> bool:
        return False

    def problems(self) -> list[str]:
        found = super().problems()
        for argument in ("mixup", "cutmix"):
            self._need(found, argument, getattr(self, argument) >= 0, "at least 0")
        self._need(found, "smoothing", 0 <= self.smoothing < 1, "a number in [0, 1)")
        self._need(found, "drop_path", 0 <= self.drop_path < 1, "a number in [0, 1)")
        self._need(found, "erase", 0 <= self.erase <= 1, "a number from 0 to 1")
        self._need(found, "layer_decay", 0 < self.layer_decay <= 1, "a number above 0, at most 1")
        if self.mixup or self.cutmix:
            fix = "images are mixed in pairs; --mixup 0 --cutmix 0 mixes none"
            self._need(found, "batch_size", self.batch_size % 2 == 0, "an even number", fix)
        drawn_on_host = self.mixup or self.cutmix or self.erase
        fix = "a graph would repeat the first mix and the first erased rectangles for ever"
        self._need(found, "cuda_graph", not (self.cuda_graph and drawn_on_host), "--no-cuda-graph", fix)
        for reason, holds in (("grey images", self.in_chans == 1), ("--loader dali", self.loader == "dali")):
            self._need(found, "augment", self.augment == "none" or not holds, f"none with {reason}")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, FinetuneConfig]:
        import torch

        from fastkd.methods.finetune import Finetune
        from fastkd.models.classifiers import TIMM
        from fastkd.models.finetuning import classifier_to_finetune
        from fastkd.train.build import EXPECTED, weights_of

        classes, problems = class_folders(self)
        torch.manual_seed(self.seed)
        try:
            student = classifier_to_finetune(
                weights_of(self.student), classes, pool=self.pool, drop_path=self.drop_path, img_size=self.img_size,
                in_chans=self.in_chans, checkpoint=self.student_checkpoint,
            )  # fmt: skip
        except EXPECTED as error:
            problems.append(f"--student: {error}")
        if problems:
            raise ConfigError(problems)
        channels = getattr(student, TIMM)[1].get("in_chans", 3)
        config = dataclasses.replace(self, img_size=image_size(self.img_size, student), in_chans=channels)
        config.validate()
        try:
            config.augmentation()
        except ValueError as error:
            raise ConfigError([f"--{error}"]) from error
        rates = {name: getattr(self, name) for name in ("mixup", "cutmix", "smoothing", "erase")}
        method = Finetune(student, len(classes), **rates)
        method.classes = classes
        return finish(method, config, device)

    def augmentation(self) -> dict[str, Any]:
        from fastkd.methods.finetune import TrainingView

        if self.augment == "none":
            return super().augmentation()
        return dict(transform=TrainingView(self.img_size, self.scale, self.augment))

    def param_groups(self, method: nn.Module) -> list[dict]:
        from fastkd.methods.finetune import layer_decay_groups

        return layer_decay_groups(method.student, self.weight_decay, self.layer_decay)

    def summary(self, method: nn.Module) -> str:
        millions = sum(p.numel() for p in method.student.parameters()) / 1e6
        return (
            f"fine-tuning {self.student} ({millions:.1f} M parameters) for {len(method.classes)} classes, layer decay "
            f"{self.layer_decay:g}, drop path {self.drop_path:g}"
        )

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from fastkd.train.held_out import FinalClasses

        return FinalClasses(self, method, device, amp)
