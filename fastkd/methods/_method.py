"""What all methods have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.models.pixels import normalize, statistics_of


class Method(nn.Module):
    """A student and what trains it.

    `forward(images, target)` returns a dict of scalars: those named in `losses`, the one to minimise first. A method
    that needs no labels is called as ``forward(images, keys)``, with a number per image that fixes its random masks.
    `parameters()` and `state_dict()` hold the student and what is trained or averaged along with it (projectors, a mean
    teacher), never a frozen teacher. So a method can be wrapped, compiled and saved like any module.

    Attributes:
        student: the network that is exported.
        losses: names of the scalars in the result of `forward`, "loss" first.
        needs_target: whether `forward` needs labels.
        reads: fields of a `fastkd.data.Batch` that `forward` is called with.
        mean, std: pixel statistics of the student, in units where white is 1.
    """

    losses: tuple[str, ...] = ("loss",)
    needs_target: bool = True

    def __init__(
        self, student: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.student = student
        own = statistics_of(student)
        self.mean, self.std = tuple(mean or own[0]), tuple(std or own[1])

    @property
    def reads(self) -> tuple[str, ...]:
        return ("images", "labels" if self.needs_target else "keys")

    def prepare(self, images: Tensor) -> Tensor:
        """Images for the student: uint8 [B, H, W, C] are normalised; floating [B, C, H, W] come normalised."""
        return normalize(images, self.mean, self.std) if images.dtype == torch.uint8 else images

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step number `step`, counted from 1: averages of weights are updated here."""

    def training_state(self) -> dict[str, Tensor]:
        """`state_dict()` without the student: what a checkpoint keeps beside it."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("student.")}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `training_state` gave; RuntimeError where names or shapes differ."""
        own = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        self.load_state_dict({**own, **state})
