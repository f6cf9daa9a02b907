"""Self-distillation for further pre-training (Lee et al., ICLR 2023).

Pre-training goes on, on a small set of unlabelled pictures of the target domain, without over-fitting to it:

    phase 1, "teacher"   from the initial weights theta_0:  loss = MAE(x)
    phase 2, "student"   from theta_0 again:                loss = MAE(x) + weight / B sum_b || h_S(x_b) - h_T(x_b) ||^2
    phase 3              fine-tuning of the student: a linear head on its class token

MAE is the masked autoencoder's loss on a random mask. h is the class token after the final norm of an unmasked picture;
the teacher h_T is the encoder of phase 1, frozen. The decoder of phase 2 starts from theta_0 too.

Exact savings (value and every gradient are those of the plain formula):

* the last block of h computes one query, one attention row and one MLP row, keys and values for all tokens;
* patches are embedded once, in shuffled order: the visible ones come first, so the masked branch reads a slice, and the
  class token of the full branch does not see the order;
* one backward pass over the sum;
* without augmentation h_T(x) is a constant per picture: `precompute_teacher` makes them once, 4 D bytes a picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastkd import ops
from fastkd.models.checkpoints import load_vit
from fastkd.models.frozen import Frozen
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.saving import check_vit, encoder
from fastkd.models.vit import VisionTransformer, head
from fastkd.ops.features.cls_distillation import cls_distillation_loss
from fastkd.ops.masked.random_masking import Masking

from ._method import Method


class TwoPhases(Method):
    """What both phases are made of, whatever the student reads.

    Args:
        student: network to train, with the initial weights theta_0 in both phases.
        phase: ``"teacher"`` or ``"student"``.
        teacher: frozen network of phase 1, or None.
        weight: of the distillation loss.
        teacher_cache: [N, ...] constants of `precompute_teacher`, kept on the device where they are.
        random_augmentation: whether a picture or text looks different in every epoch; then constants would be wrong.
    """

    needs_target = False

    def __init__(
        self, student: nn.Module, phase: str, teacher: nn.Module | None, weight: float, teacher_cache: Tensor | None,
        random_augmentation: bool,
    ) -> None:  # fmt: skip
        super().__init__(student)
        name = type(self).__name__
        if phase not in ("teacher", "student"):
            raise ValueError(f"{name}: phase: got {phase!r}, expected 'teacher' or 'student'")
        given = [argument for argument in (teacher, teacher_cache) if argument is not None]
        if phase == "student" and len(given) != 1:
            raise ValueError(
                f"{name}: teacher and teacher_cache: got {'both' if given else 'none'}, expected one of them in phase "
                "'student': the network of phase 1, or what precompute_teacher made of it"
            )
        if phase == "teacher" and given:
            raise ValueError(f"{name}: teacher: got one in phase 'teacher', expected None; use phase='student'")
        if teacher_cache is not None and random_augmentation:
            raise ValueError(
                f"{name}: teacher_cache: got constants with random_augmentation, expected one of them: the teacher's "
                "vector changes with the picture; pass the teacher itself"
            )
        if teacher_cache is not None and teacher_cache.requires_grad:
            raise ValueError(f"{name}: teacher_cache: got a tensor that requires grad, expected it detached")
        self.phase, self.weight = phase, weight
        self.teacher = teacher
        self._cache = teacher_cache

    def _constants(self, index: Tensor | None, device: torch.device) -> Tensor:
        """Rows of the cache."""
        if index is None:
            name = type(self).__name__
            raise ValueError(f"{name}: index: got None, expected [B] int64, the rows of teacher_cache of this batch")
        return self._cache[index.to(self._cache.device)].to(device, non_blocking=True)

    def _sum(self, name: str, loss: Tensor, distill_loss: Tensor | None) -> dict[str, Tensor]:
        if distill_loss is None:
            return {"loss": loss, name: loss, "distill_loss": torch.zeros_like(loss)}
        return {"loss": loss + self.weight * distill_loss, name: loss, "distill_loss": distill_loss}


class FurtherPretrainer(TwoPhases):
    """Further pre-training of a masked autoencoder; one object per phase.

    Args:
        model: masked autoencoder to train; start both phases from copies of the same one.
        phase: ``"teacher"``: plain MAE; ``"student"``: MAE and distance to the teacher.
        teacher: the model of phase 1 (or anything else that `fastkd.models.load_vit` takes), copied and frozen.
        mask_ratio: share of masked patches in the MAE branch.
        norm_pix_loss: whether pixel targets are normalised per patch.
        tokens: what is distilled: ``"cls"``, or ``"all"`` tokens (squared distance, mean over tokens and batch).
        weight: of the distillation loss.
        teacher_cache: [N, D] from `precompute_teacher` instead of the teacher ([N, T, D] with tokens="all").
        random_augmentation: whether pictures are augmented at random, which a cache does not allow.

    Raises:
        ValueError: no teacher in phase "student", a cache with random augmentation, or a teacher of another width.
    """

    losses = ("loss", "mae_loss", "distill_loss")

    def __init__(
        self,
        model: MaskedAutoencoderViT,
        phase: str = "teacher",
        teacher: nn.Module | str | Path | None = None,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        tokens: str = "cls",
        weight: float = 1.0,
        teacher_cache: Tensor | None = None,
        *,
        random_augmentation: bool = False,
    ) -> None:
        check_vit("FurtherPretrainer", model, MaskedAutoencoderViT)
        if tokens not in ("cls", "all"):
            raise ValueError(f"FurtherPretrainer: tokens: got {tokens!r}, expected 'cls' or 'all'")
        if teacher is not None:
            teacher = Frozen(encoder(load_vit(teacher, decoder_num_heads=1)))
            for name in ("embed_dim", "grid", "num_prefix_tokens", "mean", "std"):
                ours, theirs = getattr(model, name), getattr(teacher.model, name)
                if ours != theirs:
                    raise ValueError(f"FurtherPretrainer: teacher: got {name} {theirs}, expected the student's {ours}")
        tail = (model.embed_dim,) if tokens == "cls" else (model.num_prefix_tokens + model.num_patches, model.embed_dim)
        if teacher_cache is not None and teacher_cache.shape[1:] != tail:
            raise ValueError(
                f"FurtherPretrainer: teacher_cache: got shape {tuple(teacher_cache.shape)}, expected (N, "
                f"{', '.join(map(str, tail))}); make it with precompute_teacher(teacher, loader, tokens={tokens!r})"
            )
        super().__init__(model, phase, teacher, weight, teacher_cache, random_augmentation)
        self.mask_ratio, self.norm_pix_loss, self.tokens = mask_ratio, norm_pix_loss, tokens

    def forward(
        self, images: Tensor, keys: Tensor | None = None, *, noise: Tensor | None = None, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One training forward.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised with the student's mean and std.
            keys, noise: optional [B] int64 or [B, L] that fix the masks, see `fastkd.ops.random_masking`.
            index: [B] int64, the pictures' places in `teacher_cache`.

        Returns:
            loss, mae_loss, distill_loss: float32 scalars; distill_loss is 0 in phase "teacher".
        """
        student, distil = self.student, self.phase == "student"
        masking = ops.random_masking(
            images.shape[0], student.num_patches, self.mask_ratio, noise=noise, keys=keys, device=images.device
        )
        x = student.embed(images, masking.ids_shuffle if distil else masking.ids_keep)
        with record_function("fastkd.mae"):
            visible = head(x, student.num_prefix_tokens + masking.ids_keep.shape[1]) if distil else x
            mae_loss = self._reconstruct(images, masking, student.encode_tokens(visible))
        if not distil:
            return self._sum("mae_loss", mae_loss, None)
        with record_function("fastkd.distill"):
            features = student.encode_tokens(x, self.tokens)
            distill_loss = cls_distillation_loss(features, self._target(images, masking.ids_shuffle, index))
        return self._sum("mae_loss", mae_loss, distill_loss)

    def _reconstruct(self, images: Tensor, masking: Masking, tokens: Tensor) -> Tensor:
        student, pred = self.student, self.student.decoder_pred
        ids_masked = masking.ids_shuffle[:, masking.ids_keep.shape[1] :]
        if ids_masked.shape[1] == 0:
            raise ValueError("FurtherPretrainer: mask_ratio: got a ratio that masks no patch, expected a larger one")
        statistics = dict(mean=student.mean, std=student.std) if images.dtype == torch.uint8 else {}
        return ops.linear_pixel_loss(
            student.decode_features(tokens, masking.ids_shuffle), pred.weight, pred.bias, images, ids_masked,
            student.patch_size, self.norm_pix_loss, **statistics,
        )  # fmt: skip

    @torch.no_grad()
    def _target(self, images: Tensor, ids: Tensor, index: Tensor | None) -> Tensor:
        """The teacher's tokens, in the student's order."""
        if self.teacher is not None:
            return self.teacher.model.encode(images, self.tokens, ids)
        rows = self._constants(index, images.device)
        if self.tokens == "cls":
            return rows
        prefix = torch.arange(self.student.num_prefix_tokens, device=ids.device).expand(len(ids), -1)
        order = torch.cat([prefix, ids + prefix.shape[1]], 1)
        return rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))


class ClassTokenClassifier(nn.Module):
    """Phase 3: a fresh linear head on the class token of an encoder.

    Args:
        encoder: the student of phase 2; its decoder, if any, takes no part.
        num_classes: width of the output.
        dropout: on the class token, in training.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.head = nn.Linear(encoder.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images as for `VisionTransformer.forward` -> logits [B, num_classes]."""
        return self.head(self.dropout(self.encoder.encode(images)))


def fine_tuning_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict]:
    """Parameter groups of phase 3: no decay for biases, positions and the class token; weights of norms decay."""
    exempt = ("bias", "position_embeddings", "pos_embed", "cls_token")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if not any(word in name for word in exempt)]
    plain = [p for name, p in named if any(word in name for word in exempt)]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
