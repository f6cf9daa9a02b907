"""Scenes put together from pictures of Fashion-MNIST: four garments of one style, labelled pixel by pixel.

A style pairs a top with a companion: T-shirt and sandal, pullover and sneaker, coat and bag, shirt and ankle boot. The
four tops look alike at this size, their companions do not: what a top is can be told from what lies beside it. The
target domain shows the same kind of scenes at half the contrast and with noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import FASHION_CLASSES, Pictures

TOPS, COMPANIONS = (0, 2, 4, 6), (5, 7, 8, 9)  # classes of Fashion-MNIST, by style
SIZE, GARMENT = 32, 14
CLASSES = ("background", *(FASHION_CLASSES[c] for c in (*TOPS, *COMPANIONS)))
CONTRAST, NOISE = 0.5, 0.15


class Scenes(NamedTuple):
    """Grey scenes and the class of each pixel.

    Attributes:
        images: uint8 [N, 32, 32, 1].
        labels: uint8 [N, 32, 32], index into `CLASSES`.
    """

    images: Tensor
    labels: Tensor


def scenes(pictures: Pictures, count: int, shifted: bool, seed: int) -> Scenes:
    """`count` scenes of these pictures; `shifted`: as the target domain looks."""
    random = torch.Generator().manual_seed(seed)
    garments = F.avg_pool2d(pictures.images[..., 0].float() / 255, 2)
    style = torch.randint(0, 4, (count,), generator=random)
    canvas, labels = torch.zeros(count, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    members = [(pictures.labels == c).nonzero().flatten() for c in range(10)]
    inside = torch.arange(GARMENT)
    for slot in range(4):
        companion = torch.rand(count, generator=random) < 0.5
        which = torch.rand(count, generator=random)
        corner = torch.randint(0, 3, (2, count), generator=random) + torch.tensor([[slot // 2], [slot % 2]]) * SIZE // 2
        chosen = torch.empty(count, dtype=torch.int64)
        for kind, classes in ((False, TOPS), (True, COMPANIONS)):
            for s, c in enumerate(classes):
                here = (companion == kind) & (style == s)
                chosen[here] = members[c][(which[here] * len(members[c])).long()]
        pixels = garments[chosen]
        scene = torch.arange(count)[:, None, None]
        rows, columns = (corner[axis][:, None] + inside for axis in (0, 1))
        at = (scene, rows[:, :, None], columns[:, None])
        canvas[at] = pixels
        labels[at] = torch.where(pixels > 0.15, (1 + style + 4 * companion)[:, None, None], 0).byte()
    if shifted:
        canvas = CONTRAST * canvas + (1 - CONTRAST) / 2 + NOISE * torch.randn(canvas.shape, generator=random)
    return Scenes((canvas.clamp(0, 1) * 255).round().byte()[..., None], labels)
