"""A frozen teacher that ends at its deepest tapped block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checkpoints import load_vit
from .quantized import quantize_vit
from .saving import encoder
from .sharding import shard

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


class Teacher(nn.Module):
    """Raw block features of a frozen ViT.

    On construction everything beyond the deepest tapped block is dropped and its memory freed; features are bit for
    bit those of the full model. The ViT is always in eval mode and not a registered submodule: as an attribute of a
    training module the teacher moves along (`.to`, `.cuda`), but stays out of `parameters()` and `state_dict()`.

    Args:
        source: path, name or module, see `fastkd.models.load_vit`. A module is copied, never changed.
        blocks: 0-based index or indices of the blocks to tap.
        mean, std: pixel statistics that the teacher expects, in units where white is 1; default the source's own.
        img_size: side or (height, width) of the images; default the source's own, else positions are resized.
        num_heads: see `load_vit`.
        dtype: weights are kept in this dtype, such as `torch.bfloat16`, so that no cast is paid in a step.
        precision: ``"exact"``, or 8-bit products in all blocks but the first: ``"int8"``, fast on CPUs with AVX2 or
            better, or ``"fp8"``, fast on GPUs from compute capability 8.9 on; elsewhere they are emulated
            (`fastkd.models.quantized.why_not_fast`). Features are then off by some per cent.

    Attributes:
        vit: the truncated `VisionTransformer`.
        blocks: the tapped indices, in the given order.
        precision: as given.
        sharded: whether each process holds a part of it.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        blocks: int | Sequence[int],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_size: int | tuple[int, int] | None = None,
        num_heads: int | None = None,
        dtype: torch.dtype | None = None,
        precision: str = "exact",
    ) -> None:
        super().__init__()
        self.blocks = (blocks,) if isinstance(blocks, int) else tuple(blocks)
        # An MAE decoder is dropped in any case, so its heads need not be known.
        vit = load_vit(source, img_size=img_size, num_heads=num_heads, decoder_num_heads=1)
        if not self.blocks or not all(0 <= index < vit.depth for index in self.blocks):
            raise ValueError(
                f"Teacher: blocks: got {self.blocks}, expected indices from 0 to {vit.depth - 1}: the model has "
                f"{vit.depth} blocks"
            )
        vit = encoder(vit, max(self.blocks) + 1).requires_grad_(False).eval()
        for name, values in (("mean", mean), ("std", std)):
            if values is not None:
                if len(values) != vit.in_chans:
                    raise ValueError(
                        f"Teacher: {name}: got {len(values)} values, expected {vit.in_chans}, one a channel"
                    )
                setattr(vit, name, tuple(map(float, values)))
        self.precision, self.sharded = precision, False
        quantize_vit(vit, precision)  # before the cast, from the full weights
        self.__dict__["vit"] = vit if dtype is None else vit.to(dtype)
        super().train(False)

    def shard(self, mesh: DeviceMesh) -> None:
        """Spreads the weights over the processes of a mesh, see `fastkd.models.sharding`."""
        shard(self.vit, self.vit.blocks, mesh)
        self.sharded = True

    @property
    def embed_dim(self) -> int:
        return self.vit.embed_dim

    @property
    def grid(self) -> tuple[int, int]:
        return self.vit.grid

    @property
    def num_prefix_tokens(self) -> int:
        return self.vit.num_prefix_tokens

    @property
    def class_token(self) -> bool:
        return self.vit.cls_token is not None

    @property
    def mean(self) -> tuple[float, ...]:
        return self.vit.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.vit.std

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return self

    def _apply(self, fn, recurse: bool = True) -> Teacher:
        self.vit._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        shape = f"blocks={self.blocks}, width={self.embed_dim}, patch={self.vit.patch_size}, image={self.vit.img_size}"
        return shape if self.precision == "exact" else f"{shape}, {self.precision}"

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """Features of the tapped blocks.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W].
            ids_keep: [B, n] int64 raster indices of the visible patches; default all.
            mean, std: statistics to normalise `images` with; default the teacher's own for uint8 images, and none for
                floating images, which then come as the teacher expects them.

        Returns:
            One [B, P + n, D] raw block output per entry of `blocks`, prefix tokens first; without gradient.
        """
        taps = self.vit(images, ids_keep, taps=self.blocks, mean=mean, std=std, depth=self.vit.depth).taps
        return [taps[index] for index in self.blocks]
