"""The training loop of ``fastkd distill``, ``pretrain`` and ``finetune``: read `_train` from top to bottom."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

from .config import RunConfig, problem
from .distributed import Processes, processes
from .history import TrainingError
from .host import keep_memory, same_bits
from .interrupt import Interrupt
from .resume import how_to_go_on
from .session import Session

__all__ = ["Result", "TrainingError", "distill"]


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        run: the run folder.
        step: optimiser steps done.
        finished: False where it was interrupted; the same call resumes it.
        exported: the student as a timm checkpoint (None while unfinished).
        signal: number of the signal that stopped it, 0 for none.
    """

    run: Path
    step: int
    finished: bool
    exported: Path | None
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """Of a command: 0 finished, 128 + signal stopped (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1)."""
        return 128 + self.signal if self.signal and not self.finished else 0


def distill(config: RunConfig) -> Result:
    """Trains a student; continues where the run folder holds an unfinished run.

    Under torchrun every process calls this with the same config.

    Raises:
        ConfigError: wrong arguments, all at once.
        TrainingError: the loss is not finite any more, or the end of the run could not be written.
    """
    problems = config.problems()
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(problem("device", config.device, "cpu or auto: torch sees no CUDA device here"))
    keep_memory()
    meeting = ("cpu",) if problems else (config.device, config.timeout_minutes, lambda: how_to_go_on(config.out))
    with processes(*meeting) as group:
        group.check(problems, config.as_dict())
        with same_bits(group.device):
            return _train(config, group)


def _train(config: RunConfig, group: Processes) -> Result:
    session = Session(config, group)
    config, run = session.config, session.run
    with (
        session.reporter,
        Interrupt(echo=10.0 if group.world_size > 1 else 0.0) as interrupt,
        contextlib.closing(iter(session.loader)) as batches,
        contextlib.closing(run),
        group.guard(),
    ):
        session.begin()
        stop = group.agreed(interrupt.pressed)
        while session.step < config.steps and not stop:
            session.advance(batches)
            last = session.step == config.steps
            if last or session.history.filled >= config.log_every:
                session.report()  # here alone the host waits for the device
            if last or session.step % config.val_every == 0:
                session.evaluate()
            if session.save_is_due():
                session.save()
            stop = group.agreed(interrupt.pressed)
        session.end()
    finished = session.step >= config.steps
    return Result(run.root, session.step, finished, run.exported if finished else None, stop)
