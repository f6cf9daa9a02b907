"""One side of CRD in its authors' steps: gathered rows as a tensor, a batched product, exponentials, logarithms."""

from __future__ import annotations

import torch
from torch import Tensor


def published(
    feature: Tensor, bank: Tensor, contrast_index: Tensor, z: Tensor, temperature: float = 0.07, eps: float = 1e-7
) -> Tensor:
    """Arguments of `fastkd.ops.crd_nce_loss`."""
    samples, columns = contrast_index.shape
    rows = torch.index_select(bank, 0, contrast_index.view(-1)).detach().view(samples, columns, -1)
    scores = torch.exp(torch.div(torch.bmm(rows, feature.view(samples, -1, 1)), temperature))
    scores = torch.div(scores, z.to(scores.dtype)).contiguous()
    noise = (columns - 1) / float(bank.shape[0])
    positive = scores.select(1, 0)
    from_data = torch.div(positive, positive.add(noise + eps)).log_()
    negative = scores.narrow(1, 1, columns - 1)
    from_noise = torch.div(torch.full_like(negative, noise), negative.add(noise + eps)).log_()
    return (-(from_data.sum(0) + from_noise.view(-1, 1).sum(0)) / samples).squeeze()
