"""Self-distillation for further pre-training on text (Lee et al., ICLR 2023): masked language models.

The two phases of `fastkd.methods.self_distillation`, with the masked language model's loss in place of the masked
autoencoder's: of the words 15 % are chosen, of these 80 % become the mask token, 10 % a random word and 10 % stay
(Devlin et al. 2019); cross-entropy on the chosen words. h is the last hidden state of the first token ([CLS]) of the
text without masks. The paper gives no code for text; this follows its words and the code for pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastkd.models.frozen import Frozen
from fastkd.ops.features.cls_distillation import cls_distillation_loss

from .self_distillation import TwoPhases
from .teacher_vectors import class_vectors


def mask_words(
    input_ids: Tensor, maskable: Tensor, noise: Tensor, mask_token_id: int, vocab_size: int, mask_ratio: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Masks words as BERT does.

    Args:
        input_ids: [B, T] int64.
        maskable: [B, T] bool, False for special tokens and padding.
        noise: [3, B, T] uniform in [0, 1): which words are chosen, what becomes of them, and the random word.
        mask_token_id, vocab_size: of the tokeniser.
        mask_ratio: probability with which a word is chosen.

    Returns:
        (masked input_ids, chosen [B, T] bool).
    """
    chosen = (noise[0] < mask_ratio) & maskable
    words = torch.where(noise[1] < 0.8, mask_token_id, (noise[2] * vocab_size).long())
    return torch.where(chosen & (noise[1] < 0.9), words, input_ids), chosen


class TextFurtherPretrainer(TwoPhases):
    """Further pre-training of a masked language model of transformers; one object per phase.

    Args:
        model: any ``AutoModelForMaskedLM`` whose texts begin with a class token (BERT and its kin), padded on the
            right; start both phases from copies of the same one.
        mask_token_id: ``tokenizer.mask_token_id``.
        special_ids: ``tokenizer.all_special_ids``, which are never masked.
        phase: ``"teacher"`` or ``"student"``.
        teacher: the model of phase 1; copied without its language head, and frozen.
        mask_ratio: probability with which a word is chosen.
        weight: of the distillation loss.
        teacher_cache: [N, D] from `precompute_teacher` instead of the teacher.
        random_augmentation: whether texts change from epoch to epoch, which a cache does not allow.

    The student's dropout is active in both branches, as the model's configuration has it.
    """

    losses = ("loss", "mlm_loss", "distill_loss")

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int,
        special_ids: Sequence[int],
        phase: str = "teacher",
        teacher: nn.Module | None = None,
        mask_ratio: float = 0.15,
        weight: float = 1.0,
        teacher_cache: Tensor | None = None,
        *,
        random_augmentation: bool = False,
    ) -> None:
        width = model.config.hidden_size
        if teacher is not None:
            if teacher.config.hidden_size != width:
                raise ValueError(
                    f"TextFurtherPretrainer: teacher: got width {teacher.config.hidden_size}, expected the student's "
                    f"{width}"
                )
            teacher = Frozen(copy.deepcopy(getattr(teacher, "base_model", teacher)))
        if teacher_cache is not None and (teacher_cache.ndim != 2 or teacher_cache.shape[1] != width):
            raise ValueError(
                f"TextFurtherPretrainer: teacher_cache: got shape {tuple(teacher_cache.shape)}, expected (N, {width})"
            )
        super().__init__(model, phase, teacher, weight, teacher_cache, random_augmentation)
        self.mask_token_id, self.mask_ratio = mask_token_id, mask_ratio
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.register_buffer("special_ids", torch.tensor(sorted(special_ids)), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        index: Tensor | None = None,
        **inputs,
    ) -> dict[str, Tensor]:
        """One training forward.

        Args:
            input_ids: [B, T] int64, not masked.
            attention_mask: [B, T], 0 for padding; default: no padding.
            noise: optional [3, B, T] that fixes the masking, see `mask_words`.
            index: [B] int64, the texts' places in `teacher_cache`.
            **inputs: what else the model takes, such as token_type_ids.

        Returns:
            loss, mlm_loss, distill_loss: float32 scalars. mlm_loss is 0 where no word is chosen.
        """
        if noise is None:
            noise = torch.rand(3, *input_ids.shape, device=input_ids.device)
        inputs["attention_mask"] = attention_mask
        maskable = ~torch.isin(input_ids, self.special_ids)
        if attention_mask is not None:
            maskable = maskable & attention_mask.bool()
        masked, chosen = mask_words(input_ids, maskable, noise, self.mask_token_id, self.vocab_size, self.mask_ratio)
        with record_function("fastkd.mlm"):
            logits = self.student(input_ids=masked, **inputs).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            labels = torch.where(chosen, input_ids, -100)
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            mlm_loss = total / chosen.sum().clamp(min=1)
        if self.phase == "teacher":
            return self._sum("mlm_loss", mlm_loss, None)
        with record_function("fastkd.distill"):
            if self.teacher is None:
                target = self._constants(index, input_ids.device)
            else:
                with torch.no_grad():
                    target = class_vectors(self.teacher.model, input_ids, **inputs)
            distill_loss = cls_distillation_loss(class_vectors(self.student, input_ids, **inputs), target)
        return self._sum("mlm_loss", mlm_loss, distill_loss)
