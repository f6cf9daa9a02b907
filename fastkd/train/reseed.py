"""Random numbers of a training step as a function of what the step is, not of what ran before it."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def reseed(device: torch.device, seed: int, step: int, rank: int = 0) -> None:
    """Seeds everything that code in a step may draw from: `random`, `numpy.random` and torch, on the CPU and `device`.

    Called before each step, it makes a checkpoint whole without the state of any generator: after a restart, on every
    rank, and in whatever library draws (augmentation on the fly, dropout, stochastic depth), step n is the same step n.
    Some thirty microseconds on the host. CUDA graphs take part: a replay reads seed and offset of the device's default
    generator anew.

    Args:
        seed: of the run.
        step: any number that differs from step to step.
        rank: processes draw apart from each other.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    python, numpy, cpu, gpu = (int.from_bytes(digest[start : start + 4], "little") for start in range(0, 16, 4))
    random.seed(python)
    np.random.seed(numpy)
    # Not torch.manual_seed, which asks every accelerator and, where CUDA was not used yet, takes a stack trace.
    torch.default_generator.manual_seed(cpu)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(gpu)
