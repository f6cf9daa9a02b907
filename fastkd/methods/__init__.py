"""Distillation methods, one file each."""

from .dmae import DMAE
from .kd import KD
from .maskalign import MaskAlign

__all__ = [
    "DMAE",
    "KD",
    "MaskAlign",
]
