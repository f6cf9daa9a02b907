"""Where fine-tuning starts: a timm classifier with the weights of an encoder, or of another classifier."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoints import UNTRAINED, load_vit
from .classifiers import TIMM, is_classifier, load_classifier, new_timm
from .export import timm_arguments, timm_statistics
from .saving import encoder
from .vit import VisionTransformer

logger = logging.getLogger("fastkd")

HEAD_STD = 2e-5  # of a new head's weights, as published for fine-tuning after MAE


def classifier_to_finetune(
    source: str | Path,
    classes: Sequence[str],
    *,
    pool: str = "avg",
    drop_path: float = 0.0,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """A timm classifier of these classes, ready to be trained and saved by `save_classifier`.

    Args:
        source: a classifier file that fastkd wrote, which keeps its head where that has the same classes; any ViT that
            `load_vit` reads (a masked autoencoder loses its decoder); or another timm name. Names stand for their
            pretrained weights, ``untrained:NAME`` for random ones.
        classes: names, in the order of the labels.
        pool: what the new head of a ViT reads, ``"avg"``: mean of the patch tokens, through a new LayerNorm, or
            ``"token"``: class token after the encoder's norm. Other models and classifier files have their own.
        drop_path: rate of stochastic depth in the last block, linear from 0 in the first one.
        img_size: side or (height, width); position tables are resized. Default the source's own.
        in_chans: of a model by timm name that is no plain ViT.
        checkpoint: file of weights for `source`, a timm name.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: see `load_vit` and `load_classifier`.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if is_classifier(source):
        model = _again(load_classifier(source), classes, drop_path, size)
    elif checkpoint is not None:
        model = load_classifier(
            source, num_classes=len(classes), in_chans=in_chans, img_size=size, checkpoint=checkpoint, new_head=True,
            drop_path=drop_path,
        )  # fmt: skip
    else:
        model = _from_name_or_vit(source, classes, pool, drop_path, size, in_chans)
    model.classes = list(classes)
    return model


def _from_name_or_vit(source, classes, pool: str, drop_path: float, size, in_chans: int) -> nn.Module:
    try:
        vit = load_vit(source, img_size=size)
    except (ValueError, TypeError):  # a timm model of another kind?
        name = str(source).removeprefix(UNTRAINED)
        if Path(name).expanduser().exists() or not _in_timm(name):
            raise
        return load_classifier(
            name, num_classes=len(classes), in_chans=in_chans, img_size=size, pretrained=name == source,
            drop_path=drop_path,
        )  # fmt: skip
    return vit_classifier(vit, len(classes), pool, drop_path)


def vit_classifier(vit: VisionTransformer, num_classes: int, pool: str = "avg", drop_path: float = 0.0) -> nn.Module:
    """The encoder as a timm ViT with a new head; see `classifier_to_finetune`."""
    name, arguments = timm_arguments(vit, pool)
    arguments |= dict(num_classes=num_classes, pretrained_cfg_overlay=timm_statistics(vit))
    state = encoder(vit).state_dict()
    if pool == "avg":  # timm then norms behind the pooling, by a norm that is new
        arguments = {key: value for key, value in arguments.items() if key not in ("fc_norm", "final_norm")}
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    if vit.norm_eps != 1e-6:
        logger.info("LayerNorms go on with timm's epsilon 1e-6 instead of %g", vit.norm_eps)
    model = new_timm(name, arguments, drop_path=drop_path)
    unfilled = set(model.load_state_dict(state, strict=False).missing_keys)
    expected = {"head.weight", "head.bias", *(("fc_norm.weight", "fc_norm.bias") if pool == "avg" else ())}
    if unfilled != expected:
        raise ValueError(f"encoder: got no {', '.join(sorted(unfilled - expected))}, which timm's {name} needs")
    nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
    return model


def _again(old: nn.Module, classes: Sequence[str], drop_path: float, size: tuple[int, int] | None) -> nn.Module:
    """The classifier of a file with another drop path, image size and, where the classes differ, another head."""
    name, arguments = getattr(old, TIMM)
    model = new_timm(name, arguments, drop_path=drop_path)
    model.load_state_dict(old.state_dict())
    same = old.classes == list(classes) if old.classes else old.num_classes == len(classes)
    changed: dict[str, Any] = {} if same else {"num_classes": len(classes)}
    if not same:
        model.reset_classifier(len(classes))
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
        changed["img_size"] = list(size)
    overlay = arguments.get("pretrained_cfg_overlay")
    if size is not None and overlay:
        changed["pretrained_cfg_overlay"] = {**overlay, "input_size": [overlay["input_size"][0], *size]}
    setattr(model, TIMM, (name, {**arguments, **changed}))
    return model


def _in_timm(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)
