"""Fixed pictures that a run is judged by: held-out losses or accuracy, and the grid of reconstructions."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.data import open_images
from fastkd.methods.dmae import DMAE

from .config import ConfigError, DistillConfig, RunConfig
from .track import LOSSES, RunFolder

logger = logging.getLogger("fastkd")
PICTURES = 6  # rows of the grid


class HeldOut:
    """Centre crops of held-out images, each with a fixed mask; without --val-data a few training images to draw."""

    def __init__(self, config: DistillConfig, method: DMAE, device: torch.device, amp: torch.dtype | None) -> None:
        self.config, self.method, self.device, self.amp = config, method, device, amp
        self.images, _, _ = crops(config, config.val_images if config.val_data else PICTURES)
        generator = torch.Generator().manual_seed(config.seed)
        self.noise = torch.rand(len(self.images), method.student.num_patches, generator=generator)

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float) -> None:
        """Adds a line with the mean held-out losses to metrics.jsonl; nothing without --val-data."""
        if self.config.val_data is None:
            return
        total = torch.zeros(len(LOSSES))
        for images, noise in zip(self.images.split(self.config.batch_size), self.noise.split(self.config.batch_size)):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                result = self.method(images.to(self.device), self.config.mask_ratio, noise.to(self.device))
            total += torch.stack([result[name].float() for name in LOSSES]).cpu() * len(images)
        means = dict(zip([f"val_{name}" for name in LOSSES], (total / len(self.images)).tolist()))
        _tell(run, step, epoch, means)

    def draw(self, run: RunFolder) -> None:
        """Writes loss curves, reconstructions where pixels are learnt, and with a teacher likeness of features."""
        from .plots import feature_similarity, loss_curves, reconstruction

        loss_curves(run.metrics(), LOSSES[1:], run.pictures / "loss_curves.png")
        images, student = self.images[:PICTURES].to(self.device), self.method.student
        if self.config.reconstruct:
            reconstruction(student, images, self.config.mask_ratio, run.pictures / "reconstruction.png")
        teacher = self.method.teacher
        if teacher is not None and not teacher.sharded:  # one process alone draws, and has no whole teacher then
            ours, theirs = self.method.patch_features(images)[-1]
            feature_similarity(images, ours, theirs, student.grid, run.pictures / "feature_similarity.png")


class HeldOutLosses:
    """Losses of a method that needs no labels, on centre crops of held-out images, where --val-data names some.

    Args:
        config: of the run: `val_data`, `val_images`, `img_size`, `batch_size` and `seed` count.
        method: what trains.
        device: where it is.
        amp: dtype of autocast; None computes in the dtype of the weights.
    """

    def __init__(self, config: RunConfig, method: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
        self.config, self.method, self.device, self.amp = config, method, device, amp
        if config.val_data is not None:
            self.images, _, _ = crops(config, config.val_images)
            self.keys = torch.arange(len(self.images)) + config.seed

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float) -> None:
        """Adds a line with the mean held-out losses to metrics.jsonl; nothing without --val-data."""
        if self.config.val_data is None:
            return
        names = self.method.losses
        was_training, total = self.method.training, torch.zeros(len(names))
        self.method.eval()
        for images, keys in zip(self.images.split(self.config.batch_size), self.keys.split(self.config.batch_size)):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                result = self.method(images.to(self.device), keys.to(self.device))
            total += torch.stack([result[name].float() for name in names]).cpu() * len(images)
        self.method.train(was_training)
        _tell(run, step, epoch, dict(zip([f"val_{name}" for name in names], (total / len(self.images)).tolist())))

    def draw(self, run: RunFolder) -> None:
        """Writes the loss curves."""
        from .plots import loss_curves

        loss_curves(run.metrics(), self.method.losses, run.pictures / "loss_curves.png")


class HeldOutClasses:
    """Cross entropy and accuracy of a classifier on centre crops of held-out images, where --val-data names some.

    Arguments as in `HeldOutLosses`.
    """

    def __init__(self, config: RunConfig, method: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
        self.config, self.method, self.device, self.amp = config, method, device, amp
        if config.val_data is not None:
            self.images, labels, classes = crops(config, config.val_images)
            own = getattr(method, "classes", None) or open_images(config.data).classes
            unknown = sorted(set(classes) - set(own))
            if unknown or not classes:
                got = f"classes {', '.join(unknown)}" if unknown else "no class folders"
                raise ConfigError([f"--val-data: got {got}, expected those of --data: {', '.join(own)}"])
            self.labels = torch.tensor([own.index(classes[label]) for label in labels])

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float) -> None:
        """Adds a line with val_loss and val_accuracy to metrics.jsonl; nothing without --val-data."""
        if self.config.val_data is None:
            return
        student = self.method.student
        was_training, logits = student.training, []
        student.eval()
        for images in self.images.split(self.config.batch_size):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                logits.append(student(self.method.prepare(images.to(self.device))).float().cpu())
        student.train(was_training)
        logits = torch.cat(logits)
        accuracy = (logits.argmax(1) == self.labels).float().mean().item()
        _tell(run, step, epoch, dict(val_loss=F.cross_entropy(logits, self.labels).item(), val_accuracy=accuracy))

    def draw(self, run: RunFolder) -> None:
        """Writes the loss curves."""
        from .plots import loss_curves

        names = [*self.method.losses, *(["accuracy"] if self.config.val_data else [])]
        loss_curves(run.metrics(), names, run.pictures / "loss_curves.png")


def crops(config: RunConfig, wanted: int) -> tuple[Tensor, list[int], list[str]]:
    """Centre crops uint8 [N, H, W, C] of so many readable held-out (else training) images, labels, class names."""
    try:
        folder = open_images(config.val_data or config.data)
    except (OSError, ValueError) as error:
        raise ConfigError([f"--val-data: {error}"]) from error
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = [], []
    for index in torch.randperm(len(folder), generator=generator).tolist():
        if len(images) < wanted:
            with contextlib.suppress(Exception):  # an unreadable file: take the next one
                images.append(folder.center_crop(index, config.img_size, config.in_chans))
                labels.append(folder.labels[index])
    if not images:
        raise ConfigError([f"--{'val-data' if config.val_data else 'data'}: {folder.root}: no image can be read"])
    return torch.from_numpy(np.stack(images)), labels, folder.classes


def _tell(run: RunFolder, step: int, epoch: float, means: dict[str, float]) -> None:
    run.add(dict(step=step, epoch=epoch, **means))
    logger.info("step %d, held out: %s", step, ", ".join(f"{k[4:]} {v:.4g}" for k, v in means.items()))
