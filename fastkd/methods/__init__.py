"""Distillation methods, one file each."""

from ._method import Method
from .dmae import DMAE
from .kd import KD
from .maskalign import MaskAlign
from .mic import MaskedImageConsistency
from .nkd import NKD
from .promptkd import PromptedCLIP, PromptKD, PromptStudent, PromptTuning
from .scalekd import ScaleKD
from .self_distillation import FurtherPretrainer
from .self_distillation_text import TextFurtherPretrainer
from .uskd import USKD

__all__ = [
    "DMAE",
    "FurtherPretrainer",
    "KD",
    "MaskAlign",
    "MaskedImageConsistency",
    "Method",
    "NKD",
    "PromptKD",
    "PromptStudent",
    "PromptTuning",
    "PromptedCLIP",
    "ScaleKD",
    "TextFurtherPretrainer",
    "USKD",
]
