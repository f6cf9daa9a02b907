"""Writes our models for others: timm and transformers, with the same features."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from torch import nn

from .layouts import transformers_name
from .mae import MaskedAutoencoderViT
from .saving import check_vit, describe, encoder, write_safetensors
from .vit import VisionTransformer

# timm's names for the standard sizes: (patch, width, blocks, heads) that the name alone stands for.
TIMM_NAMES = {
    "vit_tiny_patch16_224": (16, 192, 12, 3),
    "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}
TIMM_DEFAULTS = dict(img_size=224, in_chans=3, mlp_ratio=4.0, qkv_bias=True, class_token=True, reg_tokens=0,
                     init_values=None, no_embed_class=False)  # fmt: skip


def timm_arguments(model: VisionTransformer, global_pool: str | None = None) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which `timm.create_model` makes this model's architecture, without a classifier.

    Args:
        model: an encoder, or a masked autoencoder, whose decoder has no place in timm.
        global_pool: what timm's forward returns: ``"avg"`` of the patch tokens, ``"token"`` (CLS) or ``""`` (all
            tokens); all after the final norm. Default avg, as usual after MAE pre-training.
    """
    config = describe(model)
    pool = "avg" if global_pool is None else global_pool
    if pool not in ("avg", "token", "") or (pool == "token" and not config["class_token"]):
        raise ValueError(f"export: global_pool: got {pool!r}, expected 'avg', 'token' (with a CLS token) or ''")
    name = next((n for n, shape in TIMM_NAMES.items() if shape[1] == config["embed_dim"]), "vit_base_patch16_224")
    defaults = TIMM_DEFAULTS | dict(zip(("patch_size", "embed_dim", "depth", "num_heads"), TIMM_NAMES[name]))
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": pool}
    if pool == "avg":
        arguments["fc_norm"] = False  # timm would move the norm behind the pooling
    for key, default in defaults.items():
        value = config[key]
        value = value[0] if isinstance(value, tuple) and value[0] == value[1] else value
        if value != default:
            arguments[key] = value
    if not config["final_norm"]:
        arguments["final_norm"] = False
    return name, arguments


def to_timm(model: VisionTransformer, global_pool: str | None = None) -> nn.Module:
    """The encoder as a `timm.models.VisionTransformer` with equal features, its weights loaded strictly.

    Args:
        model: encoder or masked autoencoder.
        global_pool: what timm's forward returns: ``"avg"`` of the patch tokens (default), ``"token"`` (CLS) or ``""``
            (all tokens); after the final norm.
    """
    check_vit("to_timm", model)
    timm = _package("timm", "to_timm")
    name, arguments = timm_arguments(model, global_pool)
    if model.norm_eps != 1e-6:
        arguments["norm_layer"] = functools.partial(nn.LayerNorm, eps=model.norm_eps)
    result = timm.create_model(name, pretrained_cfg_overlay=timm_statistics(model), **arguments)
    parameter = model.patch_embed.proj.weight
    result.load_state_dict(encoder(model).state_dict(), strict=True)
    return result.to(parameter.device, parameter.dtype).train(model.training)


def _package(name: str, op: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{op}: got no package {name}, expected it installed; run: pip install {name}"
        ) from error


def timm_statistics(model: VisionTransformer) -> dict[str, Any]:
    """What timm's data config needs to prepare images as this model expects them."""
    return {"mean": model.mean, "std": model.std, "input_size": (model.in_chans, *model.img_size)}


def export_timm(model: VisionTransformer, path: str | Path, global_pool: str | None = None) -> str:
    """Writes the encoder as a `.safetensors` that timm loads.

    Args:
        model: encoder or masked autoencoder.
        path: file to write; it appears complete or not at all.
        global_pool: as in `to_timm`.

    Returns:
        The Python expression that loads the file with timm; the file's metadata has it too, under ``"timm"``. It
        needs ``import timm``, and ``functools`` and ``torch`` where the norms' epsilon is not timm's.
    """
    check_vit("export_timm", model)
    name, arguments = timm_arguments(model, global_pool)
    written = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if model.norm_eps != 1e-6:
        written += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={model.norm_eps})"
    statistics = timm_statistics(model)
    line = f"timm.create_model({name!r}, checkpoint_path={str(path)!r}{written}, pretrained_cfg_overlay={statistics!r})"
    alone = encoder(model)
    write_safetensors(alone.state_dict(), path, describe(alone), {"timm": line})
    return line


def to_transformers(model: MaskedAutoencoderViT, mask_ratio: float = 0.75) -> nn.Module:
    """The masked autoencoder as a `transformers.ViTMAEForPreTraining` with equal predictions and loss.

    Args:
        model: with a CLS token, square images and patches, without registers or layer scale, decoder ``"self"``.
        mask_ratio: goes into the config; transformers masks by it.

    Raises:
        ValueError: an architecture that ViTMAE has no place for.
    """
    check_vit("to_transformers", model, MaskedAutoencoderViT)
    config = describe(model)
    problems = {
        "no CLS token": not config["class_token"], "register tokens": config["reg_tokens"] > 0,
        "layer scale": config["init_values"] is not None, "no position for the CLS token": config["no_embed_class"],
        "oblong images": config["img_size"][0] != config["img_size"][1],
        "oblong patches": config["patch_size"][0] != config["patch_size"][1],
        "no final norm": not config["final_norm"], "decoder='cross'": config["decoder"] != "self",
        "qkv without bias": not config["qkv_bias"],
    }  # fmt: skip
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ValueError(f"to_transformers: model: got {', '.join(found)}, which ViTMAE has no place for")
    transformers = _package("transformers", "to_transformers")
    result = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=config["embed_dim"], num_hidden_layers=config["depth"],
            num_attention_heads=config["num_heads"], intermediate_size=model.blocks[0].mlp.fc1.out_features,
            layer_norm_eps=config["norm_eps"], image_size=config["img_size"][0], patch_size=config["patch_size"][0],
            num_channels=config["in_chans"], decoder_num_attention_heads=config["decoder_num_heads"],
            decoder_hidden_size=config["decoder_embed_dim"], decoder_num_hidden_layers=config["decoder_depth"],
            decoder_intermediate_size=int(config["decoder_embed_dim"] * config["mlp_ratio"]), mask_ratio=mask_ratio,
            norm_pix_loss=config["norm_pix_loss"],
        )
    )  # fmt: skip
    ours, theirs = model.state_dict(), {}
    for key in result.state_dict():
        name, part = transformers_name(key.removeprefix("vit."))
        theirs[key] = ours[name] if part is None else ours[name].chunk(3)[part]
    result.load_state_dict(theirs, strict=True)
    parameter = model.patch_embed.proj.weight
    return result.to(parameter.device, parameter.dtype).train(model.training)
