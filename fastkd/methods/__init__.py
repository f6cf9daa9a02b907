"""Distillation methods, one file each."""

from .dmae import DMAE
from .kd import KD
from .maskalign import MaskAlign
from .promptkd import PromptedCLIP, PromptKD, PromptStudent, PromptTuning
from .self_distillation import FurtherPretrainer
from .self_distillation_text import TextFurtherPretrainer

__all__ = [
    "DMAE",
    "KD",
    "MaskAlign",
]
from .scalekd import ScaleKD

__all__ = [
    "DMAE",
    "FurtherPretrainer",
    "KD",
    "ScaleKD",
    "TextFurtherPretrainer",
]
    "FurtherPretrainer",
    "PromptKD",
    "PromptStudent",
    "PromptTuning",
    "PromptedCLIP",
    "TextFurtherPretrainer",
]
