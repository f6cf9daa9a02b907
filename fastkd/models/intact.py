"""A frozen teacher that sees the whole picture: features of its blocks, and where its CLS token looks in the last one.

Attention runs fused in every block. Of the last block's scores one row per image and head is made besides, that of the
CLS token, from the projections that the block computes anyway: asking a model for its attentions instead would make it
write the scores of all tokens in all blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops import cls_attention_row

from .checkpoints import load_vit
from .pixels import normalize, renormalize, statistics_of
from .saving import encoder
from .taps import Taps, blocks_of
from .vit import VisionTransformer, layer_norm

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class View(NamedTuple):
    """What the teacher saw.

    Attributes:
        features: raw outputs of the wanted blocks by index, [B, P + L, D] each.
        importance: [B, L] attention of the CLS token to the patches in the last block, mean over heads; or None.
    """

    features: dict[int, Tensor]
    importance: Tensor | None


class IntactTeacher(nn.Module):
    """A frozen ViT on whole images; always in eval mode, not a registered submodule (see `fastkd.models.Teacher`).

    Args:
        source: what `load_vit` takes; or a vision tower with a norm before its blocks, which that does not: CLIP's, as
            a transformers module (CLIPModel, CLIPVisionModel) or a timm VisionTransformer. Those are used as they are,
            set to eval mode and frozen.
        grid: patches (rows, columns) that the student has. Positions are resized (bicubic) where the teacher's own
            grid is another, and images where ``grid * patch`` pixels are not theirs. Default the teacher's own.
        mean, std: pixel statistics that it expects, in units where white is 1; default the source's own.
        dtype: weights are kept in this dtype.

    Attributes:
        num_layers, embed_dim, num_prefix_tokens, class_token, grid, img_size: of the whole teacher.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        grid: tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        tower = _Tapped(source, grid) if _is_foreign(source) else _Plain(source, grid)
        self.mean, self.std = tuple(mean or tower.mean), tuple(std or tower.std)
        self.num_layers, self.embed_dim, self.img_size = tower.num_layers, tower.embed_dim, tower.img_size
        self.num_prefix_tokens, self.class_token, self.grid = tower.num_prefix_tokens, tower.class_token, tower.grid
        tower.model.requires_grad_(False).eval()
        if dtype is not None:
            tower.model.to(dtype)
        self.__dict__["tower"] = tower
        super().train(False)

    def train(self, mode: bool = True) -> IntactTeacher:
        """Stays in eval mode."""
        return self

    def _apply(self, fn, recurse: bool = True) -> IntactTeacher:
        self.tower.model._apply(fn, recurse)
        return self

    def limit(self, blocks: Collection[int], importance: bool) -> None:
        """Frees what a view of these blocks does not need. Features are bit for bit those of the whole model."""
        self.tower.limit(self.num_layers if importance else max(blocks) + 1)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        blocks: Collection[int],
        importance: bool = False,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> View:
        """Looks at images.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W].
            blocks: 0-based indices of the blocks whose outputs are wanted.
            importance: whether the CLS token's attention is wanted.
            mean, std: statistics that floating images were normalised with; they are exchanged for the teacher's own.
        """
        raw, size = images.dtype == torch.uint8, images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        if raw and tuple(size) == self.img_size and isinstance(self.tower, _Plain):
            return self.tower.view(images, self.mean, self.std, blocks, importance)  # normalised as patches are read
        if raw:
            images = normalize(images, self.mean, self.std)
        elif mean is not None:
            images = renormalize(images, (mean, std), (self.mean, self.std))
        if tuple(size) != self.img_size:
            images = F.interpolate(images, size=self.img_size, mode="bicubic", align_corners=False)
        return self.tower.view(images, None, None, blocks, importance)


class _Plain:
    """Our own `VisionTransformer`."""

    def __init__(self, source: str | Path | nn.Module, grid: tuple[int, int] | None) -> None:
        vit = load_vit(source, decoder_num_heads=1)  # a decoder is dropped, so its heads need not be known
        if grid is not None and grid != vit.grid:
            vit.set_input_size((grid[0] * vit.patch_size[0], grid[1] * vit.patch_size[1]))
        self.num_layers, self.embed_dim, self.img_size, self.grid = vit.depth, vit.embed_dim, vit.img_size, vit.grid
        self.num_prefix_tokens, self.class_token = vit.num_prefix_tokens, vit.cls_token is not None
        self.mean, self.std = vit.mean, vit.std
        self.model: VisionTransformer = encoder(vit)

    def limit(self, depth: int) -> None:
        self.model = encoder(self.model, depth).requires_grad_(False).eval()

    def view(self, images: Tensor, mean, std, blocks: Collection[int], importance: bool) -> View:
        vit, row = self.model, None
        x, delta, features = vit.embed(images, None, mean, std), None, {}
        for index, block in enumerate(vit.blocks):
            x, h = layer_norm(block.norm1, x, delta)
            if index - 1 in blocks:
                features[index - 1] = x
            qkv = block.attn.qkv(h)
            if importance and index == self.num_layers - 1:
                row = _row(*qkv.chunk(3, -1)[:2], vit.num_heads, self.num_prefix_tokens)
                if index not in blocks:
                    return View(features, row)
            x, delta = block.from_qkv(x, qkv)
        if vit.depth - 1 in blocks:
            features[vit.depth - 1] = x + delta
        return View(features, row)


class _Tapped:
    """A module of transformers or timm, looked at through hooks."""

    def __init__(self, model: nn.Module, grid: tuple[int, int] | None) -> None:
        self.mean, self.std = statistics_of(model)
        self.options = {}
        if type(model).__module__.startswith("timm"):
            if grid is not None and tuple(model.patch_embed.grid_size) != tuple(grid):
                model.set_input_size(tuple(n * p for n, p in zip(grid, model.patch_embed.patch_size)))
            self.grid, self.img_size = tuple(model.patch_embed.grid_size), tuple(model.patch_embed.img_size)
            self.num_prefix_tokens, self.class_token = model.num_prefix_tokens, model.cls_token is not None
            self.embed_dim, projections = model.embed_dim, ("attn.qkv",)
            self.num_heads = model.blocks[0].attn.num_heads
        else:
            model = getattr(model, "vision_model", model)
            config = model.config
            own = config.image_size // config.patch_size
            self.grid = tuple(grid or (own, own))
            self.img_size = tuple(n * config.patch_size for n in self.grid)
            self.options = {"interpolate_pos_encoding": self.grid != (own, own)}
            self.mean, self.std = CLIP_MEAN, CLIP_STD
            self.num_prefix_tokens, self.class_token, self.embed_dim = 1, True, config.hidden_size
            self.num_heads, projections = config.num_attention_heads, ("self_attn.q_proj", "self_attn.k_proj")
        self.model, layers = model, blocks_of(model)
        self.num_layers = len(layers)
        last = next(name for name, module in model.named_modules() if module is layers[-1])
        self.projections = [f"{last}.{name}" for name in projections]

    def limit(self, depth: int) -> None:
        """The whole model runs."""

    def view(self, images: Tensor, mean, std, blocks: Collection[int], importance: bool) -> View:
        blocks = sorted(blocks)
        where = [*blocks, *(self.projections if importance else ())]
        if not torch.is_autocast_enabled(images.device.type):
            images = images.to(next(self.model.parameters()).dtype)
        found = Taps(self.model, where)(images, **self.options).features
        features, projected = dict(zip(blocks, found)), found[len(blocks) :]
        if not importance:
            return View(features, None)
        query, key = projected if len(projected) == 2 else projected[0].chunk(3, -1)[:2]
        return View(features, _row(query, key, self.num_heads, self.num_prefix_tokens))


def _row(query: Tensor, key: Tensor, heads: int, num_prefix: int) -> Tensor:
    """Attention of the first token to the patches, from projections [B, P + L, D]."""
    query, key = query[:, 0].unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1)).transpose(1, 2)
    return cls_attention_row(query, key, num_prefix=num_prefix)


def _is_foreign(source: object) -> bool:
    """Whether it is a vision tower that `load_vit` cannot read, and that is known here."""
    if not isinstance(source, nn.Module):
        return False
    origin = type(source).__module__.split(".")[0]
    if origin == "timm" and type(source).__name__ == "VisionTransformer":
        return isinstance(source.norm_pre, nn.LayerNorm)
    return origin == "transformers" and getattr(source.config, "model_type", "") in ("clip", "clip_vision_model")
