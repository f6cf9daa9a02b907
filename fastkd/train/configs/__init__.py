"""Methods that ``fastkd distill --method NAME`` knows: a config each, which says how its model is built.

A config imports nothing heavy until `build`, so that wrong arguments are answered at once.
"""

from __future__ import annotations

import importlib

# name: (where its config is, one line about it)
METHODS = {
    "dmae": ("fastkd.train.config:DistillConfig", "a masked-autoencoder ViT from any ViT, without labels"),
    "kd": ("fastkd.train.configs.kd:KDConfig", "any timm classifier from any other by a classic loss (--loss)"),
    "maskalign": (
        "fastkd.train.configs.maskalign:MaskAlignConfig",
        "a ViT from any ViT that sees more, without labels",
    ),
    "mic": ("fastkd.train.configs.mic:MICConfig", "a classifier for a domain without labels, from its own average"),
    "nkd": ("fastkd.train.configs.nkd:NKDConfig", "any timm classifier from any other by the normalised loss"),
    "promptkd": ("fastkd.train.configs.promptkd:PromptKDConfig", "the prompts of a CLIP from those of a larger one"),
    "scalekd": ("fastkd.train.configs.scalekd:ScaleKDConfig", "any timm classifier from the features of a Swin or ViT"),
    "selfdist": ("fastkd.train.configs.selfdist:SelfDistillationConfig", "a masked autoencoder, further, from itself"),
    "uskd": ("fastkd.train.configs.nkd:USKDConfig", "a classifier with soft labels of its own making, no teacher"),
}


def config_of(name: str) -> type:
    """The config class of a method."""
    module, attribute = METHODS[name][0].split(":")
    return getattr(importlib.import_module(module), attribute)
