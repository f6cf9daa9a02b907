"""``fastkd distill --method nkd`` and ``--method uskd``: normalised distillation, with a teacher and without one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from fastkd.train.config import ConfigError

from ._classifier import ClassifierConfig, PairConfig, build_pair, finish

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class NKDConfig(PairConfig):
    """Distil an image classifier from another one by the normalised loss NKD."""

    SHARDS_TEACHER: ClassVar[bool] = True

    method: Literal["nkd"] = "nkd"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    temperature: float = 1.0
    """Of the classes other than the target; 1 on ImageNet, 3 on CIFAR-100."""
    gamma: float = 1.5
    """Weight of these classes; 1.5 on ImageNet (1 for ViTs), 3.5 on CIFAR-100."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels beside it."""

    def problems(self) -> list[str]:
        found = super().problems()
        self._need(found, "temperature", self.temperature > 0, "a positive number")
        self._need(found, "teacher", self.teacher != "none", "a teacher", "--method uskd needs none")
        self._need(found, "student_taps", not self.student_taps, "none", "NKD compares logits")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, NKDConfig]:
        from fastkd.methods.nkd import NKD

        student, teacher, config = build_pair(self)
        try:
            options = dict(temperature=self.temperature, gamma=self.gamma, ce_weight=self.ce_weight)
            method = NKD(student, teacher, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError([str(error)]) from error
        return finish(method, config, device)


@dataclasses.dataclass(kw_only=True)
class USKDConfig(ClassifierConfig):
    """Train an image classifier with soft labels of its own making, USKD: no teacher."""

    method: Literal["uskd"] = "uskd"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    tap: str = ""
    """Where the weak head's feature is taken: path of a submodule, or index of a block or stage; default half of the
    depth of a ViT, else the last stage but one."""
    alpha: float = 1.0
    """Weight of the target's soft label; 1 on ImageNet, 0.1 on CIFAR-100."""
    beta: float = 0.1
    """Weight of the other classes."""
    mu: float = 0.005
    """Weight of the weak head's own loss; 0.005 on ImageNet, 0.1 on CIFAR-100."""
    rank_score: Literal["log", "prob"] = "log"
    """How classes are ranked: as released, by log-probabilities, or by probabilities, as the paper says it."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""

    def build(self, device: torch.device) -> tuple[nn.Module, USKDConfig]:
        from fastkd.methods.uskd import USKD

        student, _, config = build_pair(self)
        tap = int(self.tap) if self.tap.lstrip("-").isdigit() else self.tap or None
        options = {name: getattr(self, name) for name in ("alpha", "beta", "mu", "rank_score", "ce_weight")}
        try:
            method = USKD(student, tap=tap, img_size=config.img_size, in_chans=config.in_chans, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError([str(error)]) from error
        return finish(method, config, device)
