"""``fastkd distill --method kd``: any timm pair, any classic loss."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from fastkd.train.config import ConfigError

from ._classifier import PairConfig, build_pair, finish

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class KDConfig(PairConfig):
    """Distil an image classifier from another one by a classic loss on logits or features."""

    SHARDS_TEACHER: ClassVar[bool] = True

    method: Literal["kd"] = "kd"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    loss: str = "kd"
    """On logits: kd, dkd, nkd, jsd, reverse_kl, tvd, dist, standardized_kd, logit_cosine; on features: hint, at, sp,
    rkd, pkt, crd. With --teacher none: cross entropy alone, which makes a teacher."""
    weight: float = 1.0
    """Weight of that loss."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels beside it."""
    label_smoothing: float = 0.0
    """Label smoothing of that cross entropy."""
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers that the loss takes, such as: --options temperature 4 beta 2."""

    def problems(self) -> list[str]:
        found = super().problems()
        for argument in ("weight", "ce_weight"):
            self._need(found, argument, getattr(self, argument) >= 0, "at least 0")
        self._need(found, "label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, KDConfig]:
        from fastkd.methods.kd import KD

        student, teacher, config = build_pair(self)
        try:
            method = KD(
                student, teacher, self.loss, taps=self.taps(), weight=self.weight, ce_weight=self.ce_weight,
                label_smoothing=self.label_smoothing, img_size=config.img_size, in_chans=config.in_chans,
                **self.options,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise ConfigError([str(error)]) from error
        return finish(method, config, device)
