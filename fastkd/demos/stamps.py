"""Tux Paint's stamps: 430 colour pictures in folders, a line of text each (Debian, GPL-2: installed, not copied)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/tuxpaint/stamps")
HOW_TO_GET = (
    "apt install tuxpaint-stamps-default (Debian 12: 2022.06.04-1, 161 MB), or, without root: apt download "
    "tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps, then --stamps "
    "stamps/usr/share/tuxpaint/stamps"
)


class Stamps(NamedTuple):
    """Pictures [N, size, size, 3] uint8 on white squares, their captions, and their folders below the stamps' own."""

    images: Tensor
    captions: list[str]
    folders: list[str]


def load(folder: Path, size: int = 224) -> Stamps:
    """All stamps except symbols, cartoons and mirrored or flipped copies.

    Raises:
        FileNotFoundError: no stamps there; the message says how to get them.
    """
    from PIL import Image

    files = [p for p in sorted(Path(folder).rglob("*.png")) if not {"cartoon", "symbols"} & set(p.parts)]
    files = [p for p in files if not p.stem.endswith(("_mirror", "_flip"))]
    if not files:
        raise FileNotFoundError(f"stamps: got no pictures in {folder}, expected Tux Paint's; {HOW_TO_GET}")
    images, captions = [], []
    for path in files:
        with Image.open(path) as picture:
            picture = picture.convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
        images.append(np.asarray(square.convert("RGB").resize((size, size), Image.BICUBIC)))
        text = path.with_suffix(".txt")
        lines = text.read_text(errors="replace").splitlines() if text.exists() else []
        captions.append(lines[0].strip() if lines and lines[0].strip() else path.stem)
    folders = ["/".join(path.relative_to(folder).parts[:-1]) for path in files]
    return Stamps(torch.from_numpy(np.stack(images)), captions, folders)
