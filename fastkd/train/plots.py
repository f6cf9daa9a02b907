"""The pictures of a run: loss curves, reconstructions, and what student and teacher hold to be alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: a caller's own plotting back-end stays as it is
from matplotlib.patches import Rectangle
from torch import Tensor

from fastkd import ops
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.ops.masked import images as _images

RATIOS = (0.75, 0.90, 0.95, 0.98)


def loss_curves(rows: list[dict], names: Sequence[str], path: Path) -> None:
    """Losses and scores (training and held-out) and speed over the steps, from metrics.jsonl, as a PNG."""
    panels = [(name, name.replace("_", " "), f"val_{name}") for name in names]
    panels.append(("images_per_second", "images / second", None))
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, title, held_out) in zip(axes, panels):
        for name, label, style in ((key, "training", "-"), (held_out, "held out", "o-")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if held_out and axis.lines:
            axis.legend()
    axes[-1].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def reconstruction(student: MaskedAutoencoderViT, images: Tensor, ratio: float, path: Path, seed: int = 0) -> None:
    """A grid: per image the original, then per mask ratio the masked input and the reconstruction; as a PNG.

    Args:
        images: [N, H, W, C] uint8 on the student's device.
        ratio: the run's mask ratio, shown beside 75, 90, 95 and 98 %.

    Masked patches are predicted, visible ones copied from the input. With norm_pix_loss, predictions are put back on
    each patch's own mean and deviation (they cannot be known from the prediction).
    """
    ratios = [r for r in sorted({*RATIOS, ratio}) if 0 < int(student.num_patches * (1 - r)) < student.num_patches]
    noise = torch.rand(len(images), student.num_patches, generator=torch.Generator().manual_seed(seed))
    columns = [("image", images.cpu().numpy())]
    for r in ratios:
        masked, filled = _fill_in(student, images, r, noise.to(images.device))
        columns += [(f"{100 * r:g} % masked", masked), ("reconstruction", filled)]
    height, width = images.shape[1:3]
    gap = max(1, width // 20)
    canvas = np.full((len(images) * (height + gap), len(columns) * (width + gap), 3), 255, np.uint8)
    figure = Figure(figsize=(1.3 * len(columns), 1.3 * len(images) * height / width + 0.25), layout="constrained")
    axes = figure.add_subplot()
    for column, (title, pictures) in enumerate(columns):
        left = column * (width + gap)
        axes.text(left + width / 2, -gap, title, ha="center", va="bottom", fontsize=8)
        for row, picture in enumerate(pictures):
            top = row * (height + gap)
            canvas[top : top + height, left : left + width] = picture  # grey broadcasts to RGB
    axes.imshow(canvas)
    axes.axis("off")
    figure.savefig(path, dpi=150)


@torch.no_grad()
def _fill_in(student: MaskedAutoencoderViT, images: Tensor, ratio: float, noise: Tensor) -> tuple[np.ndarray, ...]:
    """(masked input, reconstruction), both uint8 [N, H, W, C] on the CPU."""
    masking = ops.random_masking(len(images), student.num_patches, ratio, noise=noise)
    predicted = student.decode(student(images, masking.ids_keep).tokens, masking.ids_shuffle).float()
    affine = _images.affine(images, student.mean, student.std, torch.float32)
    truth = ops.patchify(_images.normalized(images.permute(0, 3, 1, 2), affine), student.patch_size)
    index = masking.ids_masked[:, :, None].expand(-1, -1, truth.shape[-1])
    if student.norm_pix_loss:
        own = truth.gather(1, index)
        predicted = predicted * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
    grey = ((127.5 / 255 - torch.tensor(student.mean)) / torch.tensor(student.std)).to(truth)
    pixels = student.patch_size[0] * student.patch_size[1]
    masked = truth.scatter(1, index, grey.repeat(pixels).expand(index.shape))
    return tuple(_to_pixels(student, patches, affine) for patches in (masked, truth.scatter(1, index, predicted)))


def _to_pixels(student: MaskedAutoencoderViT, patches: Tensor, affine: Tensor) -> np.ndarray:
    pictures = ops.unpatchify(patches, student.patch_size, student.grid)
    scale, shift = affine[:, :, None, None]
    return ((pictures - shift) / scale).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def likeness(features: Tensor, marked: int) -> Tensor:
    """[N, L] cosine of each patch of [N, L, D] to patch `marked`, after the mean over the picture is taken off.

    What all patches share would hide the rest.
    """
    features = F.normalize(features.float() - features.float().mean(1, keepdim=True), dim=-1)
    return (features @ features[:, marked, :, None]).squeeze(-1)


def feature_similarity(images: Tensor, student: Tensor, teacher: Tensor, grid: tuple[int, int], path: Path) -> None:
    """Per image: the picture, which patches are like the marked one to teacher and student, and where both agree.

    Args:
        images: [N, H, W, C] uint8.
        student, teacher: [N, L, D] features of the patches in raster order, the student's projected to the teacher's.
        grid: (rows, columns) of patches, L in all.

    Likeness is to the central patch, see `likeness`. Agreement is the cosine of the two features of a patch as they
    are: what the loss pulls to 1.
    """
    rows, columns = grid
    marked = (rows // 2) * columns + columns // 2
    agreement = F.cosine_similarity(teacher.float(), student.float(), dim=-1)
    maps = likeness(teacher, marked), likeness(student, marked), agreement
    height, width = images.shape[1:3]
    figure = Figure(figsize=(7.4, 1.5 * len(images) * height / width + 0.4), layout="constrained")
    axes = figure.subplots(len(images), 4, squeeze=False)
    extent = (0, width, height, 0)
    for row, image in enumerate(images.cpu().numpy()):
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=255)
        corner = (marked % columns) * width / columns, (marked // columns) * height / rows
        axes[row, 0].add_patch(
            Rectangle(corner, width / columns, height / rows, fill=False, color="red", linewidth=1.5)
        )
        for axis, values in zip(axes[row, 1:], maps):
            shown = axis.imshow(values[row].view(grid).cpu().numpy(), extent=extent, vmin=-1, vmax=1, cmap="RdBu_r")
    for axis, title in zip(axes[0], ("image", "teacher", "student", "agreement")):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.colorbar(shown, ax=axes, shrink=0.7, aspect=30, label="cosine")
    figure.savefig(path, dpi=130)
