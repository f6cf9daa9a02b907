"""Vision transformers, masked autoencoders, teachers and their checkpoints."""

from .checkpoints import load_vit
from .export import export_timm, to_timm, to_transformers
from .frozen import Frozen
from .intact import IntactTeacher
from .mae import MaskedAutoencoderViT, mae_vit
from .saving import save
from .taps import Tapped, Taps
from .teacher import Teacher
from .vit import Features, VisionTransformer

__all__ = [
    "Features",
    "Frozen",
    "IntactTeacher",
    "MaskedAutoencoderViT",
    "Tapped",
    "Taps",
    "Teacher",
    "VisionTransformer",
    "export_timm",
    "load_vit",
    "mae_vit",
    "save",
    "to_timm",
    "to_transformers",
]
