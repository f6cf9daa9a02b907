"""Exported students as timm and transformers see them: loaded strictly, their features beside the student's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastkd.models.export import timm_arguments
from fastkd.models.pixels import normalize
from fastkd.models.vit import VisionTransformer


@torch.no_grad()
def timm_features(student: VisionTransformer, path: Path, images: Tensor) -> Tensor:
    """[N, D] pooled features of a file of `export_timm`, loaded by timm; `images` uint8 [N, H, W, C]."""
    import timm

    name, arguments = timm_arguments(student)
    loaded = timm.create_model(name, checkpoint_path=str(path), **arguments).eval().to(images.device)
    return loaded(normalize(images, student.mean, student.std)).cpu()


@torch.no_grad()
def transformers_features(student: VisionTransformer, folder: Path, images: Tensor) -> Tensor:
    """[N, D] mean patch tokens of a folder that ``fastkd export --format transformers`` wrote, as `timm_features`."""
    import transformers

    loaded = transformers.ViTMAEForPreTraining.from_pretrained(folder, mask_ratio=0.0).vit.eval().to(images.device)
    in_order = torch.arange(student.num_patches, device=images.device, dtype=torch.float32)
    noise = in_order.expand(len(images), -1)  # it sorts patches by this noise even where none is masked
    tokens = loaded(normalize(images, student.mean, student.std), noise=noise).last_hidden_state
    return tokens[:, 1:].mean(1).cpu()
