"""USKD: a classifier teaches itself by customised soft labels (Yang et al., ICCV 2023, section 3.3).

    loss = ce_weight CE(z, y) + alpha L_target + beta L_other + mu L_weak        see `fastkd.ops.uskd_loss`

There is no teacher: the soft label of the target comes from the student's own logits z, those of the other classes from
their order, in which a linear head on an earlier feature has a say. That head is trained along and is no part of what
is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.models.taps import Taps, Where, blocks_of
from fastkd.nn import USKDLoss

from ._method import Method


class USKD(Method):
    """A classifier that learns from labels and from itself.

    Args:
        student: takes images [B, C, H, W] and returns logits [B, classes]; any of timm, or a module of your own.
        tap: where the weak head's feature comes from (see `fastkd.models.taps.Taps`). Default: of a ViT the block at
            half of the depth, of others (convolutional networks, Swin) the last stage but one.
        alpha, beta, mu, rank_score: see `fastkd.ops.uskd_loss`. Published: 1, 0.1, 0.005 on ImageNet, all 0.1 on
            CIFAR-100.
        ce_weight: of cross entropy, 1 as published.
        img_size, in_chans: of the images: the head is as wide as the feature turns out to be.

    The feature is the class token where there is one, else the mean over tokens or pixels.
    """

    losses = ("loss",)

    def __init__(
        self, student: nn.Module, *, tap: Where | None = None, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005,
        rank_score: str = "log", ce_weight: float = 1.0, img_size: int | tuple[int, int] = 224, in_chans: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(student)
        self._taps = (Taps(student, default_tap(student) if tap is None else tap),)  # in a tuple: no part of the module
        feature, logits = self._probe(img_size, in_chans)
        self.criterion = USKDLoss(
            feature.shape[1], logits.shape[1], alpha=alpha, beta=beta, mu=mu, rank_score=rank_score, ce_weight=ce_weight
        ).to(feature.device)

    @property
    def taps(self) -> Taps:
        """To be entered around compiled code, see `Taps`."""
        return self._taps[0]

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised for the student.
            target: [B] int64 classes; or [B, classes] scores of mixed images, of which the two largest are targets.

        Returns:
            loss: float32 scalar; logits: [B, classes] of the student, detached.
        """
        logits, (feature,) = self.taps(self.prepare(images))
        loss = self.criterion(self._pooled(feature), logits, target)
        return {"loss": loss, "logits": logits.detach()}

    def _pooled(self, feature: Tensor) -> Tensor:
        """[B, D] of tokens [B, T, D], maps [B, D, H, W], or [B, H, W, D] where the model says so."""
        if feature.ndim == 3:
            prefix = _prefix_tokens(self.student)
            return feature[:, 0] if prefix else feature.mean(1)
        if feature.ndim == 4:
            return feature.mean((1, 2) if getattr(self.student, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        return feature

    @torch.no_grad()
    def _probe(self, img_size: int | tuple[int, int], in_chans: int) -> tuple[Tensor, Tensor]:
        """Feature and logits of a blank picture."""
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        first = next(self.student.parameters())
        was_training = self.student.training
        self.student.eval()  # so that no running statistics see this picture
        try:
            logits, (feature,) = self.taps(torch.zeros(1, in_chans, *size, device=first.device, dtype=first.dtype))
        finally:
            self.student.train(was_training)
        return self._pooled(feature), logits


def default_tap(student: nn.Module) -> Where:
    """Half of the blocks of a ViT; else the last stage but one."""
    depth = len(blocks_of(student))
    return depth // 2 - 1 if _is_vit(student) and depth > 1 else max(depth - 2, 0)


def _is_vit(student: nn.Module) -> bool:
    return hasattr(student, "num_prefix_tokens") or isinstance(getattr(student, "cls_token", None), Tensor)


def _prefix_tokens(student: nn.Module) -> int:
    return getattr(student, "num_prefix_tokens", int(isinstance(getattr(student, "cls_token", None), Tensor)))
