"""``fastkd distill --method selfdist``: further pre-training of a masked autoencoder, one phase a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastkd.train.config import ConfigError, RunConfig, problem

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class SelfDistillationConfig(RunConfig):
    """Pre-train a masked autoencoder further on unlabelled images, and again with itself as the teacher."""

    method: Literal["selfdist"] = "selfdist"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    student: str
    """The masked autoencoder to start from, the same one in both phases: a checkpoint with its decoder, or a run."""
    teacher: str = "none"
    """none: phase 1; the run of phase 1: phase 2, which starts again and stays near it."""
    mask_ratio: float = 0.75
    """Share of masked patches."""
    tokens: Literal["cls", "all"] = "cls"
    """What stays near the teacher's: the class token, or all tokens."""
    weight: float = 1.0
    """Weight of that distance beside the reconstruction."""
    norm_pix_loss: bool = True
    """Reconstruct pixels normalised per patch."""

    batch_size: int = 64
    """Images per process and forward pass."""
    lr: float | None = 1.5e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices, convolutions and tokens (never of norms and biases)."""
    warmup_epochs: float | None = 0.0
    """Epochs of linear warm-up."""
    cuda_graph: bool = False
    """Run the training step as one CUDA graph where one process trains on a GPU."""

    def problems(self) -> list[str]:
        found = super().problems()
        self._need(found, "mask_ratio", 0 < self.mask_ratio < 1, "a number between 0 and 1")
        self._need(found, "weight", self.weight >= 0, "at least 0")
        exists = Path(self.student).expanduser().exists()
        self._need(found, "student", exists, "a checkpoint or run of a masked autoencoder")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, SelfDistillationConfig]:
        import torch

        from fastkd.methods.self_distillation import FurtherPretrainer
        from fastkd.models import MaskedAutoencoderViT, load_vit
        from fastkd.train.build import EXPECTED, choose_amp, weights_of

        torch.manual_seed(self.seed)
        try:
            student = load_vit(weights_of(self.student), img_size=self.img_size)
            if not isinstance(student, MaskedAutoencoderViT):
                raise ValueError("got an encoder without decoder, expected a masked autoencoder")
        except EXPECTED as error:
            raise ConfigError([f"--student: {error}"]) from error
        changes = dict(img_size=student.img_size, in_chans=student.in_chans, amp=choose_amp(self.amp, device))
        if not 0 < int(student.num_patches * (1 - self.mask_ratio)) < student.num_patches:
            expected = f"at least one of {student.num_patches} patches visible and one masked"
            raise ConfigError([problem("mask_ratio", self.mask_ratio, expected)])
        try:
            teacher = None
            if self.teacher != "none":
                teacher = load_vit(weights_of(self.teacher), img_size=student.img_size)
            method = FurtherPretrainer(
                student, "teacher" if teacher is None else "student", teacher, self.mask_ratio, self.norm_pix_loss,
                self.tokens, self.weight, random_augmentation=True,
            )  # fmt: skip
        except EXPECTED as error:
            raise ConfigError([f"--teacher: {error}"]) from error
        return method.to(device).train(), dataclasses.replace(self, **changes)

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from fastkd.train.held_out import HeldOutLosses

        return HeldOutLosses(self, method, device, amp)

    def summary(self, method: nn.Module) -> str:
        phase = "phase 1" if self.teacher == "none" else f"phase 2, teacher {self.teacher}"
        return f"selfdist: {self.student}, {phase}, {100 * self.mask_ratio:.4g} % masked"
