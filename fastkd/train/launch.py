"""How many processes train together and which one this is: what torchrun, or else SLURM's srun, says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

_FIRST_PORT, _PORTS = 15_000, 15_000  # below those that Linux hands out by itself


class Launch(NamedTuple):
    """The place of a process in its run.

    Attributes:
        rank, world_size: its number and how many there are.
        local_rank: its number on this machine.
        meeting: URL at which torch.distributed brings them together.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meeting: str = "env://"


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads the environment; torchrun's variables win over SLURM's. ``WORLD_SIZE=1`` makes any process stand alone."""
    if "WORLD_SIZE" in environment:
        return Launch(*(int(environment.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    # A batch script and the shell of salloc carry SLURM_NTASKS and SLURM_PROCID, too, but only srun, which starts as
    # many processes, sets the step's number of tasks. Under --pty it gives the terminal to the first of them alone.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or "SLURM_PTY_PORT" in environment:
        return Launch()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    port = environment.get("MASTER_PORT") or _port(int(environment["SLURM_JOB_ID"]), environment.get("SLURM_STEP_ID"))
    numbers = (int(environment[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    return Launch(*numbers, f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first name of a SLURM host list: ``node001`` of ``node[001-003,007],gpu5``."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _port(job: int, step: str | None) -> int:
    """The same in all processes of a job step, and most likely another one in other steps on the same machine."""
    return _FIRST_PORT + (job + 101 * int(step or 0)) % _PORTS
