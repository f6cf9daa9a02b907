"""The losses between logits as `torch.nn` modules: ``forward(student_logits, teacher_logits, target=None)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import losses


class _Loss(torch.nn.Module):
    """Calls `function` with the options that the constructor was given.

    ``forward(student_logits, teacher_logits, target=None, **per_call)``; what belongs to a batch is given per call:
    ``sample_weight`` and ``num_items_in_batch``.
    """

    function: Callable[..., Tensor]

    def __init__(self, weight: Tensor | None = None, **options) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # moves with the module, as in torch.nn.CrossEntropyLoss
        self.options = options

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **per_call
    ) -> Tensor:
        return self.function(student_logits, teacher_logits, target, weight=self.weight, **self.options | per_call)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LogitLoss(_Loss):
    """`fastkd.ops.logit_loss` with fixed options: ``LogitLoss(ce=1, kl=0.9, temperature=4)``."""

    function = staticmethod(losses.logit_loss)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, target: Tensor | None = None, **per_call
    ) -> Tensor:
        return super().forward(student_logits, teacher_logits, target, **per_call)


class KDLoss(_Loss):
    """`fastkd.ops.kd_loss`: ``KDLoss(temperature=4, ce_weight=0.1, kd_weight=0.9)(student, teacher, target)``."""

    function = staticmethod(losses.kd_loss)

    def __init__(
        self, temperature: float = 4.0, ce_weight: float = 0.0, kd_weight: float = 1.0, weight: Tensor | None = None,
        ignore_index: int = -100, reduction: str = "batchmean", label_smoothing: float = 0.0, *, t_square: bool = True,
        inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            weight, temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, t_square=t_square, inplace=inplace,
        )  # fmt: skip


class DKDLoss(_Loss):
    """`fastkd.ops.dkd_loss`. With ``warmup`` epochs the weights of both parts grow linearly to alpha and beta; then
    call ``set_epoch(epoch)`` (from 1) at the start of each epoch, as for a `DistributedSampler`."""

    function = staticmethod(losses.dkd_loss)

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, ce_weight: float = 0.0,
        weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
        *, warmup: int = 0, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            weight, alpha=alpha, beta=beta, temperature=temperature, ce_weight=ce_weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, inplace=inplace,
        )  # fmt: skip
        self.alpha, self.beta, self.warmup = alpha, beta, warmup
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        ramp = min(epoch / self.warmup, 1.0) if self.warmup else 1.0
        self.options |= dict(alpha=ramp * self.alpha, beta=ramp * self.beta)


class NKDLoss(_Loss):
    """`fastkd.ops.nkd_loss`: ``NKDLoss(temperature=1, gamma=1.5, ce_weight=1)(student, teacher, target)``."""

    function = staticmethod(losses.nkd_loss)

    def __init__(
        self, temperature: float = 1.0, gamma: float = 1.5, ce_weight: float = 0.0, weight: Tensor | None = None,
        ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, *, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            weight, temperature=temperature, gamma=gamma, ce_weight=ce_weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, inplace=inplace,
        )  # fmt: skip


class JSDLoss(_Loss):
    """`fastkd.ops.jsd_loss`: ``JSDLoss(beta=0.5)(student, teacher, labels)``."""

    function = staticmethod(losses.jsd_loss)

    def __init__(
        self, beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100, reduction: str = "batchmean", *,
        normalize: bool = False, t_square: bool = False, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            beta=beta, temperature=temperature, ignore_index=ignore_index, reduction=reduction, normalize=normalize,
            t_square=t_square, inplace=inplace,
        )  # fmt: skip


class _Divergence(_Loss):
    def __init__(
        self, temperature: float = 1.0, ignore_index: int = -100, reduction: str = "batchmean", *,
        t_square: bool = False, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            temperature=temperature, ignore_index=ignore_index, reduction=reduction, t_square=t_square, inplace=inplace
        )


class ReverseKLLoss(_Divergence):
    """`fastkd.ops.reverse_kl_loss`: ``ReverseKLLoss()(student, teacher, labels)``."""

    function = staticmethod(losses.reverse_kl_loss)


class TVDLoss(_Divergence):
    """`fastkd.ops.tvd_loss`: ``TVDLoss()(student, teacher, labels)``."""

    function = staticmethod(losses.tvd_loss)
