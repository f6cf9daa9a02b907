"""MaskAlign: Stare at What You See, Masked Image Modeling without Reconstruction (Xue et al., CVPR 2023).

A student sees a few patches of an image and must match, there, what a frozen teacher makes of the whole image:

    loss = sum_a w_a distance(head_a(sum_b W[a, b] student_b), whiten(teacher_a at the visible patches))

There is no decoder, no mask token and no pixel loss. Patches that the teacher's CLS token attends to are more likely to
be visible.

Exact savings (same loss and gradients as the plain formula): mixtures, heads and targets exist for layers with a weight
alone; teacher rows are gathered before they are normalised, and neither is stored; the teacher runs fused attention and
makes one more row of scores in its last block; it ends at the deepest layer that is needed; the student's final norm,
whose output nothing reads, is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastkd import ops
from fastkd.models.intact import IntactTeacher
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.saving import encoder
from fastkd.models.vit import VisionTransformer
from fastkd.nn import DynamicAlignment
from fastkd.ops.features.gather_whiten import NORMS
from fastkd.ops.masked.random_masking import Masking, uniforms

from ._method import Method

MASKS = ("attention", "random")


class MaskAlign(Method):
    """Alignment of visible tokens with a teacher that sees everything.

    Args:
        student: `VisionTransformer` to train; of a masked autoencoder the encoder is taken (sharing its weights).
        teacher: `IntactTeacher`, or what it takes: a ViT module, name or path, or a CLIP vision tower.
        mask_ratio: share of masked patches.
        mask: ``"attention"`` (visible patches are drawn by the teacher's attention) or ``"random"``.
        target_norm: ``whiten``, ``l2``, ``none`` or ``bn``, see `fastkd.ops.gather_whiten_smooth_l1`.
        fusion, head, layer_weights, loss: see `fastkd.nn.DynamicAlignment`. Layer counts must be equal but for
            ``fusion="sum"``.
        drop_path: stochastic depth of the student, rising linearly to this rate.

    `parameters()` and `state_dict()` hold the student and the alignment, never the teacher. The student's final norm is
    not trained: its gradient would be zero.
    """

    losses = ("loss",)
    needs_target = False

    def __init__(
        self,
        student: VisionTransformer,
        teacher: IntactTeacher | nn.Module | str | Path,
        mask_ratio: float = 0.7,
        mask: str = "attention",
        target_norm: str = "whiten",
        fusion: str = "linear",
        head: str = "linear",
        layer_weights: str = "top5",
        loss: str = "smooth_l1",
        *,
        drop_path: float = 0.0,
    ) -> None:
        if not isinstance(student, VisionTransformer):
            raise TypeError(f"MaskAlign: student: got {type(student).__name__}, expected a fastkd VisionTransformer")
        super().__init__(encoder(student) if isinstance(student, MaskedAutoencoderViT) else student)
        for name, value, known in (("mask", mask, MASKS), ("target_norm", target_norm, NORMS)):
            if value not in known:
                raise ValueError(f"MaskAlign: {name}: got {value!r}, expected one of {', '.join(known)}")
        if not isinstance(teacher, IntactTeacher):
            teacher = IntactTeacher(teacher, self.student.grid)
        if teacher.grid != self.student.grid:
            raise ValueError(
                f"MaskAlign: teacher: got a grid of {teacher.grid[0]} x {teacher.grid[1]} patches, expected the "
                f"student's {self.student.grid[0]} x {self.student.grid[1]}; use IntactTeacher(source, student.grid)"
            )
        if mask == "attention" and not teacher.class_token:
            raise ValueError("MaskAlign: mask: got 'attention' with a teacher without CLS token; use mask='random'")
        ops.random_masking(1, self.student.num_patches, mask_ratio)  # checks the ratio
        self.align = DynamicAlignment(
            self.student.depth, teacher.num_layers, self.student.embed_dim, teacher.embed_dim,
            fusion, head, layer_weights, loss,
        )  # fmt: skip
        self.mask_ratio, self.mask, self.target_norm = mask_ratio, mask, target_norm
        teacher.limit(self.align.used, mask == "attention")
        self.teacher = teacher
        self.student.norm.requires_grad_(False)
        self.student.set_drop_path(drop_path)

    def forward(self, images: Tensor, keys: Tensor | None = None, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One training forward.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised with the student's mean and std.
            keys: optional [B] int64 that fix the masks, see `fastkd.ops.random_masking`.
            noise: optional [B, L] numbers u in [0, 1) that fix them instead: as in `fastkd.ops.random_masking`, or, for
                masks by attention, through the exponential draws -log(1 - u).

        Returns:
            loss: float32 scalar; per_layer [layers used]: the layers' own losses, without gradient; mask [B, L], 1 =
            masked.
        """
        by_attention = self.mask == "attention"
        with record_function("fastkd.teacher"):
            view = self.teacher(images, self.align.used, by_attention, mean=self.mean, std=self.std)
        masking = self._masking(images, view.importance, noise, keys)
        student = self.student
        with record_function("fastkd.student"):
            taps = student(images, masking.ids_keep, taps=range(student.depth), depth=student.depth).taps
        with record_function("fastkd.align"):
            losses = self.align.per_layer(
                [self._common(taps[index]) for index in range(student.depth)],
                [view.features.get(index) for index in range(self.teacher.num_layers)],
                masking.ids_keep, norm=self.target_norm, num_prefix=self.teacher.num_prefix_tokens,
            )  # fmt: skip
        loss = sum(weight * value for weight, value in zip(self.align.weights, losses))
        return {"loss": loss, "per_layer": torch.stack(losses).detach(), "mask": masking.mask}

    def _masking(self, images: Tensor, importance: Tensor | None, noise: Tensor | None, keys: Tensor | None) -> Masking:
        patches, device = self.student.num_patches, images.device
        if importance is None:
            return ops.random_masking(len(images), patches, self.mask_ratio, noise=noise, keys=keys, device=device)
        if keys is not None:
            noise = uniforms(keys, patches)
        exp_noise = None if noise is None else -torch.log1p(-noise.to(device))
        return ops.attention_masking(importance, self.mask_ratio, exp_noise=exp_noise)

    def _common(self, tokens: Tensor) -> Tensor:
        """Without prefix tokens that the teacher has not: CLS meets CLS, registers meet nothing."""
        ours = self.student.num_prefix_tokens
        both = int(self.student.cls_token is not None and self.teacher.class_token)
        return tokens if ours == both else torch.cat([tokens[:, :both], tokens[:, ours:]], 1)
