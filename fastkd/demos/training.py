"""The training loop of the demos: pictures in memory, a fixed number of steps, everything drawn from one seed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastkd.methods.dmae import DMAE
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.train.optimizer import adamw, set_lr
from fastkd.train.schedule import lr_at


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimisation of one run: AdamW, linear warm-up over a tenth of the steps, half a cosine to zero."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    masks_per_image: int = 1
    """Masks under which each picture of a batch is seen; the batch holds so many times fewer pictures."""


def statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of each channel of uint8 [N, H, W, C] pictures, in units where white is 1."""
    pixels = images.flatten(0, 2).double() / 255
    return dict(mean=tuple(pixels.mean(0).tolist()), std=tuple(pixels.std(0).tolist()))


_random = threading.Lock()  # torch's default generator belongs to the whole process


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's default CPU generator starts from `seed` inside and goes on as before outside; one thread at a time."""
    with _random, torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch and BLAS compute on one thread.

    Models of this size gain little from a second thread, and on a busy machine threads that wait for each other cost
    a multiple of what they bring.
    """
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def masked_autoencoder(shape: dict, seed: int) -> MaskedAutoencoderViT:
    """A new masked autoencoder whose initial weights depend on `shape` and `seed` alone."""
    with seeded(seed):
        return MaskedAutoencoderViT(**shape)


def visible_ratio(num_patches: int, ratio: float) -> tuple[int, float]:
    """Visible patches at a mask ratio, at least one, and the ratio that leaves exactly so many.

    98 % of 49 patches would leave none: there the demo keeps one (97.96 %).
    """
    visible = int(num_patches * (1 - ratio))
    return (visible, ratio) if visible else (1, 1 - 1.5 / num_patches)


def fit(
    model: DMAE,
    images: Tensor,
    ratio: float,
    recipe: Recipe,
    seed: int,
    after_step: Callable[[int, dict[str, float]], None] | None = None,
) -> float:
    """Trains `model` in place; batches and masks depend on `seed` alone, so that methods can be compared in pairs.

    Args:
        images: uint8 [N, H, W, C] on the model's device.
        ratio: share of masked patches.
        after_step: called with the number of steps done and the losses (pixel_loss, align_loss); the time it takes
            does not count.

    Returns:
        Seconds of training: of this thread's processor on the CPU, of the clock on a GPU.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = adamw(model, recipe.lr, recipe.weight_decay)
    patches = model.student.num_patches
    _, ratio = visible_ratio(patches, ratio)
    clock = time.thread_time if images.device.type == "cpu" else time.perf_counter
    model.train()
    seconds = 0.0
    for step in range(recipe.steps):
        start = clock()
        # Half a step ahead: neither the first nor the last step has a learning rate of zero.
        set_lr(optimizer, lr_at(step + 0.5, lr=recipe.lr, warmup_epochs=recipe.steps / 10, epochs=recipe.steps))
        index = torch.randint(len(images), (recipe.batch_size // recipe.masks_per_image,), generator=random)
        index = index.repeat_interleave(recipe.masks_per_image)
        noise = torch.rand(recipe.batch_size, patches, generator=random)
        result = model(images[index.to(images.device)], ratio, noise.to(images.device))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses = {name: float(result[name].detach()) for name in ("pixel_loss", "align_loss")}
        seconds += clock() - start
        if after_step is not None:
            after_step(step + 1, losses)
    return seconds
