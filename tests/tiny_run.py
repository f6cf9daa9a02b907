"""A folder of small pictures, and a student and a teacher that train on them in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastkd.models import MaskedAutoencoderViT, save
from fastkd.train.config import DistillConfig

SHAPE = dict(img_size=16, patch_size=4, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


def write_pictures(root: Path, count: int = 12, size: tuple[int, int] = (22, 26)) -> Path:
    """Smooth random pictures in two class folders."""
    random = np.random.default_rng(7)
    for index in range(count):
        folder = root / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03}.png")
    return root


def write_models(folder: Path) -> tuple[Path, Path]:
    """(student, teacher) files: 3 blocks of width 16 and 4 of width 32, images 16 x 16, patch 4."""
    torch.manual_seed(3)
    student = save(MaskedAutoencoderViT(embed_dim=16, depth=3, num_heads=2, **SHAPE), folder / "student.safetensors")
    teacher = save(MaskedAutoencoderViT(embed_dim=32, depth=4, num_heads=2, **SHAPE), folder / "teacher.safetensors")
    return student, teacher


def tiny_config(folder: Path, out: str = "run", **changes) -> DistillConfig:
    """A config over `write_pictures` and `write_models` in `folder`, which are made where they are missing."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
        write_models(folder)
    values = dict(
        student=str(folder / "student.safetensors"), teacher=str(folder / "teacher.safetensors"),
        data=folder / "pictures", out=folder / out, batch_size=4, steps=6, log_every=2, lr=1e-2, amp="off",
        workers=0, device="cpu",
    )  # fmt: skip
    return DistillConfig(**{**values, **changes})
