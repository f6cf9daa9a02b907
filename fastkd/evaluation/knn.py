"""Nearest neighbours by cosine similarity, among as many features as the memory of the host holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, KEYS = 512, 65536  # rows compared at a time: never all pairs


def neighbours(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query.

    Args:
        keys: [N, D], queries: [M, D]; any floating dtype, compared in float32 on the device of `queries`.
        k: 1 to N.

    Returns:
        cosine similarities [M, k] float32, highest first, and indices of the keys [M, k] int64.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"neighbours: k: got {k}, expected 1 to {len(keys)}, the number of keys")
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(keys), KEYS):
        chunk = F.normalize(keys[start : start + KEYS].to(queries.device).float(), dim=1)
        found, index = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1)
        merged, order = torch.cat([best, found], 1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
        best, where = merged, torch.cat([where, index + start], 1).gather(1, order)
    return best, where


def votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float | None = None) -> Tensor:
    """Votes of neighbours for each class.

    Args:
        similarity: [M, k] cosines, labels: [M, k] int64 classes of those neighbours.
        temperature: a vote weighs exp(cosine / temperature); None: every vote weighs 1.

    Returns:
        [M, classes] float32.
    """
    weight = torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()
    return torch.zeros(len(labels), classes, device=labels.device).scatter_add_(1, labels, weight)


def knn(
    keys: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    ks: Sequence[int],
    rank,
    *,
    temperature: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[tuple[int, str], Tensor]:
    """Classes of queries by the votes of their neighbours, for several k at the cost of the largest.

    Args:
        keys: [N, D] with labels [N] int64; queries: [M, D].
        ks: numbers of neighbours, each 1 to N.
        rank: what is made of the votes [m, classes] of some queries: a tensor [m, ...].
        temperature: of the weighted vote; None counts plain votes only.

    Returns:
        (k, "plain" or "weighted") -> [M, ...], what `rank` made, in the order of the queries.
    """
    labels = labels.to(device)
    kinds = {"plain": None} if temperature is None else {"plain": None, "weighted": temperature}
    parts: dict[tuple[int, str], list[Tensor]] = {(k, kind): [] for k in ks for kind in kinds}
    for rows in queries.split(QUERIES):
        similarity, index = neighbours(keys, rows.to(device), max(ks))
        for (k, kind), made in parts.items():
            made.append(rank(votes(similarity[:, :k], labels[index[:, :k]], classes, kinds[kind])))
    return {key: torch.cat(made) for key, made in parts.items()}
