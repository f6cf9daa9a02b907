"""`released`: what the published DMAE recipe executes in one training step, op for op, written from the paper's
formulas and from a description of the recipe (Bai et al., CVPR 2023); no line of it comes from that code.

Kept on purpose, since this is what a user of the recipe pays for: the teacher runs all its blocks, its final norm
and its decoder and throws the prediction away; every patch is embedded before most are dropped; masks come from two
argsorts and a gather with an index repeated over the channels; attention is written out as matmul, softmax, matmul;
the residual stream is float32 under autocast; the loss is read back with `.item()` and the device is synchronised
in every step; AdamW is torch's default (not fused). The teacher runs under no_grad though its parameters keep
requires_grad=True.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import SIZES, Recipe


def sincos_position_table(width: int, side: int) -> Tensor:
    """[1, 1 + side^2, width]: zeros for CLS, then sin/cos of the column and of the row, each width/4 wide."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()[None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class MaskedAutoencoder(nn.Module):
    """MAE ViT with timm's parameter names."""

    def __init__(self, size: str, recipe: Recipe) -> None:
        super().__init__()
        width, depth, heads = SIZES[size]
        side, decoder = recipe.image // recipe.patch, recipe.decoder_width
        self.patch_embed = PatchEmbed(recipe.patch, recipe.channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_position_table(width, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        self.decoder_pos_embed = nn.Parameter(sincos_position_table(decoder, side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder, recipe.decoder_heads) for _ in range(recipe.decoder_blocks))
        self.decoder_norm = nn.LayerNorm(decoder, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder, recipe.pixels)
        self.apply(self._initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def encode(self, images: Tensor, ids_keep: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        """(normalised output, raw output of block `tap`), both [B, 1 + n, D]."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = torch.gather(x, 1, ids_keep[:, :, None].repeat(1, 1, x.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == tap:
                feature = x
        return self.norm(x), feature

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Prediction for all patches, [B, L, P]."""
        x = self.decoder_embed(latent)
        missing = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], missing], dim=1)
        patches = torch.gather(patches, 1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_keep, ids_restore, mask) from per-patch noise."""
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, torch.gather(mask, 1, ids_restore)


def patchify(images: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, -1, patch * patch * channels)


class DMAE(nn.Module):
    """Student, projector and teacher of the published recipe.

    `mark(stage, *tensors)`, where set, is called at the start of each stage with the tensors that cross the border.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = MaskedAutoencoder(recipe.student, recipe)
        self.teacher = MaskedAutoencoder(recipe.teacher, recipe).eval()
        self.projector = nn.Linear(SIZES[recipe.student][0], SIZES[recipe.teacher][0])
        self.mark: Callable | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names that all modes share."""
        student = {f"student.{k}": v for k, v in self.student.named_parameters() if v.requires_grad}
        return student | {f"projector.{k}": v for k, v in self.projector.named_parameters()}

    def _mark(self, stage: str, *tensors: Tensor) -> None:
        if self.mark is not None:
            self.mark(stage, *tensors)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
        recipe = self.recipe
        self._mark("teacher")
        with torch.no_grad():
            ids_keep, ids_restore, mask = random_masking(noise, recipe.visible(mask_ratio))
            latent, target_feature = self.teacher.encode(images, ids_keep, recipe.teacher_tap)
            self.teacher.decode(latent, ids_restore)
        self._mark("student")
        latent, feature = self.student.encode(images, ids_keep, recipe.student_tap)
        self._mark("decoder", latent)
        pred = self.student.decode(latent, ids_restore)
        self._mark("loss", pred)
        target = patchify(images, recipe.patch)
        per_patch = ((pred - target) ** 2).mean(dim=-1)
        pixel_loss = (per_patch * mask).sum() / mask.sum()
        goal = nn.functional.normalize(target_feature.float(), dim=-1)
        ours = nn.functional.normalize(self.projector(feature).float(), dim=-1)
        align_loss = nn.functional.l1_loss(ours, goal)
        return dict(loss=pixel_loss + align_loss, pixel_loss=pixel_loss, align_loss=align_loss)


class Step:
    """The published training step: forward, host read-back, backward, AdamW, synchronise."""

    def __init__(self, model: DMAE, dtype: torch.dtype, lr: float = 1.5e-4) -> None:
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device.type
        self.optimizer = torch.optim.AdamW(parameter_groups(model.trained()), lr=lr, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(self.device, enabled=dtype == torch.float16)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
        autocast = torch.autocast(self.device, self.dtype) if self.dtype.itemsize == 2 else contextlib.nullcontext()
        with autocast:
            return self.model(images, noise, mask_ratio)

    def __call__(self, images: Tensor, noise: Tensor, mask_ratio: float) -> float:
        loss = self.forward(images, noise, mask_ratio)["loss"]
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value}")
        self.scaler.scale(loss).backward()
        self.model._mark("optimiser")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return value


def parameter_groups(parameters: dict[str, nn.Parameter]) -> list[dict]:
    """Weight decay 0.05, and none on 1-D tensors and biases."""
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and not name.endswith(".bias")]
    plain = [p for name, p in parameters.items() if p.ndim <= 1 or name.endswith(".bias")]
    return [dict(params=decayed, weight_decay=0.05), dict(params=plain, weight_decay=0.0)]
