"""Fixed pictures that a run is judged by: held-out losses and the grid of reconstructions."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch

from fastkd.data import open_images
from fastkd.methods.dmae import DMAE

from .config import ConfigError, DistillConfig
from .track import LOSSES, RunFolder

logger = logging.getLogger("fastkd")
PICTURES = 6  # rows of the grid


class HeldOut:
    """Centre crops of held-out images, each with a fixed mask; without --val-data a few training images to draw."""

    def __init__(self, config: DistillConfig, method: DMAE, device: torch.device, amp: torch.dtype | None) -> None:
        self.config, self.method, self.device, self.amp = config, method, device, amp
        try:
            folder = open_images(config.val_data or config.data)
        except (OSError, ValueError) as error:
            raise ConfigError([f"--val-data: {error}"]) from error
        generator = torch.Generator().manual_seed(config.seed)
        wanted = config.val_images if config.val_data else PICTURES
        images = []
        for index in torch.randperm(len(folder), generator=generator).tolist():
            if len(images) < wanted:
                with contextlib.suppress(Exception):  # an unreadable file: take the next one
                    images.append(folder.center_crop(index, config.img_size, config.in_chans))
        if not images:
            raise ConfigError([f"--{'val-data' if config.val_data else 'data'}: {folder.root}: no image can be read"])
        self.images = torch.from_numpy(np.stack(images))
        self.noise = torch.rand(len(images), method.student.num_patches, generator=generator)

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
        run.add(dict(step=step, epoch=epoch, **means))
        logger.info("step %d, held out: %s", step, ", ".join(f"{k[4:]} {v:.4g}" for k, v in means.items()))

    def draw(self, run: RunFolder) -> None:
        """Writes loss_curves.png and, where pixels are learnt, reconstruction.png."""
        from .plots import loss_curves, reconstruction

        loss_curves(run.metrics(), run.root / "loss_curves.png")
        if self.config.reconstruct:
            images = self.images[:PICTURES].to(self.device)
            reconstruction(self.method.student, images, self.config.mask_ratio, run.root / "reconstruction.png")
