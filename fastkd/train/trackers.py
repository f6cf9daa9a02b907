"""TensorBoard and Weights & Biases beside metrics.jsonl: the same rows and pictures, where others are watched."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Protocol

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Gets what a run writes."""

    def add(self, row: dict) -> None:
        """A line of metrics.jsonl."""

    def show(self, picture: Path, step: int) -> None:
        """A PNG of the run's pictures folder."""

    def close(self) -> None:
        """Writes what is still in memory."""


def missing(names: tuple[str, ...]) -> list[str]:
    """Packages that these trackers need and that are not installed."""
    return [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]


def start(names: tuple[str, ...], root: Path, config: dict, step: int) -> list[Tracker]:
    """The trackers of a run that goes on after `step`."""
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](root, config, step) for name in names]


class TensorBoard:
    """Event files in the run's folder ``tensorboard``: ``tensorboard --logdir RUN``."""

    def __init__(self, root: Path, config: dict, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its last checkpoint is written again: the reader drops the first version.
        self._writer = SummaryWriter(root / "tensorboard", purge_step=step + 1 if step else None)

    def add(self, row: dict) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def show(self, picture: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(picture) as image:
            self._writer.add_image(picture.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases named like the run folder, in the project fastkd.

    Its own variables say the rest: WANDB_PROJECT, WANDB_ENTITY, and WANDB_MODE=offline for machines without a network,
    from whose files in the run's folder ``wandb`` ``wandb sync`` uploads later. A resumed run goes on in the same one.
    """

    def __init__(self, root: Path, config: dict, step: int) -> None:
        import wandb

        known = root / "wandb/run_id"
        name = known.read_text() if step and known.exists() else uuid.uuid4().hex[:8]
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(name)
        self._wandb, self._run = wandb, wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastkd"), name=root.resolve().name, id=name, resume="allow",
            dir=str(root), config=config,
        )  # fmt: skip

    def add(self, row: dict) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def show(self, picture: Path, step: int) -> None:
        self._run.log({picture.stem: self._wandb.Image(str(picture))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
