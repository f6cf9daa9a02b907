"""Training: `distill(DistillConfig(...))` is what ``fastkd distill`` runs; its parts serve loops of your own.

Names are imported on first use, so that the command line answers ``--help`` without importing torch.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "ConfigError": "config",
    "DistillConfig": "config",
    "CudaGraphs": "step",
    "HeldOutClasses": "held_out",
    "HeldOutLosses": "held_out",
    "RunConfig": "config",
    "TrainingError": "loop",
    "TrainingStep": "step",
    "adamw": "optimizer",
    "distill": "loop",
    "lr_at": "schedule",
    "param_groups": "optimizer",
    "set_lr": "optimizer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
