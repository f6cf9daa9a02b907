"""NKD: normalised distillation (Yang et al., ICCV 2023, section 3.2), a loss on logits beside cross entropy.

    loss = ce_weight CE(z, y) - p_y log q_y - gamma T^2 sum over the other classes of p^ log q^

p = softmax(v) of the teacher, q = softmax(z) of the student; p^ and q^ are softmaxes at temperature T over the other
classes alone, so that both sum to 1 and can become equal. Everything comes out of one pass over the logits.
"""

from __future__ import annotations

from torch import nn

from .kd import KD


class NKD(KD):
    """A classifier that learns from another one by `fastkd.ops.nkd_loss`.

    Args:
        student: takes images [B, C, H, W] and returns logits [B, classes]; any of timm, or a module of your own.
        teacher: likewise, or a `Frozen`.
        temperature, gamma: published: 1, 1.5 on ImageNet with convolutional networks; 1, 1 with ViTs; 3, 3.5 on
            CIFAR-100.
        ce_weight: of cross entropy, 1 as published.

    Targets are classes, or scores [B, classes] of mixed images: of these the loss takes the largest, cross entropy all.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, temperature: float = 1.0, gamma: float = 1.5,
        ce_weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(student, teacher, "nkd", ce_weight=ce_weight, temperature=temperature, gamma=gamma)
