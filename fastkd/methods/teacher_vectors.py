"""What a frozen teacher says of each picture or text of a data set, made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.models.vit import VisionTransformer


def class_vectors(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs) -> Tensor:
    """Last hidden state of the first token, [B, D], of a transformers model with or without a language head."""
    base = getattr(model, "base_model", model)
    return base(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state[:, 0]


@torch.no_grad()
def precompute_teacher(teacher: nn.Module, loader: Iterable, tokens: str = "cls") -> Tensor:
    """The teacher's constants of a whole data set, for `teacher_cache`.

    Args:
        teacher: the model of phase 1: a `fastkd.models.VisionTransformer`, or a transformers model of text.
        loader: batches in a fixed order without random augmentation, read twice at the beginning to see that. Images
            [B, ...] alone or first in a tuple; for text mappings of input_ids [B, T] and attention_mask.
        tokens: ``"cls"`` or, for images, ``"all"``.

    Returns:
        [N, D] or [N, T, D] in the teacher's dtype on the CPU; row i belongs to the loader's i-th picture or text.

    Raises:
        ValueError: a loader that gives something else at the second reading.
    """
    batches = iter(loader)
    if batches is loader:
        raise ValueError("precompute_teacher: loader: got an iterator, expected a loader that can be read twice")
    device = next(teacher.parameters()).device
    was_training, rows, first = teacher.training, [], None
    teacher.eval()
    for batch in batches:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        first = batch if first is None else first
        if isinstance(teacher, VisionTransformer):
            vectors = teacher.encode(batch.to(device), tokens)
        else:
            vectors = class_vectors(teacher, **{name: value.to(device) for name, value in batch.items()})
        rows.append(vectors.cpu())
    teacher.train(was_training)
    if not rows:
        raise ValueError("precompute_teacher: loader: got no batch, expected at least one")
    if not _same(first, next(iter(loader))):
        raise ValueError(
            "precompute_teacher: loader: got another first batch at the second reading, expected the same; turn "
            "shuffling and random augmentation off, or train with the teacher itself instead of a cache"
        )
    return torch.cat(rows)


def _same(first: Any, again: Any) -> bool:
    again = again[0] if isinstance(again, (tuple, list)) else again
    if isinstance(first, Mapping):
        return all(torch.equal(first[name], again[name]) for name in first)
    return torch.equal(first, again)
