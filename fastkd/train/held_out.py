"""Fixed pictures that a run is judged by: held-out losses or accuracy, and the grid of reconstructions."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.data import ImageSource, open_images
from fastkd.evaluation.extract import CenterCrops
from fastkd.evaluation.scores import Score, ranking, score, write_json
from fastkd.methods.dmae import DMAE

from .build import choose_workers
from .config import ConfigError, DistillConfig, RunConfig
from .track import LOSSES, RunFolder

logger = logging.getLogger("fastkd")
PICTURES = 6  # rows of the grid
FEW = 1024  # images that are decoded once and kept; more are decoded anew for every evaluation


class HeldOut:
    """Centre crops of held-out images, each with a fixed mask; without --val-data a few training images to draw."""

    def __init__(self, config: DistillConfig, method: DMAE, device: torch.device, amp: torch.dtype | None) -> None:
        self.config, self.method, self.device, self.amp = config, method, device, amp
        self.images, _, _ = crops(config, config.val_images if config.val_data else PICTURES)
        generator = torch.Generator().manual_seed(config.seed)
        self.noise = torch.rand(len(self.images), method.student.num_patches, generator=generator)

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float, prefix: str = "val") -> None:
        """Adds a line with the mean held-out losses to metrics.jsonl; nothing without --val-data."""
        if self.config.val_data is None:
            return
        total = torch.zeros(len(LOSSES))
        for images, noise in zip(self.images.split(self.config.batch_size), self.noise.split(self.config.batch_size)):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                result = self.method(images.to(self.device), self.config.mask_ratio, noise.to(self.device))
            total += torch.stack([result[name].float() for name in LOSSES]).cpu() * len(images)
        means = dict(zip([f"{prefix}_{name}" for name in LOSSES], (total / len(self.images)).tolist()))
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
    def evaluate(self, run: RunFolder, step: int, epoch: float, prefix: str = "val") -> None:
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
        _tell(run, step, epoch, dict(zip([f"{prefix}_{name}" for name in names], (total / len(self.images)).tolist())))

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
        if config.val_data is None:
            return
        folder = _open(config)
        self.classes = getattr(method, "classes", None) or open_images(config.data).classes
        unknown = sorted(set(folder.classes) - set(self.classes))
        loose = sum(label < 0 for label in folder.labels)
        if unknown or loose:
            got = f"classes {', '.join(unknown)}" if unknown else f"{loose} images outside of class folders"
            raise ConfigError([f"--val-data: got {got}, expected those of --data: {', '.join(self.classes)}"])
        self.labels = torch.tensor([self.classes.index(folder.classes[label]) for label in folder.labels])
        indices = _some(folder, config)
        # All cores: other processes wait meanwhile.
        workers = choose_workers(config.workers, device.type == "cuda") if len(indices) > FEW else 0
        self.crops = CenterCrops(
            folder, config.img_size, config.batch_size, channels=config.in_chans, indices=indices, workers=workers
        )
        self._kept = list(self.crops) if len(indices) <= FEW else None
        if self._kept == []:
            raise ConfigError([f"--val-data: {folder.root}: no image can be read"])

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float, prefix: str = "val") -> None:
        """Adds a line with val_loss, val_accuracy and, of many classes, val_top5 to metrics.jsonl, with --val-data."""
        if self.config.val_data is not None:
            self.judge(run, step, epoch, prefix)

    def judge(self, run: RunFolder, step: int, epoch: float, prefix: str = "val") -> Score:
        """`evaluate`, and what it found."""
        student = self.method.student
        was_training, loss, ranked, seen = student.training, 0.0, [], []
        student.eval()
        for images, indices in self._kept or self.crops:
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                logits = student(self.method.prepare(images.to(self.device))).float().cpu()
            loss += F.cross_entropy(logits, self.labels[indices], reduction="sum").item()
            ranked.append(ranking(logits))
            seen.append(indices)
        student.train(was_training)
        found = score(torch.cat(ranked), self.labels[torch.cat(seen)], self.classes)
        values = dict(loss=loss / found.images, accuracy=found.top1, top5=found.top5)
        _tell(run, step, epoch, {f"{prefix}_{name}": value for name, value in values.items() if value is not None})
        return found

    def draw(self, run: RunFolder) -> None:
        """Writes the loss curves."""
        from .plots import loss_curves

        names = [*self.method.losses, *(["accuracy"] if self.config.val_data else [])]
        loss_curves(run.metrics(), names, run.pictures / "loss_curves.png")


class FinalClasses(HeldOutClasses):
    """`HeldOutClasses` that leaves a result.json in the run folder after the last step."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._final: dict[str, dict] = {}  # by prefix: of the weights, and of their average where there is one

    @torch.no_grad()
    def evaluate(self, run: RunFolder, step: int, epoch: float, prefix: str = "val") -> None:
        if self.config.val_data is None:
            return
        found = self.judge(run, step, epoch, prefix)
        if step < self.config.steps:
            return
        name = f"{prefix}_accuracy"
        best = max((row for row in run.metrics() if name in row), key=lambda row: row[name])
        self._final[prefix] = {**found.as_dict(), "best": dict(top1=best[name], step=best["step"])}
        result = dict(
            format="fastkd-finetune", version=1, **self._final["val"], ema=self._final.get("val_ema"), step=step,
            unreadable=len(self.crops.failures), classes=self.classes,
        )  # fmt: skip
        write_json(result, run.root / "result.json")
        low, high = found.interval
        logger.info(
            "%s: top-1 %.2f %% (95 %% interval %.2f to %.2f) of %d held-out images; best during the run %.2f %% at "
            "step %d", "averaged weights" if prefix == "val_ema" else "last weights",
            100 * found.top1, 100 * low, 100 * high, found.images, 100 * best[name], best["step"],
        )  # fmt: skip


def crops(config: RunConfig, wanted: int) -> tuple[Tensor, list[int], list[str]]:
    """Centre crops uint8 [N, H, W, C] of so many readable held-out (else training) images, labels, class names."""
    folder = _open(config)
    images, labels = [], []
    for index in _shuffled(folder, config):
        if len(images) < (wanted or len(folder)):
            with contextlib.suppress(Exception):  # an unreadable file: take the next one
                images.append(folder.center_crop(index, config.img_size, config.in_chans))
                labels.append(folder.labels[index])
    if not images:
        raise ConfigError([f"--{'val-data' if config.val_data else 'data'}: {folder.root}: no image can be read"])
    return torch.from_numpy(np.stack(images)), labels, folder.classes


def _open(config: RunConfig) -> ImageSource:
    try:
        return open_images(config.val_data or config.data)
    except (OSError, ValueError) as error:
        raise ConfigError([f"--val-data: {error}"]) from error


def _shuffled(folder: ImageSource, config: RunConfig) -> list[int]:
    return torch.randperm(len(folder), generator=torch.Generator().manual_seed(config.seed)).tolist()


def _some(folder: ImageSource, config: RunConfig) -> list[int]:
    """The --val-images images that are judged; all of them in order for 0."""
    return _shuffled(folder, config)[: config.val_images] if config.val_images else list(range(len(folder)))


def _tell(run: RunFolder, step: int, epoch: float, means: dict[str, float]) -> None:
    run.add(dict(step=step, epoch=epoch, **means))
    logger.info("step %d, held out: %s", step, ", ".join(f"{k[4:]} {v:.4g}" for k, v in means.items()))
