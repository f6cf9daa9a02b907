"""Learning-rate schedule of MAE and DMAE: linear warm-up from 0, then half a cosine, per iteration."""

from __future__ import annotations

import math


def lr_at(epoch: float, *, lr: float, min_lr: float = 0.0, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch.

        e < W:   lr * e / W
        else:    min_lr + (lr - min_lr) * (1 + cos(pi * (e - W) / (E - W))) / 2

    Args:
        epoch: e, epochs done so far, 0 <= e <= E.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_epochs: W.
        epochs: E, length of the run.

    A parameter group multiplies the result by its own ``lr_scale``.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs) if epochs > warmup_epochs else 1.0
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
