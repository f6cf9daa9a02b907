"""Demo of masked image consistency: a segmentation that moves to a domain without labels.

Scenes are put together from real pictures of Fashion-MNIST, four garments of one style each (`outfits.py`). The source
domain has labels; the target domain has none, half the contrast, and noise. Does learning from masked target images
give more than the same pseudo-labels without masks, or than masks without pseudo-labels?
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.mic import MaskedImageConsistency
from fastkd.train.optimizer import adamw, set_lr

from .compare import Arm, Claim, CompareConfig, Metric, compare, tune
from .outfits import CLASSES, Scenes, scenes
from .pictures import embedded
from .training import seeded

UNTRAINED, SOURCE, MASKED_SOURCE, PLAIN, MIC, ORACLE = (
    "untrained", "source only", "masked source", "pseudo-labels", "MIC", "target labels",
)  # fmt: skip
# Chosen by --tune.
CHOSEN: dict[str, dict[str, Any]] = {
    UNTRAINED: dict(),
    SOURCE: dict(lr=3e-3),
    MASKED_SOURCE: dict(lr=3e-3, block_size=8, mask_ratio=0.7),
    PLAIN: dict(lr=3e-3, weight=0.3, threshold=0.968),
    MIC: dict(lr=3e-3, weight=1.0, block_size=8, mask_ratio=0.5),
    ORACLE: dict(lr=3e-3),
}
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    SOURCE: [dict(lr=1e-3), dict(lr=3e-3)],
    MASKED_SOURCE: [dict(lr=3e-3, block_size=8, mask_ratio=ratio) for ratio in (0.5, 0.7)],
    PLAIN: [
        *(dict(lr=3e-3, weight=weight) for weight in (0.1, 0.3, 1.0)),
        dict(lr=3e-3, weight=0.3, threshold=0.968),
    ],
    MIC: [
        dict(lr=3e-3, weight=1.0, block_size=8, mask_ratio=0.5),
        dict(lr=3e-3, weight=1.0, block_size=8, mask_ratio=0.7),
        dict(lr=3e-3, weight=1.0, block_size=4, mask_ratio=0.5),
        dict(lr=3e-3, weight=1.0, block_size=8, mask_ratio=0.5, threshold=0.968),
    ],
}
MIOU = Metric("miou", "target mIoU, %")
ON_SOURCE = Metric("source_miou", "source mIoU, %")


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """Segment garments in a domain without labels, with and without masked image consistency."""

    out: Path = Path("runs/demo_mic")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    steps: int = 600
    """Steps of 16 scenes of each domain."""
    warmup: int = 300
    """Steps on the source alone, before there is a teacher worth asking."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and masked image consistency gained what it must."""
    if config.quick:
        config.steps, config.warmup = 4, 2
    study = Study(config)
    if config.tune:
        return tune("mic", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["miou"], config)
    arms = [Arm(name, functools.partial(study.run, name, CHOSEN[name])) for name in CHOSEN]
    claims = [Claim(MIC, SOURCE, 0.05, MIOU.key), *(Claim(MIC, arm, 0.0, MIOU.key) for arm in (MASKED_SOURCE, PLAIN))]
    return compare(
        "mic", arms, config, baseline=SOURCE, settings=dict(steps=config.steps, warmup=config.warmup, chosen=CHOSEN),
        metrics=(MIOU, ON_SOURCE), claims=claims, title="clean scenes -> scenes of low contrast with noise",
    )  # fmt: skip


class Network(nn.Module):
    """A small U-Net of about 100,000 weights: grey [B, 1, H, W] -> logits [B, classes, H / 2, W / 2].

    Groups are normalised, not batches: statistics of the batch would adapt to the target by themselves.
    """

    mean, std = (0.5,), (0.25,)

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.to_half, self.to_quarter = _conv(1, width, 2), _conv(width, 2 * width, 2)
        self.to_eighth = nn.Sequential(_conv(2 * width, 3 * width, 2), _conv(3 * width, 3 * width))
        self.up_quarter, self.up_half = _conv(5 * width, 2 * width), _conv(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        half = self.to_half(images)
        quarter = self.to_quarter(half)
        x = F.interpolate(self.to_eighth(quarter), scale_factor=2)
        x = F.interpolate(self.up_quarter(torch.cat((x, quarter), 1)), scale_factor=2)
        return self.head(self.up_half(torch.cat((x, half), 1)))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()
    )


class Study:
    """The arms. All share the scenes and, by seed, initial weights and batches."""

    batch_size = 16

    def __init__(self, config: Config) -> None:
        self.config = config
        train, test = embedded()
        half, few = len(train.labels) // 2, 8 if config.quick else None
        # No picture is seen in two of the parts.
        self.source = scenes(train.subset(slice(0, half)), few or 1000, shifted=False, seed=1)
        self.target = scenes(train.subset(slice(half, None)), few or 1000, shifted=True, seed=2)
        self.held_out = scenes(test, few or 500, shifted=True, seed=3)
        self.held_out_source = scenes(test, few or 500, shifted=False, seed=4)

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """mIoU of the student on held-out scenes of both domains."""
        with seeded(seed):
            student = Network(len(CLASSES))
        if arm != UNTRAINED:
            self._train(arm, student, seed, **setting)
        return {"miou": mean_iou(student, self.held_out), "source_miou": mean_iou(student, self.held_out_source)}

    def _train(self, arm: str, student: Network, seed: int, lr: float, weight: float = 1.0, **options: Any) -> None:
        """AdamW, linear warm-up over a tenth of the steps, linear decay over the second half."""
        options = dict(block_size=8, mask_ratio=0.0 if arm == PLAIN else 0.5, threshold=0.8) | options
        masked = "source" if arm == MASKED_SOURCE else "target"
        method = MaskedImageConsistency(student, 0.99, weight=weight, masked=masked, **options).train()
        optimizer, random = adamw(student, lr, weight_decay=0.01), torch.Generator().manual_seed(seed)
        steps = self.config.steps
        with seeded(seed):  # masks and views
            for step in range(steps):
                set_lr(optimizer, lr * min(1, (step + 0.5) / (0.1 * steps), 2 * (1 - step / steps)))
                images, labels, others, their_labels = self._batch(random)
                if arm == ORACLE:
                    images, labels = others, their_labels
                consistent = step >= self.config.warmup and arm in (MASKED_SOURCE, PLAIN, MIC)
                result = method(images, labels, others if consistent else None)
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
                method.after_step(step + 1)

    def _batch(self, random: torch.Generator) -> tuple[Tensor, ...]:
        """Images and labels of the source, then of the target; the same in every arm."""
        parts = []
        for domain in (self.source, self.target):
            index = torch.randint(len(domain.images), (self.batch_size,), generator=random)
            parts += [domain.images[index], domain.labels[index]]
        return tuple(parts)


@torch.no_grad()
def mean_iou(student: Network, part: Scenes) -> float:
    """Intersection over union of each class over all pixels, then its mean over the classes, in [0, 1]."""
    student.eval()
    count, size = len(CLASSES), part.labels.shape[1:]
    confusion = torch.zeros(count, count)
    for images, labels in zip(part.images.split(100), part.labels.split(100)):
        pixels = (images.permute(0, 3, 1, 2) / 255 - student.mean[0]) / student.std[0]
        found = F.interpolate(student(pixels), size=size, mode="bilinear", align_corners=False).argmax(1)
        pairs = labels.long() * count + found
        confusion += pairs.flatten().bincount(minlength=count**2).view(count, count)
    both = confusion.diag()
    return (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean().item()
