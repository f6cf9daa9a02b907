"""Accuracy with what belongs to it: its uncertainty, the top 5, and each class by itself."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.files import write_whole

TOP = 5
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclasses.dataclass
class Score:
    """Accuracies in [0, 1].

    Attributes:
        top1: share of images whose class has the highest score.
        top5: share of images whose class is among the five highest; None with five classes or fewer.
        interval: 95 % Wilson interval of top1, (low, high): what the number of images alone leaves open.
        per_class: class name -> top1 of its images; None for a class without images.
        images: how many were judged.
    """

    top1: float
    top5: float | None
    interval: tuple[float, float]
    per_class: dict[str, float | None]
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "interval": list(self.interval)}


def ranking(scores: Tensor) -> Tensor:
    """Classes by score, best first, at most five: [N, C] -> [N, min(5, C)] int64 on the CPU; ties: lowest class."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP].cpu()


def score(ranked: Tensor, labels: Tensor, classes: Sequence[str]) -> Score:
    """Judges a ranking [N, 5] against labels [N] int64, N >= 1."""
    hits = ranked == labels[:, None]
    first = hits[:, 0]
    here = torch.bincount(labels, minlength=len(classes)).tolist()
    right = torch.bincount(labels[first], minlength=len(classes)).tolist()
    images = len(labels)
    return Score(
        top1=int(first.sum()) / images,
        top5=int(hits.any(1).sum()) / images if len(classes) > TOP else None,
        interval=wilson(int(first.sum()), images),
        per_class={name: r / n if n else None for name, r, n in zip(classes, right, here)},
        images=images,
    )


def wilson(right: int, images: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a binomial share, (low, high) within [0, 1]; images >= 1."""
    share, spread = right / images, z * z / images
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Writes results; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results, indent=1) + "\n")
