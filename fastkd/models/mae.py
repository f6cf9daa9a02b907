"""Masked autoencoder (He et al. 2022): a ViT encoder on visible patches and a light decoder.

The decoder keeps tokens in shuffled order (visible first, then masked): attention does not see the order, so
un-shuffling is never needed, and "masked tokens only" is a plain slice. Exact savings in the decoder:

* first block: every masked token enters as mask_token + position, the same in all images, so its norm1 and qkv
  are computed once per batch for all L positions and only copied in;
* last block: visible tokens serve as keys and values; query, attention, MLP and prediction run on masked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.ops.blocks.linear import Linear

from .positions import resize_table, sincos_table
from .vit import Block, VisionTransformer, _init_linear, layer_norm, tail

# name: (embed_dim, depth, num_heads)
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class MaskedAutoencoderViT(VisionTransformer):
    """`VisionTransformer` plus the MAE decoder.

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: size of the decoder (published: 512, 8, 16).
        norm_pix_loss: whether pixel targets are normalised per patch.
        decoder: ``"self"``, the published decoder, or ``"cross"``: masked queries read the visible tokens only
            (cheaper, not the same function).
        **encoder: arguments of `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        decoder: str = "self",
        **encoder,
    ) -> None:
        super().__init__(**encoder)
        if decoder not in ("self", "cross"):
            raise ValueError(f"decoder: got {decoder!r}, expected 'self' or 'cross'")
        self.norm_pix_loss, self.decoder = norm_pix_loss, decoder
        self.decoder_num_heads = decoder_num_heads
        self.decoder_embed = Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        table = sincos_table(decoder_embed_dim, self.grid, self.num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(table.to(torch.get_default_dtype())[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, self.mlp_ratio, norm_eps=self.norm_eps)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=self.norm_eps)
        pixels = self.patch_size[0] * self.patch_size[1] * self.in_chans
        self.decoder_pred = Linear(decoder_embed_dim, pixels)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(_init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def decoder_embed_dim(self) -> int:
        return self.decoder_embed.out_features

    def _resize_positions(self, grid: tuple[int, int]) -> None:
        super()._resize_positions(grid)
        table = resize_table(self.decoder_pos_embed, self.grid, grid, self.num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)

    def decode(self, tokens: Tensor, ids: Tensor, **options) -> Tensor:
        """Predicts the pixels of masked patches: `decoder_pred` of `decode_features`, same arguments.

        Returns:
            [B, K - n, p * p * C] predictions of ``ids[:, n:]``, pixel order (row, column, channel); [B, K, ...] of
            ``ids`` with predict_visible.
        """
        return self.decoder_pred(self.decode_features(tokens, ids, **options))

    def decode_features(
        self, tokens: Tensor, ids: Tensor, *, predict_visible: bool = False, share_first_block: bool | None = None
    ) -> Tensor:
        """The decoder's final tokens, after the norm, from the encoder's.

        Args:
            tokens: [B, P + n, D] after the final norm.
            ids: [B, K] int64, the n visible patches in the order of `tokens`, then the patches to predict.
            predict_visible: whether the visible patches are predicted too (for pictures; the loss ignores them).
            share_first_block: whether the first block's masked rows are computed once per batch (exact);
                default: where that is less work.

        Returns:
            [B, K - n, Dd] tokens that `decoder_pred` predicts ``ids[:, n:]`` from; [B, K, Dd] with predict_visible.
        """
        visible = tokens.shape[1]
        tokens = self.residual(self.decoder_embed(tokens))
        positions = self.decoder_pos_embed[0]
        x = ops.decoder_assemble(tokens, self.mask_token[0], positions, ids, self.num_prefix_tokens)
        first = self.num_prefix_tokens if predict_visible else visible  # first token that is predicted
        if self.decoder == "cross":
            return self._decode_cross(self._visible(tokens, ids), tail(x, first))
        if share_first_block is None:
            masked_rows = x.shape[0] * (x.shape[1] - visible)
            share_first_block = len(self.decoder_blocks) > 1 and masked_rows >= 2 * self.num_patches
        delta = None
        for index, block in enumerate(self.decoder_blocks):
            last = index == len(self.decoder_blocks) - 1
            if index == 0 and share_first_block and not last:
                x, delta = block.from_qkv(x, self._shared_qkv(block, tokens, ids))
            else:
                x, delta = block(x, delta, first_query=first if last else 0)
        x = x if self.decoder_blocks else tail(x, first)
        return layer_norm(self.decoder_norm, x, delta)[1]

    def _visible(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The assembled sequence up to the last visible patch, made once more.

        As a slice of the sequence it would send back a gradient of the full length, to be added to the other.
        """
        fill, prefix = self.mask_token[0].detach(), self.num_prefix_tokens
        return ops.decoder_assemble(tokens, fill, self.decoder_pos_embed[0], ids[:, : tokens.shape[1] - prefix], prefix)

    def _shared_qkv(self, block: Block, tokens: Tensor, ids: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        masked = (self.mask_token[0] + self.decoder_pos_embed[0, prefix:]).to(tokens.dtype)  # [L, Dd]
        rows = block.attn.qkv(layer_norm(block.norm1, self._visible(tokens, ids))[1])
        table = block.attn.qkv(layer_norm(block.norm1, masked[None])[1])[0]
        return ops.decoder_assemble(rows, table, None, ids, prefix)

    def _decode_cross(self, visible: Tensor, x: Tensor) -> Tensor:
        delta = None
        for block in self.decoder_blocks:
            x, delta = block.cross(x, delta, visible)
        return layer_norm(self.decoder_norm, x, delta)[1]


def mae_vit(
    size: str, patch_size: int | tuple[int, int] = 16, img_size: int | tuple[int, int] = 224, **overrides
) -> MaskedAutoencoderViT:
    """A new masked autoencoder of a standard size.

    Args:
        size: ``"tiny"``, ``"small"``, ``"base"``, ``"large"`` or ``"huge"``.
        patch_size, img_size: side, or (height, width), in pixels.
        **overrides: arguments of `MaskedAutoencoderViT`, such as ``decoder_depth=4``.
    """
    if size not in SIZES:
        raise ValueError(f"mae_vit: size: got {size!r}, expected one of {', '.join(SIZES)}")
    embed_dim, depth, num_heads = SIZES[size]
    shape = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    return MaskedAutoencoderViT(**{**shape, "patch_size": patch_size, "img_size": img_size, **overrides})
