"""Distillation methods, one file each."""

from .dmae import DMAE
from .kd import KD
from .self_distillation import FurtherPretrainer
from .self_distillation_text import TextFurtherPretrainer

__all__ = [
    "DMAE",
    "FurtherPretrainer",
    "KD",
    "TextFurtherPretrainer",
]
