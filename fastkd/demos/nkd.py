"""Demo of NKD: a small network learns digits from 60 labels, and from a larger network on 1,137 pictures without label.

The larger network knows all labels, so it brings pictures as well as opinions. Controls that could explain a gain away:
cross entropy on the same 1,197 pictures with the teacher's answers as labels, KD and DKD with settings chosen as NKD's
are, cross entropy on all true labels, and an untrained student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.methods.kd import KD
from fastkd.methods.nkd import NKD
from fastkd.models.frozen import Frozen

from .classifiers import MLP, accuracy, digits, fit, network
from .compare import Arm, Claim, CompareConfig, compare, tune

CE, ANSWERS, KD_, DKD, NKD_, TRUTH, UNTRAINED, TEACHER = (
    "CE", "CE, teacher's answers", "KD", "DKD", "NKD", "CE, all labels", "untrained", "teacher",
)  # fmt: skip
# Chosen by --tune.
CHOSEN: dict[str, dict[str, float]] = {
    CE: dict(lr=0.005),
    ANSWERS: dict(lr=0.01),
    TRUTH: dict(lr=0.01),
    KD_: dict(lr=0.01, temperature=4.0),
    DKD: dict(lr=0.01, temperature=1.0, beta=0.5),
    NKD_: dict(lr=0.01, temperature=1.0, gamma=1.5),
}
RATES = (5e-3, 1e-2)
CANDIDATES: dict[str, list[dict[str, float]]] = {
    CE: [dict(lr=lr) for lr in RATES],
    ANSWERS: [dict(lr=lr) for lr in RATES],
    TRUTH: [dict(lr=lr) for lr in RATES],
    KD_: [dict(lr=lr, temperature=t) for lr in RATES for t in (1.0, 4.0)],
    DKD: [dict(lr=lr, temperature=t, beta=b) for lr in RATES for t, b in ((1.0, 0.5), (4.0, 2.0))],
    NKD_: [dict(lr=lr, temperature=t, gamma=g) for lr in RATES for t, g in ((1.0, 1.5), (3.0, 3.5))],
}


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """A small network learns digits from 60 labels, and from a larger network: CE, KD, DKD, NKD."""

    out: Path = Path("runs/demo_nkd")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    each: int = 6
    """Labelled pictures of each digit."""
    steps: int = 300
    """Steps of 64 pictures."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and NKD gains what the teacher's pictures are worth."""
    if config.quick:
        config.steps = 3
    study = Study(config)
    if config.tune:
        return tune("nkd", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["accuracy"], config)
    names = (*CHOSEN, UNTRAINED, TEACHER)
    arms = [Arm(name, functools.partial(study.run, name, CHOSEN.get(name, {}))) for name in names]
    return compare(
        "nkd", arms, config, baseline=CE, settings=dict(each=config.each, steps=config.steps, chosen=CHOSEN),
        claims=[Claim(NKD_, CE, 0.07), Claim(NKD_, ANSWERS, -0.01)], title="digits, 60 labels",
    )  # fmt: skip


class Study:
    """The arms. By seed they share the split, the teacher, initial weights, and batches of equal sets of pictures."""

    width, teacher_width = 32, 128

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = functools.lru_cache(maxsize=2)(lambda seed: digits(seed, config.each))
        self.teacher = functools.lru_cache(maxsize=2)(self._teacher)

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Held-out accuracy of one arm."""
        student = network(self.width, seed)
        if arm == TEACHER:
            student = self.teacher(seed)[0]
        elif arm != UNTRAINED:
            self._train(arm, dict(setting), student, seed)
        return {"accuracy": accuracy(student, self.data(seed))}

    def _train(self, arm: str, setting: dict[str, Any], student: MLP, seed: int) -> None:
        data, lr = self.data(seed), setting.pop("lr")
        teacher, answers = self.teacher(seed)
        images, target = data.images, torch.cat((data.labels[: data.labelled], answers[data.labelled :]))
        if arm == CE:
            images, target = images[: data.labelled], target[: data.labelled]
        elif arm == TRUTH:
            target = data.labels
        if arm in (CE, ANSWERS, TRUTH):
            method = KD(student, None)
        elif arm == NKD_:
            method = NKD(student, Frozen(teacher), **setting)
        else:
            method = KD(student, Frozen(teacher), "kd" if arm == KD_ else "dkd", **setting)
        fit(method, images, target, steps=self.config.steps, lr=lr, seed=seed)

    def _teacher(self, seed: int) -> tuple[MLP, Tensor]:
        """A wider network, trained on all labels and noisy pictures, and its answers."""
        data, teacher = self.data(seed), network(self.teacher_width, seed + 1000)
        steps = self.config.steps
        fit(KD(teacher, None), data.images, data.labels, steps=steps, lr=2e-3, seed=seed + 1000, noise=0.1)
        with torch.no_grad():
            return teacher, teacher.eval()(data.images).argmax(1)
