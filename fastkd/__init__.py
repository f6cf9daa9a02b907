"""fastkd: fast knowledge distillation.

Submodules and the names of `fastkd.ops` are imported on first use, so that ``import fastkd`` costs nothing and the
command line answers at once.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["__version__", "backend"]

_SUBMODULES = ("data", "methods", "models", "nn", "ops", "train")


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastkd.{name}")
    if not name.startswith("_"):
        ops = importlib.import_module("fastkd.ops")
        if name in ops.__all__:
            return getattr(ops, name)
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
