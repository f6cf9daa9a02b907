"""``fastkd distill --method scalekd``: a Swin, ViT or BEiT teaches a classifier of any kind through its features."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from fastkd.train.config import ConfigError

from ._classifier import PairConfig, build_pair, finish

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class ScaleKDConfig(PairConfig):
    """Distil an image classifier from a vision transformer through features, ScaleKD."""

    method: Literal["scalekd"] = "scalekd"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    ce_weight: float = 0.5
    """Weight of the cross entropy with the labels."""
    kd_weight: float = 0.5
    """Weight of the cross entropy with the teacher's probabilities."""
    alpha: tuple[float, float] = (0.08, 0.06)
    """Weights of the feature losses, with and without the mean of each channel."""
    tail_blocks: int | None = None
    """Last blocks of a ViT that teach by their weights; default a quarter of the depth."""
    perception: bool = True
    """Whether the teacher's last stage takes part; --no-perception is cheaper."""

    def problems(self) -> list[str]:
        found = super().problems()
        for argument in ("ce_weight", "kd_weight"):
            self._need(found, argument, getattr(self, argument) >= 0, "at least 0")
        self._need(found, "alpha", min(self.alpha) >= 0, "two numbers of at least 0")
        self._need(found, "teacher", self.teacher != "none", "a Swin, ViT or BEiT")
        self._need(found, "teacher_taps", not self.teacher_taps, "none", "the teacher's structure tells where")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, ScaleKDConfig]:
        from fastkd.methods.scalekd import ScaleKD

        student, teacher, config = build_pair(self)
        names = ("ce_weight", "kd_weight", "alpha", "tail_blocks", "perception")
        options = {name: getattr(self, name) for name in names}
        try:
            method = ScaleKD(student, teacher, img_size=config.img_size, in_chans=config.in_chans, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError([str(error)]) from error
        return finish(method, config, device)
