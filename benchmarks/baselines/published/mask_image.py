"""Block masking as MIC's released code does it: a mask of full size, then a product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def published(images: Tensor, block_size: int, mask_ratio: float, *, noise: Tensor) -> Tensor:
    keep = (noise > mask_ratio).float()
    mask = F.interpolate(keep, size=tuple(images.shape[2:]), mode="nearest")
    return images * mask
