"""PromptKD (Li et al. 2024): a tuned CLIP teaches a small one, on unlabelled pictures, through stored class vectors.

    stage 1     PromptTuning: prompts of the teacher learn from few labelled pictures; `PromptedCLIP.bank` then stores
                its text features once, for all classes
    stage 2     PromptKD: visual prompts and a projector of the student learn to give the teacher's probabilities, on
                pictures without labels; no text encoder is needed any more, nor in use

Stage 1 is the paper's learner PromptSRC (Khattak et al. 2023) without its averaging of prompts over epochs and its 60
hand-written templates: deep visual and text prompts, cross entropy, and three terms that hold features and logits near
those of the CLIP without prompts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.class_vectors import ClassVectorBank, FeatureProjector
from fastkd.models.frozen import Frozen
from fastkd.models.prompts import PromptedEncoder, PromptedText
from fastkd.ops import class_vector_kd, logit_loss

from ._method import Method


class PromptedCLIP(nn.Module):
    """A frozen transformers CLIPModel with learnable prompts on both sides: images -> logits of its classes.

    Args:
        clip: the model; its towers are used as they are.
        input_ids, attention_mask: [C, L], the tokenised class prompts, see `PromptedText`.
        length: prompts at each layer, visual and text.
        vision_depth, text_depth: layers that get prompts, from the first on; at most as many as the tower has.
        generator: draws the initial prompts.
    """

    def __init__(
        self,
        clip: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        length: int = 4,
        vision_depth: int = 9,
        text_depth: int = 9,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.image = PromptedEncoder.of_clip(clip, length, vision_depth, generator=generator)
        self.text = PromptedText(clip, input_ids, attention_mask, length, text_depth, generator=generator)
        self.mean, self.std = self.image.mean, self.image.std
        self.logit_scale = clip.logit_scale.detach().exp().item()

    def forward(self, images: Tensor) -> Tensor:
        image, text = F.normalize(self.image(images), dim=-1), F.normalize(self.text(), dim=-1)
        return self.logit_scale * image @ text.t()

    @torch.no_grad()
    def bank(self, class_names: list[str]) -> ClassVectorBank:
        """The text features, to be stored: nothing in them changes in stage 2."""
        return ClassVectorBank(F.normalize(self.text().float(), dim=-1), class_names)


class PromptTuning(Method):
    """Stage 1: the prompts of a CLIP from labelled pictures.

    Args:
        student: whose prompts are tuned; the teacher of stage 2.
        text_weight, image_weight, logit_weight: of the terms that keep the prompted CLIP near the plain one: mean
            absolute difference of the text features, of the image features, and divergence of the logits (mean over
            all elements). 0, 0, 0 leaves cross entropy alone.
    """

    losses = ("loss", "ce_loss", "text_loss", "image_loss", "logit_loss")

    def __init__(
        self,
        student: PromptedCLIP,
        *,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
    ) -> None:
        super().__init__(student)
        self.weights = text_weight, image_weight, logit_weight
        with torch.no_grad(), student.text.prompts.off():
            self.register_buffer("plain_text", F.normalize(student.text().float(), dim=-1), persistent=False)

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of a batch: uint8 [B, H, W, C] or normalised [B, C, H, W], labels [B]."""
        images, model = self.prepare(images), self.student
        image, text = F.normalize(model.image(images), dim=-1), F.normalize(model.text(), dim=-1)
        with torch.no_grad(), model.image.without_prompts():
            plain = F.normalize(model.image(images), dim=-1)
        logits = model.logit_scale * image @ text.t()
        plain_logits = model.logit_scale * plain @ self.plain_text.to(plain.dtype).t()
        ce = logit_loss(logits, target=target, ce=1.0)
        text_loss = F.l1_loss(text, self.plain_text.to(text.dtype))
        image_loss = F.l1_loss(image, plain)
        divergence = logit_loss(logits, plain_logits, kl=1.0) / logits.shape[1]
        total = ce
        for weight, loss in zip(self.weights, (text_loss, image_loss, divergence)):
            total = total + weight * loss
        return dict(zip(self.losses, (total, ce, text_loss, image_loss, divergence)))


class PromptStudent(nn.Module):
    """A prompted image encoder, its projector, and the class vectors: images -> logits, no text encoder.

    Args:
        encoder: images -> features [B, Ds].
        projector: features -> [B, Dt].
        bank: class vectors of the teacher, Dt wide.
        logit_scale: the student's own (CLIP: ``logit_scale.exp()``, frozen).
    """

    def __init__(
        self, encoder: nn.Module, projector: FeatureProjector, bank: ClassVectorBank, logit_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.logit_scale = encoder, projector, float(logit_scale)
        self.mean, self.std = getattr(encoder, "mean", None), getattr(encoder, "std", None)
        self.register_buffer("text_features", bank.text_features.clone())

    def project(self, images: Tensor) -> Tensor:
        """[B, Dt], not normalised."""
        return self.projector(self.encoder(images))

    def forward(self, images: Tensor, bank: ClassVectorBank | None = None) -> Tensor:
        """Logits of the student's classes, or of those of another bank (base, novel, another data set)."""
        text = self.text_features if bank is None else bank.text_features.to(self.text_features.device)
        return self.logit_scale * F.normalize(self.project(images).float(), dim=-1) @ text.t()


class PromptKD(Method):
    """Stage 2: a student learns a teacher's class probabilities on pictures without labels.

    Args:
        student: visual prompts and projector are trained; see `PromptStudent`.
        teacher: image encoder of the teacher, images -> features [B, Dt] (``tuned.image`` of stage 1); or None where
            features are passed to `forward`.
        temperature, weight, reduction: see `class_vector_kd`. The released weights are 1000, and 200 for FGVC-Aircraft,
            Flowers and DTD, with "mean_elements".
        teacher_logit_scale: the teacher's own scale.
    """

    needs_target = False

    def __init__(
        self,
        student: PromptStudent,
        teacher: nn.Module | None,
        *,
        temperature: float = 1.0,
        weight: float = 1000.0,
        reduction: str = "mean_elements",
        teacher_logit_scale: float = 100.0,
    ) -> None:
        super().__init__(student)
        self.teacher = teacher if teacher is None or isinstance(teacher, Frozen) else Frozen(teacher)
        self.options = dict(
            temperature=temperature, weight=weight, reduction=reduction, teacher_logit_scale=teacher_logit_scale
        )

    def forward(
        self, images: Tensor, target: Tensor | None = None, *, teacher_feature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of a batch: uint8 [B, H, W, C], or [B, C, H, W] normalised with the student's statistics.

        teacher_feature: [B, Dt], where it is stored (pictures that are not augmented); target is not used.
        """
        if teacher_feature is None:
            if self.teacher is None:
                raise ValueError("PromptKD: teacher_feature: got None, expected features, as there is no teacher")
            given = {} if images.dtype == torch.uint8 else dict(mean=self.mean, std=self.std)
            teacher_feature = self.teacher(images, **given).output
        student = self.student
        loss = class_vector_kd(
            student.project(self.prepare(images)), student.text_features, teacher_feature=teacher_feature,
            logit_scale=student.logit_scale, **self.options,
        )  # fmt: skip
        return {"loss": loss}
