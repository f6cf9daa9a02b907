"""Distillation methods, one file each."""

from .dmae import DMAE
from .kd import KD

__all__ = [
    "DMAE",
    "KD",
]
