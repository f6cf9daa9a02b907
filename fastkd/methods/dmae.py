"""DMAE: Masked Autoencoders Enable Efficient Knowledge Distillers (Bai et al., CVPR 2023).

A student is pre-trained as a masked autoencoder; besides reconstructing pixels, its feature at about 3/4 depth is
pulled to that of a frozen teacher, which sees the same visible patches:

    loss = pixel_loss + alpha * sum_pairs mean |u(teacher) - u(project(student))|          u(x) = x / |x|

Exact savings (same loss and gradients as the plain formula): only visible patches are embedded, the teacher ends
at its deepest aligned block and has no decoder, and the decoder works on masked tokens alone where visible ones
have no influence (`fastkd.models.mae`). Inexact savings are options: `decode_fraction`, `reconstruct`, and the
student's own ``decoder="cross"`` and `decoder_depth`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastkd import ops
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.teacher import Teacher
from fastkd.ops.masked.random_masking import Masking

PROJECTORS = ("linear", "mlp", None)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which the teacher runs beside the student; None where there is one queue alone."""
    return None if device.type != "cuda" or torch.compiler.is_compiling() else _stream(device)


@contextlib.contextmanager
def _forked(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs what is inside on `side`, after all that is queued so far; whoever uses its results waits for `side`.

    No tensor needs `record_stream`. What the teacher reads lives until the streams have joined. What it writes is freed
    after backward, and its memory is given out again to the side stream alone, which by then has waited for the main
    stream at the next fork. So it works inside a captured graph, too.
    """
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield


class DMAE(nn.Module):
    """Masked-autoencoder distillation of one student.

    Args:
        student: masked autoencoder to train.
        teacher: `Teacher`, ViT module, name or path (see `fastkd.models.load_vit`); None trains a plain MAE.
        student_blocks, teacher_blocks: aligned pairs of 0-based block indices; raw block outputs are compared.
        projector: ``"linear"`` or ``"mlp"`` (Linear-GELU-Linear) from student to teacher width, one per pair; None
            compares raw features without normalisation and needs equal widths.
        loss: ``"l1"``, ``"l2"``, ``"smooth_l1"`` or ``"cosine"``.
        alpha: weight of the alignment loss.
        decode_fraction: share of the masked patches that is reconstructed, a random subset per image (1 = all).
        reconstruct: False trains on features alone: the student stops at its deepest aligned block.

    `parameters()` and `state_dict()` hold the student and the projectors, never the teacher.
    """

    losses = ("loss", "pixel_loss", "align_loss")
    needs_target = False
    reads = ("images", "keys")

    def __init__(
        self,
        student: MaskedAutoencoderViT,
        teacher: Teacher | nn.Module | str | Path | None,
        student_blocks: Sequence[int] = (8,),
        teacher_blocks: Sequence[int] = (17,),
        projector: str | None = "linear",
        loss: str = "l1",
        alpha: float = 1.0,
        *,
        decode_fraction: float = 1.0,
        reconstruct: bool = True,
    ) -> None:
        super().__init__()
        if teacher is None:
            student_blocks = teacher_blocks = ()
        if len(student_blocks) != len(teacher_blocks):
            raise ValueError(
                f"DMAE: student_blocks and teacher_blocks: got {len(student_blocks)} and {len(teacher_blocks)} "
                "indices, expected pairs of equal number"
            )
        for index in student_blocks:
            if not 0 <= index < student.depth:
                raise ValueError(f"DMAE: student_blocks: got {index}, expected 0 to {student.depth - 1}")
        if projector not in PROJECTORS:
            raise ValueError(f"DMAE: projector: got {projector!r}, expected 'linear', 'mlp' or None")
        if not 0 < decode_fraction <= 1:
            raise ValueError(f"DMAE: decode_fraction: got {decode_fraction}, expected a number in (0, 1]")
        if teacher is None and not reconstruct:
            raise ValueError("DMAE: reconstruct=False needs a teacher: there would be nothing to learn from")
        self.student = student
        self.student_blocks = tuple(student_blocks)
        self.loss, self.alpha, self.projector = loss, alpha, projector
        self.decode_fraction, self.reconstruct = decode_fraction, reconstruct
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher(teacher, teacher_blocks)
        # In a tuple, so that nn.Module does not register it.
        self._teacher = (teacher,)
        heads = [] if teacher is None else [self._head(student, teacher) for _ in student_blocks]
        self.aligned_feature_projection_heads = nn.ModuleList(heads)
        if teacher is not None:
            self._check_teacher(teacher, tuple(teacher_blocks))

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher; it moves with the module but is not part of it."""
        return self._teacher[0]

    def _head(self, student: MaskedAutoencoderViT, teacher: Teacher) -> nn.Module:
        if self.projector == "linear":
            return nn.Linear(student.embed_dim, teacher.embed_dim)
        if self.projector == "mlp":
            width = teacher.embed_dim
            return nn.Sequential(nn.Linear(student.embed_dim, width), nn.GELU(), nn.Linear(width, width))
        if student.embed_dim != teacher.embed_dim:
            raise ValueError(
                f"DMAE: projector: got None with widths {student.embed_dim} (student) and {teacher.embed_dim} "
                "(teacher), expected equal widths; use projector='linear'"
            )
        return nn.Identity()

    def _check_teacher(self, teacher: Teacher, blocks: tuple[int, ...]) -> None:
        if teacher.grid != self.student.grid:
            raise ValueError(
                f"DMAE: teacher: got a grid of {teacher.grid[0]} x {teacher.grid[1]} patches, expected the student's "
                f"{self.student.grid[0]} x {self.student.grid[1]}; use the same patch count (patch_size, img_size)"
            )
        if tuple(teacher.blocks) != blocks:
            raise ValueError(f"DMAE: teacher_blocks: got {blocks}, expected the teacher's own {tuple(teacher.blocks)}")

    def after_step(self, step: int) -> None:
        """Nothing is averaged; see `fastkd.methods._method.Method`."""

    def training_state(self) -> dict[str, Tensor]:
        """The projectors: what a checkpoint keeps beside the student."""
        return self.aligned_feature_projection_heads.state_dict()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `training_state` gave."""
        self.aligned_feature_projection_heads.load_state_dict(state)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        return_pred: bool = False,
    ) -> dict[str, Tensor]:
        """One training forward.

        Args:
            imgs: uint8 [B, H, W, C], or floating [B, C, H, W] normalised with the student's mean and std.
            mask_ratio: share of masked patches.
            noise, keys: optional [B, L] or [B] int64 that fix the masks, see `fastkd.ops.random_masking`.
            return_pred: whether predictions are wanted too; the loss alone is made without storing them.

        Returns:
            loss, pixel_loss, align_loss: float32 scalars; mask [B, L], 1 = masked;
            with return_pred and reconstruction also pred [B, m, p * p * C] and ids_pred [B, m] int64, its patches.
        """
        batch, device = imgs.shape[0], imgs.device
        masking = ops.random_masking(batch, self.student.num_patches, mask_ratio, noise=noise, keys=keys, device=device)
        beside = None if self.teacher is None or self.teacher.sharded else _side_stream(device)
        with _forked(beside), record_function("fastkd.teacher"):
            targets = self._teacher_features(imgs, masking.ids_keep)
        with record_function("fastkd.student"):
            depth = None if self.reconstruct else max(self.student_blocks) + 1
            features = self.student(imgs, masking.ids_keep, taps=self.student_blocks, depth=depth)
        result: dict[str, Tensor] = {"mask": masking.mask}
        zero = torch.zeros((), device=imgs.device)
        pixel_loss = align_loss = zero
        if self.reconstruct:
            pixel_loss, extra = self._reconstruct(imgs, masking, features.tokens, return_pred)
            result.update(extra)
        if beside is not None:
            torch.cuda.current_stream(device).wait_stream(beside)
        with record_function("fastkd.align"):
            for head, index, target in zip(self.aligned_feature_projection_heads, self.student_blocks, targets):
                align_loss = align_loss + self._align(head, features.taps[index], target)
        loss = pixel_loss + self.alpha * align_loss if targets else pixel_loss
        return {"loss": loss, "pixel_loss": pixel_loss, "align_loss": align_loss, **result}

    def _teacher_features(self, imgs: Tensor, ids_keep: Tensor | None) -> list[Tensor]:
        if self.teacher is None:
            return []
        mean, std = self.teacher.mean, self.teacher.std
        if imgs.dtype != torch.uint8:
            # Undo the student's normalisation and apply the teacher's in one step.
            ours = list(zip(self.student.mean, self.student.std))
            mean, std = (
                [(m - m0) / s0 for m, (m0, s0) in zip(mean, ours)],
                [s / s0 for s, (_, s0) in zip(std, ours)],
            )
        return self.teacher(imgs, ids_keep, mean=mean, std=std)

    def _reconstruct(
        self, imgs: Tensor, masking: Masking, tokens: Tensor, return_pred: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        visible, total = masking.ids_keep.shape[1], masking.ids_shuffle.shape[1]
        if visible == total:
            raise ValueError("DMAE: mask_ratio: got a ratio that masks no patch, expected at least one masked patch")
        # The masked part of ids_shuffle is in random order, so its beginning is a uniform random subset.
        wanted = max(1, round(self.decode_fraction * (total - visible)))
        ids, student = masking.ids_shuffle[:, : visible + wanted], self.student
        with record_function("fastkd.decoder"):
            features = student.decode_features(tokens, ids)
        ids_pred, head = ids[:, visible:], student.decoder_pred
        with record_function("fastkd.pixel_loss"):
            statistics = dict(mean=student.mean, std=student.std) if imgs.dtype == torch.uint8 else {}
            loss = ops.linear_pixel_loss(
                features, head.weight, head.bias, imgs, ids_pred,
                student.patch_size, student.norm_pix_loss, **statistics,
            )  # fmt: skip
        return loss, {"pred": head(features), "ids_pred": ids_pred} if return_pred else {}

    @torch.no_grad()
    def patch_features(self, imgs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Aligned features of whole images, nothing masked, for pictures of them.

        Args:
            imgs: as for `forward`.

        Returns:
            Per aligned pair (projected student, teacher), float32 [B, L, Dt] each: the L patches in raster order.
        """
        targets = self._teacher_features(imgs, None)
        taps = self.student(imgs, taps=self.student_blocks, depth=max(self.student_blocks) + 1).taps
        ours, theirs = self.student.num_prefix_tokens, self.teacher.num_prefix_tokens
        heads = zip(self.aligned_feature_projection_heads, self.student_blocks, targets)
        return [(head(taps[index][:, ours:].float()), target[:, theirs:].float()) for head, index, target in heads]

    def _align(self, head: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = self._same_tokens(student, teacher)
        if self.projector == "linear":
            return ops.feature_alignment_loss(student, teacher, head.weight, head.bias, loss=self.loss)
        return ops.feature_alignment_loss(head(student), teacher, loss=self.loss, normalize=self.projector is not None)

    def _same_tokens(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Drops prefix tokens that only one side has: CLS meets CLS, registers meet nothing."""
        ours, theirs = self.student.num_prefix_tokens, self.teacher.num_prefix_tokens
        if ours == theirs <= 1:
            return student, teacher
        both_cls = self.student.cls_token is not None and self.teacher.class_token
        pick = (lambda x, n: torch.cat([x[:, :1], x[:, n:]], 1)) if both_cls else (lambda x, n: x[:, n:])
        return pick(student, ours), pick(teacher, theirs)
