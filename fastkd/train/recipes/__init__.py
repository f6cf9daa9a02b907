"""Methods that ``fastkd distill --method NAME`` knows: a config each, which says how its model is built.

A config imports nothing heavy until `build`, so that wrong arguments are answered at once.
"""

from __future__ import annotations

import importlib

# name: (where its config is, one line about it)
METHODS = {
    "dmae": ("fastkd.train.config:DistillConfig", "a masked-autoencoder ViT from any ViT, without labels"),
    "kd": ("fastkd.train.recipes.kd:KDConfig", "any timm classifier from any other by a classic loss (--loss)"),
    "maskalign": ("fastkd.train.recipes.maskalign:MaskAlignConfig", "a ViT from any ViT that sees more, without labels"),
    "mic": ("fastkd.train.recipes.mic:MICConfig", "a classifier for a domain without labels, from itself"),
    "selfdist": (
        "fastkd.train.recipes.selfdist:SelfDistillationConfig", "a masked autoencoder, further on your images, from itself",
    ),
}  # fmt: skip


def config_of(name: str) -> type:
    """The config class of a method."""
    module, attribute = METHODS[name][0].split(":")
    return getattr(importlib.import_module(module), attribute)
