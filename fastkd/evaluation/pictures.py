"""Both probes of pictures that are in memory, as the demos and benchmarks use them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.models.vit import VisionTransformer

from .knn import knn


class Scores(NamedTuple):
    """Held-out accuracy in [0, 1] of the two probes."""

    knn: float
    linear: float


@torch.no_grad()
def features(model: VisionTransformer, images: Tensor, batch_size: int = 250) -> Tensor:
    """Mean of the unmasked patch tokens after the final norm.

    Args:
        model: any `VisionTransformer`, not truncated.
        images: uint8 [N, H, W, C], the model's own mean and std are applied; or floating [N, C, H, W], normalised.
        batch_size: pictures per forward pass.

    Returns:
        [N, D] float32 on the CPU.
    """
    device = model.patch_embed.proj.weight.device
    was_training = model.training
    model.eval()
    pooled = [
        model(chunk.to(device)).tokens[:, model.num_prefix_tokens :].float().mean(1).cpu()
        for chunk in images.split(batch_size)
    ]
    model.train(was_training)
    return torch.cat(pooled)


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 10) -> float:
    """Share of test rows whose k nearest train rows (cosine similarity) vote for the right class.

    Args:
        train, test: [N, D] and [M, D] features.
        train_labels, test_labels: [N] and [M] int64.
        k: neighbours that vote; a tie goes to the lowest class.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"knn_accuracy: k: got {k}, expected 1 to {len(train)}, the number of train rows")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    best = knn(train, train_labels, test, classes, [k], lambda votes: votes.argmax(1))[k, "plain"]
    return int((best == test_labels).sum()) / len(test)


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a logistic regression (L2, C = 1) on features standardised by the train rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train.numpy(), train_labels.numpy())
    return float(np.mean(probe.predict(test.numpy()) == test_labels.numpy()))


def evaluate(model: VisionTransformer, train, test, *, k: int = 10) -> Scores:
    """Both probes of `model`; train and test are `Pictures` (images, labels)."""
    return _scores(features(model, train.images), features(model, test.images), train, test, k)


def pixel_scores(train, test, *, k: int = 10) -> Scores:
    """Both probes of the bare pixels, for scale."""
    fitted, held_out = (part.images.flatten(1).float() / 255 for part in (train, test))
    return _scores(fitted, held_out, train, test, k)


def _scores(fitted: Tensor, held_out: Tensor, train, test, k: int) -> Scores:
    data = fitted, train.labels, held_out, test.labels
    return Scores(knn_accuracy(*data, k=k), linear_accuracy(*data))
