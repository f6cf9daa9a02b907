"""What demos of classifiers share: a small convolutional network, its training, its held-out accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd.methods._method import Method
from fastkd.train.optimizer import set_lr
from fastkd.train.schedule import lr_at

from .pictures import Pictures
from .training import seeded, statistics


class ConvNet(nn.Module):
    """Three stages of two convolutions each, at a half, a quarter and an eighth of the resolution; a linear head.

    Args:
        width: channels of the first stage; each later one has twice as many.
        classes: number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(*(self._stage(a, b) for a, b in zip(widths, widths[1:])))
        self.head = nn.Linear(widths[-1], classes)

    @staticmethod
    def _stage(in_chans: int, out_chans: int) -> nn.Sequential:
        layers = []
        for a, stride in ((in_chans, 2), (out_chans, 1)):
            layers += [nn.Conv2d(a, out_chans, 3, stride, 1, bias=False), nn.BatchNorm2d(out_chans), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images).mean((2, 3)))


def network(width: int, seed: int, classes: int = 10) -> ConvNet:
    """A new network; its weights depend on `width` and `seed` alone."""
    with seeded(seed):
        return ConvNet(width, classes)


def normalised(train: Pictures, test: Pictures) -> tuple[Tensor, Tensor]:
    """Float [N, 1, H, W] pictures of both parts, with the mean and deviation of the first."""
    known = statistics(train.images)
    mean, std = (torch.tensor(known[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return tuple((part.images.permute(0, 3, 1, 2).float() / 255 - mean) / std for part in (train, test))


def fit(
    method: Method, images: Tensor, target: Tensor, *, steps: int, lr: float, seed: int, batch_size: int = 64,
    weight_decay: float = 0.05, mix: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Trains in place: AdamW, warm-up over a tenth, half a cosine to 0; batches and flips depend on the seed alone."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(method.parameters(), lr, weight_decay=weight_decay, fused=True)
    method.train()
    for step in range(steps):
        set_lr(optimizer, lr_at(step + 0.5, lr=lr, warmup_epochs=steps / 10, epochs=steps))
        index = torch.randint(len(images), (batch_size,), generator=random)
        flip = torch.rand(batch_size, 1, 1, 1, generator=random) < 0.5
        batch = images[index]
        batch, wanted = torch.where(flip, batch.flip(3), batch), target[index]
        if mix is not None:
            batch, wanted = mix(batch, wanted, random)
        optimizer.zero_grad()
        method(batch, wanted)["loss"].backward()
        optimizer.step()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, classes] in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(500)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures that are classified correctly, in [0, 1]."""
    return (logits_of(model, images).argmax(1) == labels).float().mean().item()
