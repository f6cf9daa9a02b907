"""Linear probes: many heads, one per learning rate, weight decay and scaling, trained at once on the same features.

All heads see the same batches. Their weights lie side by side, so a step of the whole sweep is one batched product
forward and one backward; softmax regression needs no automatic differentiation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOMENTUM = 0.9
LARGEST_BATCH, STEPS_PER_EPOCH = 1024, 10  # small sets take smaller batches: so many steps an epoch, at least
PART = 10  # one image in so many chooses the head
SCALINGS = ("standardized", "raw")


class Head(NamedTuple):
    """Settings of one head.

    Attributes:
        lr: peak learning rate per 256 images of batch.
        weight_decay: L2, as in torch's SGD; not of the bias.
        scaling: ``"standardized"`` features (mean 0, variance 1 over the training images), or ``"raw"``.
    """

    lr: float
    weight_decay: float = 0.0
    scaling: str = "standardized"


class Sweep(NamedTuple):
    """What a sweep found.

    Attributes:
        best: the chosen head.
        heads: all of them; accuracies: theirs on the part of the training images that chose, in the same order.
        probe: the best head, trained anew on all training images.
        batch_size: of that training.
    """

    best: Head
    heads: list[Head]
    accuracies: list[float]
    probe: Probe
    batch_size: int


class Probe:
    """Linear heads: weight [S, D, G * C], bias [S, 1, G * C] for S scalings of the features and G heads of each."""

    def __init__(self, heads: Sequence[Head], classes: int, mean: Tensor, std: Tensor) -> None:
        self.scalings = list(dict.fromkeys(head.scaling for head in heads))
        groups = [[head for head in heads if head.scaling == name] for name in self.scalings]
        self.heads, self.classes = [head for group in groups for head in group], classes
        self.mean, self.std = mean, std
        shape = len(groups), len(groups[0]) * classes
        self.weight, self.bias = mean.new_zeros(shape[0], len(mean), shape[1]), mean.new_zeros(shape[0], 1, shape[1])
        per_class = (mean.new_tensor([[head[i] for head in group] for group in groups]) for i in (0, 1))
        self._lr, self._decay = (v.repeat_interleave(classes, 1)[:, None] for v in per_class)
        self._momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def inputs(self, x: Tensor) -> Tensor:
        """Features [B, D] in each scaling: [S, B, D] float32."""
        x = x.to(self.mean.device).float()
        return torch.stack([(x - self.mean) / self.std if name == SCALINGS[0] else x for name in self.scalings])

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, heads, C]."""
        return self._logits(self.inputs(x)).permute(1, 0, 2, 3).flatten(1, 2)

    def _logits(self, inputs: Tensor) -> Tensor:
        out = torch.baddbmm(self.bias, inputs, self.weight)
        return out.view(*out.shape[:2], -1, self.classes)

    def step(self, x: Tensor, labels: Tensor, factor: float) -> None:
        """One SGD step of every head on its mean cross entropy; `factor` multiplies the learning rates."""
        inputs = self.inputs(x)
        error = self._logits(inputs).softmax(-1)
        target = labels.to(error.device).view(1, -1, 1, 1).expand(*error.shape[:3], 1)
        error.scatter_add_(-1, target, error.new_full((), -1.0).expand(target.shape))
        error = error.flatten(2) / len(x)
        gradients = torch.bmm(inputs.mT, error) + self._decay * self.weight, error.sum(1, keepdim=True)
        for value, momentum, gradient in zip((self.weight, self.bias), self._momenta, gradients):
            momentum.mul_(MOMENTUM).add_(gradient)
            value.sub_(self._lr * momentum, alpha=factor)


def sweep(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    lrs: Sequence[float],
    weight_decays: Sequence[float] = (0.0,),
    epochs: int = 100,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep:
    """Chooses a linear head and trains it, on nothing but these features.

    A tenth of the images, drawn from every class alike, is set aside. All heads train on the others; the one with the
    highest accuracy on the tenth (of equal ones that with the lowest loss) is trained anew on everything.

    Args:
        features: [N, D] of the training images, N >= 20; labels: [N] int64 in [0, classes).
        lrs, weight_decays: the grid, with both scalings of the features.
        epochs: passes over the features, at a learning rate that falls to 0 along half a cosine.
        seed: of the tenth and of the order of batches.

    Raises:
        ValueError: fewer than 20 images.
    """
    if len(features) < 2 * PART:
        raise ValueError(f"linear probe: got {len(features)} training images, expected at least {2 * PART}")
    grid = itertools.product(lrs, weight_decays, SCALINGS)
    fit, choose = split(labels, seed)
    trained = train(features, labels, classes, [Head(*values) for values in grid], fit, epochs, seed, device)
    accuracies, losses = judge(trained, features, labels, choose)
    order = sorted(range(len(accuracies)), key=lambda index: (-accuracies[index], losses[index]))
    best = trained.heads[order[0]]
    everything = torch.arange(len(labels))
    probe = train(features, labels, classes, [best], everything, epochs, seed, device)
    return Sweep(best, trained.heads, accuracies, probe, batch_size(len(labels)))


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of nine tenths and of one tenth of the images, at random, of each class in the same proportion."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, random within
    chosen = torch.arange(len(labels)) % PART == PART // 2
    return order[~chosen], order[chosen]


def batch_size(images: int) -> int:
    """Images per step of the heads."""
    return min(LARGEST_BATCH, max(1, images // STEPS_PER_EPOCH))


def train(
    features: Tensor,
    labels: Tensor,
    classes: int,
    heads: Sequence[Head],
    rows: Tensor,
    epochs: int,
    seed: int,
    device: torch.device | str,
) -> Probe:
    """Trains the heads on the given rows of features [N, D] and labels [N]."""
    probe = Probe(heads, classes, *_moments(features, rows, device))
    size = batch_size(len(rows))
    batches = len(rows) // size
    for done, batch in enumerate(_batches(rows, size, epochs, seed)):
        factor = size / 256 * 0.5 * (1 + math.cos(math.pi * done / (batches * epochs)))
        probe.step(features[batch.to(features.device)], labels[batch], factor)
    return probe


def judge(probe: Probe, features: Tensor, labels: Tensor, rows: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy and mean cross entropy of each head on some rows; a head that diverged has accuracy -1."""
    right, loss = probe.mean.new_zeros(len(probe.heads)), probe.mean.new_zeros(len(probe.heads))
    for batch in rows.split(LARGEST_BATCH):
        logits, target = probe.logits(features[batch.to(features.device)]), labels[batch].to(loss.device)
        right += (logits.argmax(-1) == target[:, None]).sum(0)
        loss -= logits.log_softmax(-1).gather(-1, target.view(-1, 1, 1).expand(-1, len(loss), 1)).sum((0, 2))
    right = torch.where(loss.isfinite(), right / len(rows), -1.0)
    return right.tolist(), (loss / len(rows)).nan_to_num(math.inf).tolist()


def _batches(rows: Tensor, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows, in another order in every epoch; the incomplete last one is left out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order[: len(rows) // size * size].split(size)


def _moments(features: Tensor, rows: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over some rows, [D] float32; of a constant one 1, as a divisor."""
    chunks = rows.split(65536)
    total = sum(features[c.to(features.device)].double().sum(0) for c in chunks)
    mean = total / len(rows)
    square = sum((features[c.to(features.device)].double() - mean).square().sum(0) for c in chunks)
    std = (square / len(rows)).sqrt()
    std = torch.where(std > 1e-6, std, 1.0)
    return mean.float().to(device), std.float().to(device)
