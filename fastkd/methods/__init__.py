"""Distillation methods, one file each."""

from .dmae import DMAE

__all__ = ["DMAE"]
