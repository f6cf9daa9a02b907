"""From a file to a uint8 array [height, width, channels]: decode, crop, resize, flip.

The crops are those of torchvision on PIL images (bicubic with antialias), pixel for pixel. The one difference: a
JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size by libjpeg, as long as at least twice the
wanted resolution remains, which makes a crop of a camera picture several times cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from .reading import Picture, is_turned, opened, upright

_REMAINING = 2  # a reduced decode keeps at least this multiple of the wanted resolution

Box = tuple[int, int, int, int]
Size = tuple[int, int]


def _crop(image: Image.Image, choose, size: Size, channels: int) -> np.ndarray:
    """Decodes an opened file and returns the box that `choose((height, width))` names, resized to `size`."""
    full = image.size[::-1] if is_turned(image) else image.size  # upright (width, height)
    top, left, height, width = choose((full[1], full[0]))
    if image.format in ("JPEG", "MPO"):
        spare = min(height / size[0], width / size[1]) / _REMAINING
        reduction = next((r for r in (8, 4, 2) if r <= spare), 1)
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
    image = upright(image, channels)
    target, bicubic = (size[1], size[0]), Image.Resampling.BICUBIC
    if image.size == full:
        return np.asarray(image.crop((left, top, left + width, top + height)).resize(target, bicubic))
    rx, ry = image.width / full[0], image.height / full[1]  # reduced: the box may begin between two pixels
    box = (left * rx, top * ry, min((left + width) * rx, image.width), min((top + height) * ry, image.height))
    return np.asarray(image.resize(target, bicubic, box=box))


def random_box(
    random: np.random.Generator,
    image_size: Size,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Box (top, left, height, width) of a random resized crop (Inception-style, as torchvision draws it).

    The area is uniform in `scale` (share of the image), the aspect ratio log-uniform in `ratio`; after ten boxes that
    do not fit, the largest central box whose ratio is allowed.
    """
    rows, columns = image_size
    for _ in range(10):
        area = rows * columns * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top = int(random.integers(0, rows - height + 1))
            return top, int(random.integers(0, columns - width + 1)), height, width
    aspect = min(max(columns / rows, ratio[0]), ratio[1])
    width = min(columns, max(1, round(rows * aspect)))
    height = min(rows, max(1, round(columns / aspect)))
    return (rows - height) // 2, (columns - width) // 2, height, width


def open_image(picture: Picture, channels: int = 3) -> Image.Image:
    """The whole `picture` upright, RGB (channels=3) or grey (1), transparency on white."""
    with opened(picture) as image:
        return upright(image, channels)


def random_resized_crop(
    picture: Picture,
    size: Size,
    random: np.random.Generator,
    *,
    channels: int = 3,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> np.ndarray:
    """Training view: random resized crop and horizontal flip.

    Args:
        picture: path of a file, or its bytes.
        size: (height, width) of the view.
        random: draws box and flip.
        channels: 3 (RGB) or 1 (grey).
        scale: share of the picture's area that the crop covers, smallest and largest.
        ratio: of its width to its height, smallest and largest.
        flip: probability.

    Returns:
        uint8 [height, width, channels].
    """
    with opened(picture) as image:
        view = _crop(image, lambda full: random_box(random, full, scale, ratio), size, channels)
    if random.random() < flip:
        view = view[:, ::-1]
    return view.reshape(*size, channels)


def center_box(full: Size, size: Size, share: float = 0.875) -> Box:
    """The central box of the wanted shape that covers `share` of the shorter fit in an image of (height, width)."""
    unit = min(full[0] / size[0], full[1] / size[1]) * share
    height, width = max(1, round(size[0] * unit)), max(1, round(size[1] * unit))
    return (full[0] - height) // 2, (full[1] - width) // 2, height, width


def center_crop(picture: Picture, size: Size, *, channels: int = 3, share: float = 0.875) -> np.ndarray:
    """Evaluation view: the central box of the wanted shape that covers `share` of the shorter fit, resized.

    With share=0.875 and a square size this is the usual "resize to size / 0.875, crop the centre". Arguments otherwise
    as in `random_resized_crop`; uint8 [height, width, channels].
    """
    with opened(picture) as image:
        return _crop(image, lambda full: center_box(full, size, share), size, channels).reshape(*size, channels)


def shrink(picture: Picture, short_side: int, channels: int = 3) -> np.ndarray:
    """The whole picture, its shorter side shrunk to `short_side` (never enlarged); uint8 [height, width, channels]."""
    with opened(picture) as image:
        height, width = image.size if is_turned(image) else image.size[::-1]
        scale = min(1.0, short_side / min(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return _crop(image, lambda full: (0, 0, *full), size, channels).reshape(*size, channels)


def load_images(
    pictures: Iterable[Picture], size: int | Size, *, channels: int = 3, share: float = 0.875
) -> torch.Tensor:
    """The `center_crop` of each of some pictures as one uint8 tensor [N, height, width, channels]."""
    size = (size, size) if isinstance(size, int) else size
    return torch.from_numpy(np.stack([center_crop(each, size, channels=channels, share=share) for each in pictures]))
