"""What demos of classifiers share: scikit-learn's digits, a small network, its training, its held-out accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd.methods._method import Method
from fastkd.train.optimizer import set_lr
from fastkd.train.schedule import lr_at

from .training import seeded


class Digits(NamedTuple):
    """A split of the 1,797 digits, balanced in no part but the labelled one.

    Attributes:
        images: float [N, 1, 8, 8] in [0, 1]; the first pictures are the labelled ones.
        labels: int64 [N] of all of them, of which students may use the first `labelled`.
        labelled: how many pictures have a label.
        test_images, test_labels: held out.
    """

    images: Tensor
    labels: Tensor
    labelled: int
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int, each: int, held_out: int = 600) -> Digits:
    """A split that depends on the seed: `held_out` pictures aside, of the others `each` with a label per class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float()[:, None], torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:held_out], order[held_out:]
    chosen = torch.zeros(len(train), dtype=torch.bool)
    for digit in range(10):
        chosen[(labels[train] == digit).nonzero()[:each, 0]] = True
    train = torch.cat((train[chosen], train[~chosen]))
    return Digits(images[train], labels[train], int(chosen.sum()), images[test], labels[test])


class MLP(nn.Module):
    """Two hidden layers, which are its stages, and a linear head."""

    def __init__(self, width: int, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(a, width), nn.ReLU()) for a in (inputs, width))
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images.flatten(1)))


def network(width: int, seed: int) -> MLP:
    """A new network; its weights depend on `width` and `seed` alone."""
    with seeded(seed):
        return MLP(width)


def fit(
    method: Method, images: Tensor, target: Tensor, *, steps: int, lr: float, seed: int, batch_size: int = 64,
    noise: float = 0.0,
) -> None:  # fmt: skip
    """Trains in place: Adam, warm-up over a tenth, half a cosine to 0; batches depend on the seed alone.

    Args:
        noise: standard deviation of what is added to each pixel.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(method.parameters(), lr, fused=True)
    method.train()
    for step in range(steps):
        set_lr(optimizer, lr_at(step + 0.5, lr=lr, warmup_epochs=steps / 10, epochs=steps))
        index = torch.randint(len(images), (batch_size,), generator=random)
        batch = images[index]
        if noise:
            batch = batch + noise * torch.randn(batch.shape, generator=random)
        optimizer.zero_grad()
        method(batch, target[index])["loss"].backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the held-out pictures that are classified correctly, in [0, 1]."""
    return (model.eval()(data.test_images).argmax(1) == data.test_labels).float().mean().item()
