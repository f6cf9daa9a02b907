"""Vision transformers that run on visible patches only and can stop at a block.

Parameter names and meaning follow timm's VisionTransformer, so checkpoints map one to one. Images are floating
NCHW, or uint8 NHWC with mean and std folded into the patch embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastkd import ops
from fastkd.ops.blocks.linear import Linear

from .positions import resize_table, sincos_table

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """Result of an encoder.

    Attributes:
        tokens: [B, P + n, D], prefix tokens (CLS, registers) first, then the n visible patches in the given order.
        taps: raw outputs of the requested blocks by index, [B, P + n, D] each.
    """

    tokens: Tensor
    taps: dict[int, Tensor]


class PatchEmbed(nn.Module):
    """Holds the patch convolution; `fastkd.ops.visible_patch_embed` applies it to visible patches."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)


class Attention(nn.Module):
    """Multi-head self-attention; the first `first_query` tokens may serve as keys and values only."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads: got {num_heads}, expected a divisor of the width {dim}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """x [B, T, D] -> [B, T - first_query, D]."""
        if first_query == 0:
            return self.attend(self.qkv(x))
        return self.cross(tail(x, first_query).contiguous(), x)  # copied here, it is not copied again in backward

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention on a finished projection [B, T, 3 D]."""
        return self.proj(ops.attention(qkv, self.num_heads))

    def cross(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from x [B, Tq, D], keys and values from context [B, Tk, D] -> [B, Tq, D]."""
        sizes = (x.shape[-1], 2 * x.shape[-1])
        weight, bias = self.qkv.weight.split(sizes), self.qkv.bias
        bias = (None, None) if bias is None else bias.split(sizes)
        query, key_value = ops.linear(x, weight[0], bias[0]), ops.linear(context, weight[1], bias[1])
        return self.proj(ops.attention(key_value, self.num_heads, query))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if type(fc1) is Linear and type(fc2) is Linear:
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(ops.gelu(fc1(x)))  # layers that somebody replaced


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def recomputed(compute: Callable) -> Callable:
    """A way through a `Block` that keeps only its inputs where the block says `recompute`: it runs again in backward.

    With the same random numbers and under the same autocast (`torch.utils.checkpoint`), hence to the same bits.
    """

    @functools.wraps(compute)
    def run(self: Block, *args, **kwargs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, self, *args, use_reentrant=False, **kwargs)
        return compute(self, *args, **kwargs)

    return run


class Block(nn.Module):
    """Pre-norm transformer block: x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True,
        init_values: float | None = None, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = 0.0  # see `VisionTransformer.set_drop_path`
        self.recompute = False  # see `VisionTransformer.set_grad_checkpointing`

    @recomputed
    def forward(self, x: Tensor, delta: Tensor | None = None, first_query: int = 0) -> tuple[Tensor, Tensor]:
        """One block on a residual stream whose last addition is still open.

        Args:
            x: [B, T, D] residual stream.
            delta: [B, T, D] that the previous block adds to x, or None. Leaving the addition open lets it run in
                the same pass as the next LayerNorm.
            first_query: tokens before this one serve as keys and values only.

        Returns:
            (x, delta) of this block, [B, T - first_query, D] each; its output is x + delta.
        """
        x, h = layer_norm(self.norm1, x, delta)
        return self._finish(tail(x, first_query), self.attn(h, first_query))

    @recomputed
    def from_qkv(self, x: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """The block where norm1 and the qkv projection [B, T, 3 D] are already done."""
        return self._finish(x, self.attn.attend(qkv))

    @recomputed
    def class_row(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The block for token 0 alone, all T tokens as keys and values: (x, delta), [B, 1, D] each."""
        x, h = layer_norm(self.norm1, x, delta)
        return self._finish(head(x, 1), self.attn.cross(head(h, 1).contiguous(), h))

    @recomputed
    def cross(self, x: Tensor, delta: Tensor | None, context: Tensor) -> tuple[Tensor, Tensor]:
        """The block with keys and values from context [B, Tk, D] instead of x + delta [B, Tq, D]."""
        x, h = layer_norm(self.norm1, x, delta)
        return self._finish(x, self.attn.cross(h, layer_norm(self.norm1, context)[1]))

    def _finish(self, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        x, h = layer_norm(self.norm2, x, self._drop(self.ls1(attention)))
        return x, self._drop(self.ls2(self.mlp(h)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016): each image skips the branch at a rate; kept ones make up for it."""
        if self.drop_path == 0 or not self.training:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


def tail(x: Tensor, first: int) -> Tensor:
    """x[:, first:]. The gradient of a split is one copy; that of a slice also writes zeros under all of it."""
    return x.split((first, x.shape[1] - first), 1)[1] if first else x


def head(x: Tensor, count: int) -> Tensor:
    """x[:, :count], as a split for the same reason."""
    return x.split((count, x.shape[1] - count), 1)[0]


def layer_norm(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + delta, its LayerNorm), one pass over x."""
    return ops.residual_layer_norm(x, delta, norm.weight, norm.bias, norm.eps)


class VisionTransformer(nn.Module):
    """ViT encoder (Dosovitskiy et al. 2021) in timm's parameter layout.

    Args:
        img_size, patch_size: side or (height, width) in pixels.
        in_chans: image channels.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in timm.
        class_token: whether a CLS token leads the sequence.
        reg_tokens: number of register tokens after it.
        init_values: layer-scale initial value, None without layer scale.
        no_embed_class: whether prefix tokens carry no position.
        norm_eps: epsilon of every LayerNorm.
        residual_dtype: dtype of the residual stream where activations are 16-bit: float32, as under torch's
            autocast, or the 16-bit dtype itself, which is faster and rounds at every addition.
        mean, std: pixel statistics that this model expects, in units where white is 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        reg_tokens: int = 0,
        init_values: float | None = None,
        no_embed_class: bool = False,
        norm_eps: float = 1e-6,
        residual_dtype: torch.dtype = torch.float32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.img_size = _pair(img_size)
        self.grid = _grid(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim, self.num_heads = in_chans, embed_dim, num_heads
        self.mlp_ratio, self.qkv_bias, self.init_values, self.norm_eps = mlp_ratio, qkv_bias, init_values, norm_eps
        self.no_embed_class, self.residual_dtype = no_embed_class, residual_dtype
        default = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)
        self.mean, self.std = tuple(mean or default[0]), tuple(std or default[1])

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.num_prefix_tokens = int(class_token) + reg_tokens
        table = sincos_table(embed_dim, self.grid, self._embedded_prefix())
        self.pos_embed = nn.Parameter(table.to(torch.get_default_dtype())[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values, norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def _embedded_prefix(self) -> int:
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def init_weights(self) -> None:
        """Initialises as MAE does: xavier-uniform linear layers and patch projection, tokens N(0, 0.02)."""
        self.apply(_init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size; position tables are resized (bicubic, antialiased)."""
        img_size = _pair(img_size)
        grid = _grid(img_size, self.patch_size)
        with torch.no_grad():
            self._resize_positions(grid)
        self.img_size, self.grid = img_size, grid

    def _resize_positions(self, grid: tuple[int, int]) -> None:
        table = resize_table(self.pos_embed, self.grid, grid, self._embedded_prefix())
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth in training, from 0 in the first block linearly to `rate` in the last one."""
        if not 0 <= rate < 1:
            raise ValueError(f"set_drop_path: rate: got {rate}, expected a number in [0, 1)")
        for index, block in enumerate(self.blocks):
            block.drop_path = rate * index / max(self.depth - 1, 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes blocks, those of a decoder too, again in backward instead of keeping what is inside of them."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = enable

    def truncate(self, depth: int) -> None:
        """Keeps the first `depth` blocks only; the final norm goes with the others, since taps are raw outputs."""
        if not 1 <= depth <= self.depth:
            raise ValueError(f"truncate: depth: got {depth}, expected 1 to {self.depth}, the number of blocks")
        del self.blocks[depth:]
        self.norm = nn.Identity()

    def embed(self, images: Tensor, ids_keep: Tensor | None, mean=None, std=None) -> Tensor:
        """Embeds the visible patches only: [B, P + n, D]."""
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        if (height, width) != self.img_size:
            raise ValueError(
                f"images: got {height} x {width} pixels, expected {self.img_size[0]} x {self.img_size[1]}; "
                "resize them, or call set_input_size to resize the position table"
            )
        if images.dtype == torch.uint8 and mean is None:
            mean, std = self.mean, self.std
        if ids_keep is None:
            ids_keep = torch.arange(self.num_patches, device=images.device).expand(images.shape[0], -1)
        pos_embed, prefix = self.pos_embed[0], None
        if self.num_prefix_tokens:
            prefix = torch.cat([t[0] for t in (self.cls_token, self.reg_token) if t is not None])
            if not self.no_embed_class:
                prefix = prefix + pos_embed[: self.num_prefix_tokens]
        projection = self.patch_embed.proj
        x = ops.visible_patch_embed(
            images, ids_keep, projection.weight, projection.bias, pos_embed[self._embedded_prefix() :], prefix,
            mean=mean, std=std,
        )  # fmt: skip
        return self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        """x as the start of a residual stream."""
        return x.to(self.residual_dtype) if x.dtype in (torch.bfloat16, torch.float16) else x

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        taps: Collection[int] = (),
        depth: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Features:
        """Encodes visible patches.

        Args:
            images: floating [B, C, H, W], already normalised, or uint8 [B, H, W, C].
            ids_keep: [B, n] int64 raster indices of the visible patches; default all, in raster order.
            taps: indices of blocks whose raw outputs are wanted.
            depth: stop after this many blocks, without the final norm; default all blocks and the norm.
            mean, std: pixel statistics; default the model's own for uint8 images, none for floating ones.

        Returns:
            `Features`; `tokens` are after the final norm (raw where `depth` stops before it).
        """
        x = self.embed(images, ids_keep, mean, std)
        delta, wanted = None, {}
        for index, block in enumerate(self.blocks[:depth]):
            x, delta = block(x, delta)
            if index in taps:
                x, delta = x + delta, None
                wanted[index] = x
        if depth is None:
            return Features(self._final(x, delta), wanted)
        return Features(x if delta is None else x + delta, wanted)

    def encode(self, images: Tensor, tokens: str = "cls", ids: Tensor | None = None, *, mean=None, std=None) -> Tensor:
        """What a head reads of whole images.

        Args:
            images: as for `forward`.
            tokens: ``"cls"``, the class token alone, for which the last block computes one query, one attention row and
                one MLP row (exact), or ``"all"``.
            ids: [B, L] int64 order of the patches; default raster. The class token depends on it by rounding only.
            mean, std: as for `forward`.

        Returns:
            After the final norm: [B, D] with "cls", [B, P + L, D] with "all".
        """
        return self.encode_tokens(self.embed(images, ids, mean, std), tokens)

    def encode_tokens(self, x: Tensor, tokens: str = "all") -> Tensor:
        """`encode` from embedded tokens [B, T, D] on."""
        if tokens not in ("cls", "all"):
            raise ValueError(f"encode: tokens: got {tokens!r}, expected 'cls' or 'all'")
        if tokens == "cls" and self.cls_token is None:
            raise ValueError("encode: tokens: got 'cls', expected 'all': the model has no class token")
        delta = None
        for block in self.blocks[:-1]:
            x, delta = block(x, delta)
        last = self.blocks[-1]
        if tokens == "all":
            return self._final(*last(x, delta))
        return self._final(*last.class_row(x, delta)).squeeze(1)

    def _final(self, x: Tensor, delta: Tensor | None) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            return layer_norm(self.norm, x, delta)[1]
        return x if delta is None else x + delta


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    if img_size[0] % patch_size[0] or img_size[1] % patch_size[1]:
        raise ValueError(
            f"img_size: got {img_size[0]} x {img_size[1]}, expected multiples of the patch "
            f"{patch_size[0]} x {patch_size[1]}"
        )
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
