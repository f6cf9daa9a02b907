"""Demo of USKD: a network without a teacher learns digits from 60 labels.

Controls: cross entropy, cross entropy with smoothed labels (which could explain a gain: USKD's labels are smooth, too),
and an untrained student; USKD comes with both rules for the order of the other classes. All see the same pictures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.methods.kd import KD
from fastkd.methods.uskd import USKD

from .classifiers import accuracy, digits, fit, network
from .compare import Arm, Claim, CompareConfig, compare, tune

CE, SMOOTH, LOG, PROB, UNTRAINED = "CE", "CE, smoothed labels", "USKD", "USKD, rank by probability", "untrained"
# Chosen by --tune.
CHOSEN: dict[str, dict[str, float]] = {
    CE: dict(lr=0.005),
    SMOOTH: dict(lr=0.005, label_smoothing=0.1),
    LOG: dict(lr=0.01, alpha=0.1, beta=0.1, mu=0.1),
    PROB: dict(lr=0.005, alpha=0.1, beta=0.1, mu=0.1),
}
RATES = (5e-3, 1e-2)
WEIGHTS = ((1.0, 0.1, 0.005), (0.1, 0.1, 0.1))
CANDIDATES: dict[str, list[dict[str, float]]] = {
    CE: [dict(lr=lr) for lr in (2e-3, 5e-3, 1e-2, 2e-2)],
    SMOOTH: [dict(lr=lr, label_smoothing=s) for lr in RATES for s in (0.1, 0.3)],
    LOG: [dict(lr=lr, alpha=a, beta=b, mu=m) for lr in RATES for a, b, m in WEIGHTS],
    PROB: [dict(lr=lr, alpha=a, beta=b, mu=m) for lr in RATES for a, b, m in WEIGHTS],
}


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """A network without a teacher learns digits from 60 labels: CE, smoothed labels, USKD."""

    out: Path = Path("runs/demo_uskd")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    each: int = 6
    """Labelled pictures of each digit."""
    steps: int = 400
    """Steps of 64 pictures."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and USKD is no worse than CE."""
    if config.quick:
        config.steps = 3
    study = Study(config)
    if config.tune:
        return tune("uskd", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["accuracy"], config)
    arms = [Arm(name, functools.partial(study.run, name, CHOSEN.get(name, {}))) for name in (*CHOSEN, UNTRAINED)]
    return compare(
        "uskd", arms, config, baseline=CE, settings=dict(each=config.each, steps=config.steps, chosen=CHOSEN),
        claims=[Claim(LOG, CE, -0.005)], title="digits, 60 labels",
    )  # fmt: skip


class Study:
    """The arms. By seed they share pictures, initial weights, batches and flips."""

    width = 32

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Held-out accuracy of one arm."""
        student, data, setting = network(self.width, seed), digits(seed, self.config.each), dict(setting)
        if arm != UNTRAINED:
            lr = setting.pop("lr")
            if arm in (LOG, PROB):
                rule = "log" if arm == LOG else "prob"
                method = USKD(student, **setting, rank_score=rule, img_size=8, in_chans=1)
            else:
                method = KD(student, None, **setting)
            images, labels = data.images[: data.labelled], data.labels[: data.labelled]
            fit(method, images, labels, steps=self.config.steps, lr=lr, seed=seed)
        return {"accuracy": accuracy(student, data)}
