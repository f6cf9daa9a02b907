"""What the published runs on ImageNet-1k cost on paper: GPU hours at the floor and at half of it, and disk space."""

from __future__ import annotations

import flops
from baselines import SIZES, Recipe
from floors import BACKWARD_ROWS, FORWARD_ROWS, GPU, PACKED_KILOBYTES, RATIOS, TRAINED_BYTES, Floor, parameters
from tables import markdown, number

IMAGES, EPOCHS, BATCH = 1_281_167, 100, 128
PAIRS = (("large", "base"), ("base", "small"), ("small", "tiny"))


def finetuning(size: str, batch: int) -> Floor:
    """Floor of fine-tuning on whole images of 224, per image."""
    width, depth, _ = SIZES[size]
    tokens, weights = 197, 12 * width**2 * depth
    work = 3 * (depth * flops.block(width, tokens) + 2 * 196 * 768 * width)
    rows = (FORWARD_ROWS + BACKWARD_ROWS) * depth * tokens * width * 2
    return Floor(work, rows + TRAINED_BYTES * weights / batch)


def hours(floor: Floor) -> str:
    """GPU hours of the whole run at the floor and at half of it."""
    best = IMAGES * EPOCHS * floor.seconds(GPU["tflops"] * 1e12, GPU["gigabytes_per_second"] * 1e9) / 3600
    return f"{number(best)} - {number(2 * best)}"


def table() -> str:
    lines = []
    for teacher, student in PAIRS:
        recipe = Recipe(teacher, student)
        distilled = [hours(Floor.of(recipe, ratio, BATCH)) for ratio in RATIOS]
        gigabytes = 12 * parameters(recipe)[0] / 1e9  # float32 weights and both averages of AdamW
        lines.append(
            [f"ViT-{teacher} -> ViT-{student}", *distilled, hours(finetuning(student, BATCH)), number(gigabytes)]
        )
    columns = ["teacher -> student", *(f"{ratio:.0%}" for ratio in RATIOS), "fine-tuning", "checkpoint, GB"]
    packed = number(IMAGES * PACKED_KILOBYTES / 1e6)
    note = (
        f"<sub>{GPU['name']} hours for {EPOCHS} epochs of {IMAGES:,} images: the floor of FLOPs and bytes on paper "
        f"({GPU['tflops']} TFLOP/s, {GPU['gigabytes_per_second']} GB/s), and twice that. Not a measurement. The "
        f"training set packed with short side 256 takes about {packed} GB.</sub>"
    )
    return f"{markdown(columns, lines)}\n\n{note}"
