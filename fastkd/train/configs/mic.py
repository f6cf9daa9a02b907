"""``fastkd distill --method mic``: a classifier for images of a domain that has no labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastkd.train.config import ConfigError, problem

from ._classifier import ClassifierConfig, build_pair, finish

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class MICConfig(ClassifierConfig):
    """Train a classifier on labelled images and on unlabelled ones of the domain where it will be used."""

    method: Literal["mic"] = "mic"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    target: Path
    """Folder of unlabelled images of the other domain (its class folders, if any, are not looked at)."""
    alpha: float = 0.9
    """Share of the average teacher that stays in an update."""
    block_size: int = 64
    """Side of a masked square in pixels."""
    mask_ratio: float = 0.7
    """Probability with which a square is masked."""
    weight: float = 1.0
    """Weight of the consistency loss."""
    confidence: Literal["prob", "none"] = "prob"
    """How the teacher's labels are trusted: by their probability, or all alike."""
    jitter: float = 0.2
    """Strength of the colour jitter in the student's view."""
    blur: float = 0.5
    """Share of blurred images in the student's view."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.target.expanduser().is_dir():
            found.append(problem("target", self.target, "an existing folder of images", "check the path"))
        self._need(found, "alpha", 0 <= self.alpha < 1, "a number in [0, 1)")
        self._need(found, "block_size", self.block_size >= 1, "at least 1")
        self._need(found, "mask_ratio", 0 <= self.mask_ratio <= 1, "a number from 0 to 1")
        self._need(found, "blur", 0 <= self.blur <= 1, "a number from 0 to 1")
        for argument in ("weight", "jitter"):
            self._need(found, argument, getattr(self, argument) >= 0, "at least 0")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, MICConfig]:
        from fastkd.methods.mic import MaskedImageConsistency

        student, _, config = build_pair(self)
        names = ("alpha", "block_size", "mask_ratio", "weight", "confidence", "jitter", "blur")
        options = {name: getattr(self, name) for name in names}
        try:
            method = MaskedImageConsistency(student, task="classification", **options)
        except (ValueError, TypeError) as error:
            raise ConfigError([str(error)]) from error
        return finish(method, config, device)
