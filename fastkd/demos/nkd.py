"""Demo of NKD: a small network learns Fashion-MNIST from labels, and from a larger network, by four losses.

Teacher and students see the same labelled pictures, so nothing but the teacher's opinion is added. Controls: cross
entropy with smoothed labels, cross entropy with the teacher's answers in place of the labels, an untrained student, KD
and DKD with settings chosen as NKD's are. With ``--labels 100`` a few of the pictures alone have a label, for
``CE``; in the other arms all others carry the teacher's answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.methods.kd import KD
from fastkd.methods.nkd import NKD
from fastkd.models.frozen import Frozen

from . import pictures
from .classifiers import ConvNet, accuracy, fit, logits_of, network, normalised
from .compare import Arm, Claim, CompareConfig, compare, tune

CE, SMOOTH, ANSWERS, KD_, DKD, NKD_, UNTRAINED, TEACHER = (
    "CE", "CE, smoothed labels", "CE, teacher's answers", "KD", "DKD", "NKD", "untrained", "teacher",
)  # fmt: skip
# Chosen by --tune.
CHOSEN: dict[str, dict[str, float]] = {
    CE: dict(lr=3e-2),
    SMOOTH: dict(lr=3e-2, label_smoothing=0.1),
    ANSWERS: dict(lr=3e-2),
    KD_: dict(lr=3e-2, temperature=4.0),
    DKD: dict(lr=3e-2, temperature=4.0, beta=2.0),
    NKD_: dict(lr=3e-2, temperature=1.0, gamma=1.5),
}
RATES = (1e-2, 3e-2)
CANDIDATES: dict[str, list[dict[str, float]]] = {
    CE: [dict(lr=lr) for lr in (5e-3, 1e-2, 2e-2, 3e-2)],
    SMOOTH: [dict(lr=lr, label_smoothing=s) for lr in RATES for s in (0.1, 0.2)],
    ANSWERS: [dict(lr=lr) for lr in (5e-3, 1e-2, 2e-2, 3e-2)],
    KD_: [dict(lr=lr, temperature=t) for lr in RATES for t in (1.0, 4.0)],
    DKD: [dict(lr=lr, temperature=t, beta=b) for lr in RATES for t, b in ((1.0, 0.5), (4.0, 2.0))],
    NKD_: [dict(lr=lr, temperature=t, gamma=g) for lr in RATES for t, g in ((1.0, 1.5), (3.0, 3.5))],
}


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """A small network learns Fashion-MNIST alone and from a larger one: CE, KD, DKD, NKD."""

    out: Path = Path("runs/demo_nkd")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    pictures: int = 2000
    """Training pictures, at most 6,000."""
    labels: int = 2000
    """How many of them have a label; the others get the teacher's answer."""
    steps: int = 200
    """Steps of 64 pictures; the teacher takes twice as many."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and NKD is no worse than CE."""
    if config.quick:
        config.steps = 3
    study = Study(config)
    if config.tune:
        return tune("nkd", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["accuracy"], config)
    arms = [
        Arm(name, functools.partial(study.run, name, CHOSEN.get(name, {}))) for name in (*CHOSEN, UNTRAINED, TEACHER)
    ]
    settings = {name: getattr(config, name) for name in ("pictures", "labels", "steps")}
    return compare(
        "nkd", arms, config, baseline=CE, settings={**settings, "chosen": CHOSEN}, claims=[Claim(NKD_, CE, 0.0)],
        title=f"Fashion-MNIST, {config.pictures} pictures",
    )  # fmt: skip


class Study:
    """The arms. By seed they share pictures, teacher, initial weights, batches and flips."""

    student_width, teacher_width = 4, 16

    def __init__(self, config: Config) -> None:
        self.config = config
        train, test = pictures.embedded()
        self.images, self.test_images = normalised(train, test)
        self.labels, self.test_labels = train.labels, test.labels
        self.teacher = functools.lru_cache(maxsize=2)(self._teacher)

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Held-out accuracy of one arm."""
        student = network(self.student_width, seed)
        if arm == TEACHER:
            student = self.teacher(seed)[0]
        elif arm != UNTRAINED:
            self._train(arm, dict(setting), student, seed)
        return {"accuracy": accuracy(student, self.test_images, self.test_labels)}

    def _train(self, arm: str, setting: dict[str, Any], student: nn.Module, seed: int) -> None:
        index, labelled = self._split(seed)
        lr = setting.pop("lr")
        if arm in (CE, SMOOTH):
            method, target = KD(student, None, **setting), self.labels[index]
            index, target = index[labelled], target[labelled]
        else:
            teacher, answers = self.teacher(seed)
            target = torch.where(labelled, self.labels[index], answers)
            if arm == ANSWERS:
                method, target = KD(student, None), answers
            elif arm == NKD_:
                method = NKD(student, Frozen(teacher), **setting)
            else:
                method = KD(student, Frozen(teacher), "kd" if arm == KD_ else "dkd", **setting)
        fit(method, self.images[index], target, steps=self.config.steps, lr=lr, seed=seed)

    def _split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the training pictures, and which of them have a label."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        index = order[: self.config.pictures]
        return index, torch.arange(len(index)) < self.config.labels

    def _teacher(self, seed: int) -> tuple[ConvNet, Tensor]:
        """A wider network, trained on the labels of all pictures, and its answers on them."""
        index, _ = self._split(seed)
        teacher = network(self.teacher_width, seed + 1000)
        fit(
            KD(teacher, None),
            self.images[index],
            self.labels[index],
            steps=2 * self.config.steps,
            lr=5e-3,
            seed=seed + 1000,
        )
        return teacher, logits_of(teacher, self.images[index]).argmax(1)
