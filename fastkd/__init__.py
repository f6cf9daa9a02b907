"""fastkd: fast knowledge distillation."""

from fastkd.ops import backend

__version__ = "0.1.0"
__all__ = ["__version__", "backend"]
