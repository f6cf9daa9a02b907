"""Processes that train together, forked from one that has already imported everything."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastkd.train.launch import launch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fastkd.train.loop", "fastkd.train.plots", "fastkd.cli", "timm"])


class Ended(NamedTuple):
    """How a process ended: its exit code, and what it printed."""

    code: int
    output: str


def slurm(rank: int, job: int, count: int = 2) -> dict[str, str]:
    """What srun gives to a process of a step on this machine."""
    return dict(
        SLURM_JOB_ID=str(job), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(count), SLURM_NTASKS=str(count),
        SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_NODELIST="localhost,node[001-003,007]",
    )  # fmt: skip


def run_together(target: Callable[..., object], *arguments, count: int = 2, seconds: float = 150) -> list[Ended]:
    """Calls ``target(rank, *arguments)`` in each of `count` processes, as srun starts them; what became of them."""
    job = _free_job()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(count)]
        together = [
            _context.Process(target=_start, args=(slurm(rank, job, count), log, target, rank, *arguments))
            for rank, log in enumerate(logs)
        ]
        for process in together:
            process.start()
        for process in together:
            process.join(seconds)
        hanging = [process for process in together if process.exitcode is None]
        for process in hanging:
            process.kill()
            process.join()
        ended = [Ended(process.exitcode, log.read_text()) for process, log in zip(together, logs)]
    assert not hanging, f"got a process that hangs: {ended}"
    return ended


def _start(environment: dict[str, str], log: Path, target: Callable[..., object], *arguments) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stderr.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    target(*arguments)


def _free_job() -> int:
    """A job number whose port nobody uses."""
    while True:
        job = random.randrange(10**6)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", int(launch(slurm(0, job)).meeting.split(":")[-1])))
            except OSError:
                continue
        return job
