"""Folders for the pipeline demo: tiles of photographs without labels, stamps with labels, each in two parts."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import stamps

PHOTOS = (Path("/usr/share/wallpapers"), Path("/usr/share/backgrounds/mate"))
HOW_TO_GET = (
    "apt install plasma-workspace-wallpapers mate-backgrounds (141 MB), or, without root: apt download both, unpack "
    "each with dpkg-deb -x, then --photos FOLDER; or any folder of photographs of your own"
)
# Debian's two packages are mostly art; these are their photographs.
PLASMA = "Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SHORT_SIDE, TILE = 800, 128  # pixels: a photograph is shrunk first, so that a tile shows more than texture
HELD_OUT = 6  # every sixth photograph, and of it every sixth tile, is only looked at
VAL_SHARE = 0.25
SAME = 3.0  # root mean square difference of two thumbnails, of 255, below which they are one picture


class Folders(NamedTuple):
    """What a seed learns from and is judged by.

    Attributes:
        unlabelled: seen tiles and the stamps of `train`; held_out: tiles of other photographs and the stamps of `val`.
        train, val: stamps in class folders.
    """

    unlabelled: Path
    held_out: Path
    train: Path
    val: Path

    def counts(self) -> dict[str, int]:
        """Pictures in each folder."""
        return {
            name: sum(len(files) for _, _, files in os.walk(folder, followlinks=True))
            for name, folder in self._asdict().items()
        }


def photographs(folders: Sequence[Path]) -> list[Path]:
    """The photographs below some folders: of Debian's packages those that are no art, of any other folder all.

    Raises:
        FileNotFoundError: none there; the message says how to get them.
    """
    found: list[Path] = []
    for folder in folders:
        # Resolved, for Plasma has many links to one picture.
        files = {path.resolve() for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in SUFFIXES}
        known = {path for path in files if path.parent.match("mate/nature")}
        known |= {path for path in files if path.match("*/contents/images/*") and path.parts[-4] in PLASMA.split()}
        found += sorted(known or files)
    if not found:
        got = ", ".join(map(str, folders))
        raise FileNotFoundError(f"photos: got no pictures in {got}, expected photographs; {HOW_TO_GET}")
    return found


def write_tiles(photos: Sequence[Path], out: Path) -> None:
    """Cuts photographs into disjoint tiles below `out`/seen and `out`/held_out, split by photograph; once."""
    if out.exists():
        return
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for number, path in enumerate(photos):
        held_out = number % HELD_OUT == HELD_OUT - 1
        folder = part / ("held_out" if held_out else "seen") / f"{number:03}"
        folder.mkdir(parents=True)
        with Image.open(path) as photo:
            photo = photo.convert("RGB")
        scale = min(1.0, SHORT_SIDE / min(photo.size))
        photo = photo.resize([max(TILE, round(side * scale)) for side in photo.size], Image.Resampling.BICUBIC)
        corners = [
            (left, top)
            for top in range(0, photo.height - TILE + 1, TILE)
            for left in range(0, photo.width - TILE + 1, TILE)
        ]
        for left, top in corners[:: HELD_OUT if held_out else 1]:
            photo.crop((left, top, left + TILE, top + TILE)).save(folder / f"{top}_{left}.jpg", quality=95)
    (part / "held_out").mkdir(exist_ok=True)
    part.rename(out)


def load_stamps(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """Stamps [N, size, size, 3] uint8 and their categories, each picture once.

    Mirrored and flipped copies are left out by name; of pictures that are alike as they are or mirrored the first
    stays. So no picture can be learnt from on one side of a split and be judged on the other.
    """
    found = stamps.load(folder, size)
    pixels = torch.nn.functional.adaptive_avg_pool2d(found.images.permute(0, 3, 1, 2).float(), 16)
    flat, mirrored = pixels.flatten(1), pixels.flip(3).flatten(1)
    gap = torch.minimum(torch.cdist(flat, flat), torch.cdist(flat, mirrored)) / flat.shape[1] ** 0.5
    copy = (gap < SAME).tril(diagonal=-1).any(1)
    categories = [name.split("/")[0] for name, double in zip(found.folders, copy.tolist()) if not double]
    return found.images[~copy], categories


def split(labels: Sequence[str], seed: int) -> list[bool]:
    """Whether each picture is held out: a quarter of every category, at least one and never all."""
    draw = random.Random(seed)
    held_out = [False] * len(labels)
    for name in sorted(set(labels)):
        here = [index for index, label in enumerate(labels) if label == name]
        count = min(max(1, round(VAL_SHARE * len(here))), len(here) - 1)
        for index in draw.sample(here, count):
            held_out[index] = True
    return held_out


def write(images: Tensor, labels: Sequence[str], tiles: Path, out: Path, seed: int) -> Folders:
    """Writes the stamps of one seed below `out` and links the unlabelled pictures together.

    A margin goes around each stamp, as wide as what the evaluation view of a picture cuts off.
    """
    folders = Folders(out / "unlabelled", out / "held_out", out / "train", out / "val")
    if out.exists():
        return folders
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    margin = images.shape[1] // 14
    for index, (image, name, held_out) in enumerate(zip(images, labels, split(labels, seed))):
        folder = part / ("val" if held_out else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        framed = torch.nn.functional.pad(image, (0, 0, margin, margin, margin, margin), value=255)
        Image.fromarray(framed.numpy()).save(folder / f"{index:03}.png")
    for kind, side, photos in (("unlabelled", "train", "seen"), ("held_out", "val", "held_out")):
        (part / kind).mkdir()
        (part / kind / "stamps").symlink_to(f"../{side}")
        (part / kind / "photographs").symlink_to(os.path.relpath(tiles / photos, out / kind))
    part.rename(out)
    return folders
