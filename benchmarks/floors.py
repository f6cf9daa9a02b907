"""The two floors of an exact training step, matrix products and bytes, and what they mean for a billion images.

Bytes are counted for a step whose kernels are fused as far as they can be without crossing a matrix product or a row
sum, in 16-bit activations: a transformer block then moves 22 token rows of its width forward and 50 backward,

    forward   norm1 + qkv 1 in 3 out, attention 3 in 1 out, proj + residual 2 in 1 out, norm2 + fc1 1 in 4 out,
              gelu + fc2 + residual 5 in 1 out
    backward  fc2 9 in 5 out, fc1 8 in 5 out, proj 2 in 2 out, attention 8 in or out, qkv 7 in 4 out

and a step moves every trained parameter once in the cast to 16 bit (4 in, 2 out), twice in products, once as a
gradient (4 out) and 28 bytes in AdamW, whatever the batch.
"""

from __future__ import annotations

import dataclasses

import flops
from baselines import SIZES, Recipe
from tables import markdown, number

FORWARD_ROWS, BACKWARD_ROWS = 22, 50
TRAINED_BYTES = 4 + 2 + 2 * 2 + 4 + 28  # a parameter and step
FROZEN_BYTES = 2


def activation_bytes(recipe: Recipe, mask_ratio: float) -> dict[str, int]:
    """Fewest bytes per image by stage, parameters left out."""
    (ds, student_depth, _), (dt, _, _) = SIZES[recipe.student], SIZES[recipe.teacher]
    visible = recipe.visible(mask_ratio)
    tokens, masked, everything = visible + 1, recipe.patches - visible, recipe.patches + 1
    row = 2  # bytes of a 16-bit number
    both = FORWARD_ROWS + BACKWARD_ROWS
    return dict(
        teacher=visible * recipe.pixels + FORWARD_ROWS * (recipe.teacher_tap + 1) * tokens * dt * row,
        student=visible * recipe.pixels + both * student_depth * tokens * ds * row,
        decoder=both * recipe.decoder_blocks * everything * recipe.decoder_width * row,
        # prediction: written, turned into its gradient, read by two products; pixels read once
        loss=masked * recipe.pixels * (1 + 5 * row) + 6 * tokens * dt * row,
    )


def parameters(recipe: Recipe) -> tuple[int, int]:
    """(trained, frozen) parameters, matrices of the blocks, embeddings and prediction only."""
    (ds, student_depth, _), (dt, _, _) = SIZES[recipe.student], SIZES[recipe.teacher]
    dd = recipe.decoder_width
    decoder = 12 * dd**2 * recipe.decoder_blocks + ds * dd + dd * recipe.pixels
    trained = 12 * ds**2 * student_depth + ds * recipe.pixels + decoder + ds * dt
    return trained, 12 * dt**2 * (recipe.teacher_tap + 1) + dt * recipe.pixels


def parameter_bytes(recipe: Recipe) -> int:
    """Fewest bytes per step that the parameters cost."""
    trained, frozen = parameters(recipe)
    return TRAINED_BYTES * trained + FROZEN_BYTES * frozen


@dataclasses.dataclass
class Floor:
    """Floor of a step per image: GFLOP, MB, and seconds on a device with the given roofs, nothing overlapped."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, recipe: Recipe, mask_ratio: float, batch: int) -> Floor:
        work = sum(flops.step(recipe, "exact", mask_ratio, batch).values())
        return cls(work, sum(activation_bytes(recipe, mask_ratio).values()) + parameter_bytes(recipe) / batch)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return self.flops / flops_per_second + self.bytes / bytes_per_second


# On paper: what the tables below assume, none of it measured here.
GPU = dict(name="H100 SXM", tflops=594, gigabytes_per_second=3000, dollars_an_hour=2.5)
JPEG_KILOBYTES, PACKED_KILOBYTES = 110, 262  # a picture of 400 x 350; 256 x 341 pixels as uint8
IMAGES = 1e9
RATIOS = (0.75, 0.9, 0.95, 0.98)


def floor_table(recipe: Recipe | None = None, batch: int = 128) -> str:
    """FLOPs, bytes and the time that they cannot go below, per mask ratio."""
    recipe = recipe or Recipe("large", "base")
    lines = []
    for ratio in RATIOS:
        floor = Floor.of(recipe, ratio, batch)
        products, traffic = floor.flops / (GPU["tflops"] * 1e12), floor.bytes / (GPU["gigabytes_per_second"] * 1e9)
        lines.append([
            f"{ratio:.0%}", number(floor.flops / 1e9), number(floor.bytes / 1e6), number(1e6 * products),
            number(1e6 * traffic), number(1 / (products + traffic), 5),
        ])  # fmt: skip
    columns = ["masked", "GFLOP", "MB", "us in products", "us in memory", "images/s at the floor"]
    note = (
        f"<sub>Per image, ViT-L -> ViT-B, decoder 8x512, batch {batch}; on paper for an {GPU['name']} that sustains "
        f"{GPU['tflops']} TFLOP/s and {GPU['gigabytes_per_second']} GB/s, products and memory one after the other. "
        "Not a measurement.</sub>"
    )
    return f"{markdown(columns, lines)}\n\n{note}"


def scale_table(batch: int = 128) -> str:
    """A billion images: GPU time and money at the floor and at half of it, and what storage and network must give."""
    recipe, lines = Recipe("large", "base"), []
    trained = parameters(recipe)[0]
    for ratio in (0.75, 0.95):
        floor = Floor.of(recipe, ratio, batch)
        best = 1 / floor.seconds(GPU["tflops"] * 1e12, GPU["gigabytes_per_second"] * 1e9)
        for share in (1.0, 0.5):
            speed = share * best
            hours = IMAGES / speed / 3600
            # A ring all-reduce sends and receives every float32 gradient twice a step.
            reduce = 2 * 4 * trained * speed / batch / 1e9
            lines.append([
                f"{ratio:.0%}", f"{share:.0%}", number(speed, 5), number(hours, 4),
                number(hours * GPU["dollars_an_hour"], 5), number(speed * JPEG_KILOBYTES / 1e6, 3),
                number(speed * PACKED_KILOBYTES / 1e6, 3), number(reduce),
            ])  # fmt: skip
    columns = ["masked", "of the floor", "images/s", "GPU hours", "dollars", "JPEG GB/s", "packed GB/s", "reduce GB/s"]
    terabytes = [IMAGES * kilobytes / 1e9 for kilobytes in (JPEG_KILOBYTES, PACKED_KILOBYTES)]
    note = (
        f"<sub>On paper, per {GPU['name']} and one pass over 10^9 images, batch {batch} a GPU, "
        f"{GPU['dollars_an_hour']} dollars a GPU hour. {JPEG_KILOBYTES} kB a JPEG and {PACKED_KILOBYTES} kB a packed "
        f"image make {number(terabytes[0])} and {number(terabytes[1])} TB. Reduce: float32 gradients in a ring.</sub>"
    )
    return f"{markdown(columns, lines, 2)}\n\n{note}"
