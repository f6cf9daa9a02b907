"""A teacher that is the running average of its student (mean teacher, Tarvainen and Valpola 2017)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastkd.ops import ema_update_

BUFFERS = ("keep", "copy", "ema")


class EMATeacher(nn.Module):
    """A copy of a network whose weights follow it: teacher <- a * teacher + (1 - a) * student.

    With warm-up a = min(1 - 1 / (step + 1), alpha): the first update copies, and early averages reach back no further
    than there are steps.

    Args:
        model: the student. The teacher starts as a copy of it, without gradients.
        alpha: share of the teacher that stays, in [0, 1).
        warmup: whether alpha is reached gradually as above.
        buffers: ``keep``, the teacher's buffers (statistics of BatchNorm) are its own, neither copied nor averaged;
            ``copy`` takes the student's; ``ema`` averages those that are floating, and copies the others.
        mode: ``train``, normalisation layers use (and track) statistics of the batch, while all else, dropout and
            stochastic depth above all, is as in evaluation; or ``eval``.

    MIC uses the defaults for segmentation, alpha = 0.9 for classification, and for detection alpha = 0.9 with
    ``warmup=False, buffers="ema", mode="eval"``.

    `state_dict()` holds the averaged network: it is a part of the training that a checkpoint must keep.
    """

    def __init__(
        self, model: nn.Module, alpha: float = 0.999, warmup: bool = True, buffers: str = "keep", mode: str = "train"
    ) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            raise ValueError(f"EMATeacher: alpha: got {alpha}, expected a number in [0, 1)")
        if buffers not in BUFFERS:
            raise ValueError(f"EMATeacher: buffers: got {buffers!r}, expected one of {', '.join(BUFFERS)}")
        if mode not in ("train", "eval"):
            raise ValueError(f"EMATeacher: mode: got {mode!r}, expected 'train' or 'eval'")
        self.alpha, self.warmup, self.buffers_rule, self.mode = alpha, warmup, buffers, mode
        self.model = copy.deepcopy(_plain(model)).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in its own mode, whatever the module around it does."""
        self.training = False
        self.model.eval()
        if self.mode == "train":
            for module in self.model.modules():
                if isinstance(module, _NormBase):
                    module.training = True
        return self

    def share(self, step: int) -> float:
        """a: what stays of the teacher in the update number `step`, counted from 0."""
        return min(1 - 1 / (step + 1), self.alpha) if self.warmup else self.alpha

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, left_out: Tensor | None = None) -> None:
        """Moves the teacher towards `model`.

        Args:
            step: number of the update, counted from 0.
            left_out: 0-d, on the device: where it is 1 the teacher stays as it is, and the host need not know.

        Raises:
            ValueError: its parameters differ from the teacher's in name or shape.
        """
        model, share = _plain(model), self.share(step)
        if left_out is not None:
            share = 1 - (1 - share) * (1 - left_out.double())
        _average(_paired("parameter", self.model.named_parameters(), model.named_parameters()), share)
        if self.buffers_rule != "keep":
            pairs = _paired("buffer", self.model.named_buffers(), model.named_buffers())
            _average(pairs, share if self.buffers_rule == "ema" else 0.0)

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        """The teacher's answer, without gradient."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` computes with the average's weights and the average with the model's; nothing is copied."""
        mine, theirs = ([*m.parameters(), *m.buffers()] for m in (self.model, _plain(model)))

        def swap() -> None:
            for a, b in zip(mine, theirs):
                a.data, b.data = b.data, a.data

        swap()
        try:
            yield
        finally:
            swap()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, warmup={self.warmup}, buffers={self.buffers_rule}, mode={self.mode}"


def _plain(model: nn.Module) -> nn.Module:
    """The network inside of torch.compile's or DistributedDataParallel's wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _paired(
    what: str, mine: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    mine, theirs = dict(mine), dict(theirs)
    if mine.keys() != theirs.keys():
        differing = sorted(mine.keys() ^ theirs.keys())[:3]
        raise ValueError(f"EMATeacher: model: got another set of {what}s than the teacher's: {', '.join(differing)}")
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise ValueError(
                f"EMATeacher: model: got {what} {name} of shape {tuple(theirs[name].shape)}, expected "
                f"{tuple(value.shape)} like the teacher's"
            )
    return [(value, theirs[name]) for name, value in mine.items()]


def _average(pairs: list[tuple[Tensor, Tensor]], share: float | Tensor) -> None:
    copy_all = not isinstance(share, Tensor) and share == 0
    copied = [(a, b) for a, b in pairs if copy_all or not a.is_floating_point()]
    averaged = [(a, b) for a, b in pairs if not copy_all and a.is_floating_point()]
    if copied:
        torch._foreach_copy_(*map(list, zip(*copied)))
    if averaged:
        ema_update_(*zip(*averaged), share)
