"""MIC: Masked Image Consistency for Context-Enhanced Domain Adaptation (Hoyer et al., CVPR 2023).

A student learns from labelled source images. On unlabelled target images a running average of it, the teacher, gives
labels to the complete image; the student must find them on the image with random square patches set to zero, and so
learns to tell what something is from what is around it:

    loss = CE(student(source), target) + weight * consistency
    consistency = mean_i q_i CE(student(mask * view(x)), label)_i      label and trust q from teacher(x)

`view` is colour jitter and blur, for the student alone. Where the formulas of the paper and of its released code differ
the code is followed: q of a segmentation is the share of pixels whose probability reaches the threshold, one number for
the batch; classification weighs each image with the probability of its label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastkd.models.ema import EMATeacher
from fastkd.ops import mask_image, masked_consistency_loss, pseudo_label

from ._method import Method
from .student_view import student_view

MASKED = ("target", "source", "both")
# What the released code sets for a task.
DEFAULTS = {
    "segmentation": dict(alpha=0.999, block_size=64, mask_ratio=0.7, confidence="quality"),
    "classification": dict(alpha=0.9, block_size=64, mask_ratio=0.7, confidence="prob"),
}


class MaskedImageConsistency(Method):
    """Masked image consistency between a student and its own running average.

    Args:
        student: maps images [B, C, H, W] to logits, [B, K, h, w] or [B, K]. Logits of a segmentation may be smaller
            than the label: the loss resizes them.
        alpha: share of the teacher that stays in an update (reached gradually, see `fastkd.models.ema.EMATeacher`).
        block_size: side of a masked patch in pixels.
        mask_ratio: probability with which a patch is masked.
        task: ``"segmentation"`` or ``"classification"``. Of detection there are the parts, see docs/methods/mic.md.
        weight: of the consistency loss.
        confidence: how labels are trusted, ``"quality"``, ``"prob"`` or ``"none"``, see `fastkd.ops.pseudo_label`.
        threshold, scope, ignore_top, ignore_bottom: of `fastkd.ops.pseudo_label`.
        ignore_index: label that is left out, but counts in the mean.
        masked: which images are learnt from masked: ``"target"`` with the teacher's labels, ``"source"`` with the given
            ones, or ``"both"``: the first half of the source batch and the second half of the target batch.
        jitter, blur: strength of the colour jitter, and share of blurred images, in the student's view of what is
            masked; 0 leaves the images as they are.
        mean, std: pixel statistics of the student.

    `state_dict()` holds the student and the teacher: a resumed run goes on with the same teacher.
    """

    losses = ("loss", "source_loss", "consistency_loss", "confidence")
    reads = ("images", "labels", "others")

    def __init__(
        self,
        student: nn.Module,
        alpha: float | None = None,
        block_size: int | None = None,
        mask_ratio: float | None = None,
        task: str = "segmentation",
        *,
        weight: float = 1.0,
        confidence: str | None = None,
        threshold: float = 0.968,
        scope: str = "batch",
        ignore_top: int = 0,
        ignore_bottom: int = 0,
        ignore_index: int = 255,
        masked: str = "target",
        jitter: float = 0.2,
        blur: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(student, mean=mean, std=std)
        if task not in DEFAULTS:
            raise ValueError(f"MaskedImageConsistency: task: got {task!r}, expected one of {', '.join(DEFAULTS)}")
        if masked not in MASKED:
            raise ValueError(f"MaskedImageConsistency: masked: got {masked!r}, expected one of {', '.join(MASKED)}")
        if weight < 0:
            raise ValueError(f"MaskedImageConsistency: weight: got {weight}, expected a number of at least 0")
        given = dict(alpha=alpha, block_size=block_size, mask_ratio=mask_ratio, confidence=confidence)
        chosen = DEFAULTS[task] | {name: value for name, value in given.items() if value is not None}
        self.teacher = EMATeacher(student, chosen["alpha"])
        self.block_size, self.mask_ratio = chosen["block_size"], chosen["mask_ratio"]
        self.trust = dict(weight=chosen["confidence"], threshold=threshold, scope=scope)
        if task == "segmentation":
            self.trust |= dict(ignore_top=ignore_top, ignore_bottom=ignore_bottom)
        self.task, self.weight, self.ignore_index, self.masked = task, weight, ignore_index, masked
        self.jitter, self.blur = jitter, blur

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_images: Tensor | None = None,
        *,
        valid_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One training forward.

        Args:
            images: source images, uint8 [B, H, W, C] or floating [B, C, H, W] normalised.
            target: their labels, [B, H, W] or [B], int64 (uint8).
            target_images: images of the target domain; None trains on the source alone (a warm-up, say).
            valid_mask: [B, H, W], where pseudo-labels of a segmentation are of use.
            noise: of the masks, see `fastkd.ops.block_mask`; None draws new ones.

        Returns:
            loss, source_loss, consistency_loss: float32 scalars, and the mean confidence in the pseudo-labels.
        """
        images = self.prepare(images)
        with record_function("fastkd.source"):
            source_loss = self._entropy(self.student(images), target)
        zero = torch.zeros_like(source_loss)
        if target_images is None:
            return {"loss": source_loss, "source_loss": source_loss, "consistency_loss": zero, "confidence": zero}
        with record_function("fastkd.consistency"):
            whole, label, trust = self._to_match(images, target, self.prepare(target_images), valid_mask)
            if self.jitter or self.blur:
                probability = 0.8 if self.jitter else 0.0
                whole = student_view(
                    whole, self.mean, self.std, strength=self.jitter, jitter_probability=probability,
                    blur_probability=self.blur,
                )  # fmt: skip
            hidden = mask_image(whole, self.block_size, self.mask_ratio, noise=noise)
            consistency_loss = self._entropy(self.student(hidden), label, trust)
        return {
            "loss": source_loss + self.weight * consistency_loss,
            "source_loss": source_loss,
            "consistency_loss": consistency_loss,
            "confidence": zero + 1 if trust is None else trust.mean(),
        }

    def _entropy(self, logits: Tensor, label: Tensor, trust: Tensor | None = None) -> Tensor:
        return masked_consistency_loss(logits, label, trust, ignore_index=self.ignore_index)

    def _to_match(
        self, images: Tensor, target: Tensor, target_images: Tensor, valid_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(images before view and mask, labels, trust) that the student learns from."""
        if self.masked == "source":
            return images, target, None
        options = dict(self.trust)
        if self.task == "segmentation":
            options |= dict(valid_mask=valid_mask, size=tuple(target_images.shape[2:]))
        with record_function("fastkd.teacher"):
            label, trust = pseudo_label(self.teacher(target_images), **options)
        if self.masked == "target":
            return target_images, label, trust
        half = len(images) // 2
        if half == 0 or images.shape != target_images.shape:
            raise ValueError(
                f"MaskedImageConsistency: target_images: got shape {tuple(target_images.shape)} with source images "
                f"{tuple(images.shape)}, expected the same shape and two images or more with masked='both'"
            )
        joined = (
            torch.cat((a[:half], b[half:])) for a, b in ((images, target_images), (target.to(label.dtype), label))
        )
        return *joined, torch.cat((torch.ones_like(trust[:half]), trust[half:]))

    def after_step(self, step: int) -> None:
        """Moves the teacher towards the student, as it is after `step` steps of the optimiser."""
        self.teacher.update(self.student, step)
