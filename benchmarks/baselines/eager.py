"""`eager`: the same loss and gradients as `released` without the work that can be left out exactly, as a competent
PyTorch user would write it, with nothing of fastkd in it. `compiled` is torch.compile of this model.

The teacher stops at the aligned block; only visible patches are embedded, their pixels gathered first; the decoder
keeps the shuffled order (attention does not care), so that nothing is un-shuffled; its last block computes keys and
values for all tokens, and everything else for masked tokens only; targets are made for masked patches only; no host
synchronisation; fused AdamW.

Attention is either torch's scaled_dot_product_attention or written out, whichever is faster on the machine: the
benchmark measures both and takes the faster one.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from . import Recipe, released


def attend(q: Tensor, k: Tensor, v: Tensor, written_out: bool) -> Tensor:
    """[B, H, T, d] -> [B, T, H * d]."""
    if written_out:
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def run_block(block: released.Block, x: Tensor, written_out: bool, first: int = 0) -> Tensor:
    """One block. With `first` > 0, the outputs of tokens `first`... only: the others serve as keys and values."""
    attention, width = block.attn, x.shape[2]
    shape = (x.shape[0], -1, attention.heads, width // attention.heads)
    y = block.norm1(x)
    if first:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q = F.linear(y[:, first:], weight[:width], bias[:width])
        k, v = F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1)
    else:
        q, k, v = attention.qkv(y).chunk(3, dim=-1)
    q, k, v = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
    x = x[:, first:] + attention.proj(attend(q, k, v, written_out))
    return x + block.mlp(block.norm2(x))


class DMAE(released.DMAE):
    def __init__(self, recipe: Recipe, written_out: bool = False) -> None:
        super().__init__(recipe)
        self.written_out = written_out
        self.encoder_block = self.decoder_block = self.last_block = run_block
        teacher = self.teacher.requires_grad_(False)
        teacher.blocks = teacher.blocks[: recipe.teacher_tap + 1]
        for name in ("norm", "decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm",
                     "decoder_pred"):  # fmt: skip
            delattr(teacher, name)

    def gather_patches(self, images: Tensor, ids: Tensor) -> Tensor:
        """[B, n, C, p, p] pixels of the listed patches."""
        recipe = self.recipe
        side = recipe.image // recipe.patch
        tiles = images.unflatten(2, (side, recipe.patch)).unflatten(
            4, (side, recipe.patch)
        )  # [B, C, row, p, column, p]
        image = torch.arange(len(images), device=images.device)[:, None]
        return tiles[image, :, ids // side, :, ids % side]

    def embed(self, model: released.MaskedAutoencoder, patches: Tensor, ids: Tensor) -> Tensor:
        conv = model.patch_embed.proj
        x = F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias) + model.pos_embed[0, 1:][ids]
        cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, x], dim=1)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
        recipe, student = self.recipe, self.student
        self._mark("teacher")
        ids = torch.argsort(noise, dim=1)
        keep = recipe.visible(mask_ratio)
        visible, masked = ids[:, :keep], ids[:, keep:]
        patches = self.gather_patches(images, visible)
        with torch.no_grad():
            x = self.embed(self.teacher, patches, visible)
            for block in self.teacher.blocks:
                x = self.encoder_block(block, x, self.written_out)
            goal = F.normalize(x.float(), dim=-1)

        self._mark("student")
        x = self.embed(student, patches, visible)
        for index, block in enumerate(student.blocks):
            x = self.encoder_block(block, x, self.written_out)
            if index == recipe.student_tap:
                feature = x
        latent = student.norm(x)

        self._mark("decoder", latent)
        x = student.decoder_embed(latent)
        fill = student.mask_token.to(x.dtype).expand(len(x), recipe.patches - keep, -1)
        order = torch.cat([ids.new_zeros(len(x), 1), ids + 1], dim=1)
        x = torch.cat([x, fill], dim=1) + student.decoder_pos_embed[0][order]
        for block in student.decoder_blocks[:-1]:
            x = self.decoder_block(block, x, self.written_out)
        x = self.last_block(student.decoder_blocks[-1], x, self.written_out, 1 + keep)
        pred = student.decoder_pred(student.decoder_norm(x))

        self._mark("loss", pred)
        target = self.gather_patches(images, masked).permute(0, 1, 3, 4, 2).flatten(2)
        pixel_loss = F.mse_loss(pred.float(), target.float())
        align_loss = F.l1_loss(F.normalize(self.projector(feature).float(), dim=-1), goal)
        return dict(loss=pixel_loss + align_loss, pixel_loss=pixel_loss, align_loss=align_loss)


class Step:
    """Forward, backward, fused AdamW.

    Args:
        compile: None runs eagerly; ``"whole"`` compiles the loss function for each mask ratio; ``"blocks"`` compiles
            the transformer blocks alone, once for all ratios: nearly as fast to run, and much sooner compiled.
        compile_mode: mode of torch.compile.
    """

    def __init__(
        self,
        model: DMAE,
        dtype: torch.dtype,
        compile: str | None = None,
        compile_mode: str = "default",
        lr: float = 1.5e-4,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device.type
        groups = released.parameter_groups(model.trained())
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.device, enabled=dtype == torch.float16)
        self.compile, self.loss = compile, model
        if compile:
            torch._dynamo.config.recompile_limit = 64  # every ratio and dtype is its own graph
        if compile == "whole":
            self.loss = torch.compile(model, mode=compile_mode, dynamic=False)
        elif compile == "blocks":
            model.encoder_block = torch.compile(run_block, mode=compile_mode, dynamic=True)
            model.decoder_block = torch.compile(run_block, mode=compile_mode, dynamic=False)
            model.last_block = torch.compile(run_block, mode=compile_mode, dynamic=True)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> dict[str, Tensor]:
        if self.compile:
            torch.compiler.cudagraph_mark_step_begin()
        autocast = torch.autocast(self.device, self.dtype) if self.dtype.itemsize == 2 else contextlib.nullcontext()
        with autocast:
            return self.loss(images, noise, mask_ratio)

    def __call__(self, images: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
        loss = self.forward(images, noise, mask_ratio)["loss"]
        self.scaler.scale(loss).backward()
        self.model._mark("optimiser")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()
