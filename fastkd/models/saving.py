"""Saves our models: one `.safetensors` file with the tensors and, as metadata, the constructor arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .mae import MaskedAutoencoderViT
from .vit import VisionTransformer

METADATA = "fastkd"
_ARGUMENTS = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
              "init_values", "no_embed_class", "norm_eps", "mean", "std")  # fmt: skip
_DECODER_ARGUMENTS = ("decoder_embed_dim", "decoder_num_heads", "norm_pix_loss", "decoder")


def describe(model: VisionTransformer) -> dict[str, Any]:
    """Constructor arguments of a model, JSON-ready, with ``final_norm`` where it lacks one."""
    config = {name: getattr(model, name) for name in _ARGUMENTS}
    config["class_token"] = model.cls_token is not None
    config["reg_tokens"] = 0 if model.reg_token is None else model.reg_token.shape[1]
    config["final_norm"] = isinstance(model.norm, nn.LayerNorm)
    if isinstance(model, MaskedAutoencoderViT):
        config |= {name: getattr(model, name) for name in _DECODER_ARGUMENTS}
        config["decoder_depth"] = len(model.decoder_blocks)
    return config


def encoder(model: VisionTransformer, depth: int | None = None) -> VisionTransformer:
    """The encoder alone, up to `depth` blocks (then without the final norm); it shares the storage of `model`."""
    config = {
        name: value for name, value in describe(model).items() if "decoder" not in name and name != "norm_pix_loss"
    }
    final_norm = config.pop("final_norm")
    with torch.device("meta"):
        result = VisionTransformer(**config, residual_dtype=model.residual_dtype)
    if depth is not None:
        result.truncate(depth)
    elif not final_norm:
        result.norm = nn.Identity()
    names = result.state_dict().keys()
    result.load_state_dict({name: p for name, p in model.state_dict().items() if name in names}, assign=True)
    return result.train(model.training)


def save(model: VisionTransformer, path: str | Path) -> Path:
    """Writes a model with its configuration; `load_vit` reads it back.

    Args:
        model: encoder or masked autoencoder.
        path: file to write, ``.safetensors``. It appears complete or not at all (written aside, then renamed).

    Returns:
        The path.
    """
    check_vit("save", model)
    return write_safetensors(model.state_dict(), path, describe(model))


def write_safetensors(
    state: dict[str, Tensor], path: str | Path, config: dict[str, Any], notes: dict[str, str] | None = None
) -> Path:
    """Writes tensors with our config, and further notes, as metadata; atomic. OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save: path: got {path}, expected a name that ends in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {METADATA: json.dumps({"format": 1, "config": config}), "format": "pt", **(notes or {})}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, part, metadata)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def check_vit(op: str, model: object, kind: type[VisionTransformer] = VisionTransformer) -> None:
    """TypeError unless model is one of our models."""
    if not isinstance(model, kind):
        hint = "; pass its .student" if hasattr(model, "student") else ""
        raise TypeError(f"{op}: model: got {type(model).__name__}, expected a fastkd.models.{kind.__name__}{hint}")
