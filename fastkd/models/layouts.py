"""Translates state dicts of other code bases into our names and constructor arguments.

Two layouts cover what exists: the one that timm, facebookresearch/mae, DMAE and DINOv2 share, which is also ours,
and that of transformers, whose names changed with version 5 in memory but not on disk. Sizes are read off tensor
shapes; what shapes cannot tell (heads, epsilon) comes from the source's config where it has one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Heads of the standard widths; the published sizes, head dim 64 but for 1280 (80).
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}
PATCH_WEIGHT = "patch_embed.proj.weight"
HF_PATCH_WEIGHT = "embeddings.patch_embeddings.projection.weight"
# Heads of classifiers, projectors of a distilled student: no part of the encoder.
DROPPED = re.compile(r"(head|fc_norm|aligned_feature_projection_heads|pooler|classifier|pre_logits)\.")
UNSUPPORTED = {
    r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx]|gate_proj|weights_(in|out))\b": "a gated (SwiGLU) MLP",
    r"(.*\.)?(rope|rotary)": "rotary position embedding",
    r"(.*\.)?(rel_pos|relative_position)": "relative position bias",
    r"norm_pre\.": "a norm before the first block (pre_norm, as in CLIP)",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "normalised queries and keys (qk_norm)",
    r"blocks\.\d+\.(attn|mlp)\.norm\.": "a norm inside attention or MLP",
    r"attn_pool\.": "an attention-pooling head",
    r"(dist_token|head_dist\b)": "a distillation token (DeiT)",
    r"patch_embed\.backbone\.": "a hybrid (convolutional) patch embedding",
    r"patch_embed\.norm\.": "a norm in the patch embedding",
}


@dataclass
class Weights:
    """A checkpoint in our terms: parameters by our names, and the constructor arguments of the model they fit."""

    state: dict[str, Tensor]
    config: dict[str, Any]


def from_state_dict(state: dict[str, Tensor], source: str, **hints) -> Weights:
    """Weights from a state dict of either layout; `hints` are those of `from_vit`.

    Wrapping prefixes (``module.``, ``model.``, ``visual.trunk.``, ...) are found by the patch embedding's name, and
    what lies outside of them (text towers, projectors) is left out.
    """
    for suffix, reader in ((PATCH_WEIGHT, from_vit), (HF_PATCH_WEIGHT, from_transformers)):
        prefixes = [k[: -len(suffix)] for k in state if k == suffix or k.endswith("." + suffix)]
        if len(prefixes) > 1:
            raise ValueError(
                f"{source}: got {len(prefixes)} models, under {', '.join(map(repr, prefixes))}, expected one; save the "
                "wanted one alone"
            )
        if prefixes:
            inside = _under(state, prefixes[0])
            root = prefixes[0].removesuffix("vit.")
            if f"{root}decoder.decoder_embed.weight" in state:  # transformers: the decoder is the encoder's neighbour
                inside.update({f"decoder.{k}": v for k, v in _under(state, f"{root}decoder.").items()})
            return reader(inside, source, **hints)
    raise ValueError(
        f"{source}: got tensors {', '.join(list(state)[:5])}, ..., expected a vision transformer: one named "
        f"{PATCH_WEIGHT} (timm, MAE) or {HF_PATCH_WEIGHT} (transformers)"
    )


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def from_vit(
    state: dict[str, Tensor],
    source: str,
    *,
    grid: tuple[int, int] | None = None,
    img_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_eps: float = 1e-6,
    norm_pix_loss: bool = False,
) -> Weights:
    """Weights from the layout of timm, facebookresearch/mae, DMAE and DINOv2.

    Args:
        state: tensors without wrapping prefix.
        source: name for messages.
        grid: patches (rows, columns) where known; else a square, else that of `img_size`.
        img_size: (height, width) of the images, used where the number of positions is no square.
        num_heads: attention heads; default by width (`HEADS`).
        decoder_num_heads: heads of an MAE decoder, default 16.
        norm_eps, norm_pix_loss: constructor arguments that no tensor tells.
    """
    for pattern, feature in UNSUPPORTED.items():
        found = next((k for k in state if re.match(pattern, k)), None)
        if found:
            raise ValueError(f"{source}: got {feature} ({found}), expected a plain pre-norm ViT; it is not supported")
    # A classifier with pooled features has fc_norm, after the pooling, instead of a final norm of the tokens.
    state = {k: v for k, v in state.items() if not DROPPED.match(k)}
    has_decoder = "decoder_embed.weight" in state
    if not has_decoder:
        state.pop("mask_token", None)  # DINOv2, iBOT
    if "register_tokens" in state:
        # DINOv2 gives the CLS token a position and the registers none: fold the former into the token.
        position = state["pos_embed"][:, :1]
        state["cls_token"] = state["cls_token"] + position
        state["pos_embed"] = state["pos_embed"][:, 1:]
        state["reg_token"] = state.pop("register_tokens")
    _require(state, source, "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        raise ValueError(f"{source}: got a gated (SwiGLU) MLP, expected a plain pre-norm ViT; it is not supported")

    width, in_chans, *patch = state[PATCH_WEIGHT].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = registers + ("cls_token" in state)
    grid, embedded = _grid(state["pos_embed"].shape[1], prefix, tuple(patch), grid, img_size, source)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    config = dict(
        img_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=tuple(patch), in_chans=in_chans, embed_dim=width,
        depth=_depth(state, "blocks"), num_heads=num_heads or _heads(width, source), mlp_ratio=_ratio(hidden, width),
        qkv_bias="blocks.0.attn.qkv.bias" in state, class_token="cls_token" in state, reg_tokens=registers,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None, no_embed_class=prefix > 0 and not embedded,
        norm_eps=norm_eps, final_norm="norm.weight" in state,
    )  # fmt: skip
    if has_decoder:
        decoder_width = state["decoder_embed.weight"].shape[0]
        decoder_num_heads = decoder_num_heads or 16
        if decoder_width % decoder_num_heads:
            raise ValueError(
                f"{source}: decoder_num_heads: got {decoder_num_heads}, expected a divisor of the decoder width "
                f"{decoder_width}; pass decoder_num_heads="
            )
        config |= dict(
            decoder_embed_dim=decoder_width, decoder_depth=_depth(state, "decoder_blocks"),
            decoder_num_heads=decoder_num_heads, norm_pix_loss=norm_pix_loss,
        )  # fmt: skip
    return Weights(state, config)


def _require(state: dict[str, Tensor], source: str, *names: str) -> None:
    missing = [name for name in names if name not in state]
    if "pos_embed" in missing:
        raise ValueError(f"{source}: got no absolute position table (pos_embed), expected one; it is not supported")
    if missing:
        raise ValueError(f"{source}: got no tensor {', '.join(missing)}, expected a vision transformer's")


def _depth(state: dict[str, Tensor], blocks: str) -> int:
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith(blocks + ".")), default=-1)


def _heads(width: int, source: str) -> int:
    if width not in HEADS:
        raise ValueError(
            f"{source}: num_heads: got width {width}, for which tensor shapes do not tell it, expected one of the "
            f"standard widths {', '.join(map(str, HEADS))}; pass num_heads="
        )
    return HEADS[width]


def _ratio(hidden: int, width: int) -> float:
    """mlp_ratio with int(width * ratio) == hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _grid(
    rows: int, prefix: int, patch: tuple[int, int], grid: tuple[int, int] | None, img_size: tuple[int, int] | None,
    source: str,
) -> tuple[tuple[int, int], bool]:  # fmt: skip
    """Patch grid of a position table, and whether its first rows belong to the prefix tokens."""
    choices = [(rows - prefix, True), (rows, False)] if prefix else [(rows, False)]
    for count, embedded in choices:
        side = math.isqrt(max(count, 0))
        if grid is not None and grid[0] * grid[1] == count:
            return grid, embedded
        if grid is None and side and side * side == count:
            return (side, side), embedded
    if grid is None and img_size is not None:
        return _grid(rows, prefix, patch, (img_size[0] // patch[0], img_size[1] // patch[1]), None, source)
    expected = "a square number of patches" if grid is None else f"{grid[0]} x {grid[1]} patches"
    raise ValueError(
        f"{source}: pos_embed: got {rows} positions with {prefix} prefix tokens, expected {expected}; pass img_size= "
        "(height, width) of the images that the checkpoint was made for"
    )


# transformers names outside of the layers, and inside: (pattern, our name, third of the packed qkv)
_HF_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "decoder.mask_token": "mask_token",
}
_HF_BLOCK = [
    (r"attention\.(?:attention\.)?(?:query|q_proj)", "attn.qkv", 0),
    (r"attention\.(?:attention\.)?(?:key|k_proj)", "attn.qkv", 1),
    (r"attention\.(?:attention\.)?(?:value|v_proj)", "attn.qkv", 2),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj", None),
    (r"layernorm_before|norm1", "norm1", None),
    (r"layernorm_after|norm2", "norm2", None),
    (r"intermediate\.dense|mlp\.fc1", "mlp.fc1", None),
    (r"output\.dense|mlp\.fc2", "mlp.fc2", None),
    (r"layer_scale1\.lambda1", "ls1.gamma", None),
    (r"layer_scale2\.lambda1", "ls2.gamma", None),
]
_HF_LAYER = re.compile(r"(decoder\.)?(?:(?:decoder_)?encoder\.)?(?:decoder_)?layers?\.(\d+)\.(.+)")


def transformers_name(name: str) -> tuple[str, int | None]:
    """Our name of a transformers parameter (without the model's prefix), and its third of the packed qkv.

    Both the names of version 4 (and of files) and those of version 5 in memory. Unknown names come back unchanged.
    """
    layer = _HF_LAYER.fullmatch(name)
    if layer is None:
        stem, _, leaf = name.rpartition(".")
        if name in _HF_TOP:
            return _HF_TOP[name], None
        if stem in _HF_TOP:
            return f"{_HF_TOP[stem]}.{leaf}", None
        return name.removeprefix("decoder."), None
    decoder, index, rest = layer.groups()
    for pattern, ours, part in _HF_BLOCK:
        found = re.fullmatch(f"(?:{pattern})((?:\\.weight|\\.bias)?)", rest)
        if found:
            return f"{'decoder_' if decoder else ''}blocks.{index}.{ours}{found.group(1)}", part
    return f"blocks.{index}.{rest}", None


def from_transformers(state: dict[str, Tensor], source: str, **hints) -> Weights:
    """Weights from transformers names: ViTMAE, ViT, DINOv2 with and without registers; `hints` as in `from_vit`."""
    ours: dict[str, Tensor] = {}
    packed: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        name, part = transformers_name(key)
        if part is None:
            ours[name] = tensor
        else:
            packed.setdefault(name, {})[part] = tensor
    for name, parts in packed.items():
        if len(parts) != 3:
            raise ValueError(f"{source}: {name}: got {len(parts)} of query, key and value, expected all three")
        ours[name] = torch.cat([parts[i] for i in range(3)])
    return from_vit(ours, source, **hints)
