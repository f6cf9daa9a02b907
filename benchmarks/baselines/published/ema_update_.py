"""A mean teacher's update in a loop over its parameters, as most released code has it."""

from __future__ import annotations

from torch import Tensor

from fastkd.ops.weights.ema_update import cut


def published(averaged: Tensor, current: Tensor, alpha: float, pieces: int, steps: int) -> Tensor:
    """Arguments of the spec's function: flat tensors that are cut into parameters."""
    averaged = averaged.clone()
    for _ in range(steps):
        for mean, parameter in zip(cut(averaged, pieces), cut(current, pieces)):
            mean.data[:] = alpha * mean.data[:] + (1 - alpha) * parameter.data[:]
    return averaged
