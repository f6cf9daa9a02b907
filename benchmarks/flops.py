"""Floating-point operations of one training step per image, counted from the matrix products alone (2 per MAC).

Backward counts twice forward. LayerNorm, GELU, softmax, losses and the optimiser are left out (below 2 %).
"""

from __future__ import annotations

from baselines import SIZES, Recipe


def block(
    width: int, tokens: int, queries: int | None = None, context: int | None = None, qkv: int | None = None
) -> int:
    """Forward of one block.

    `queries` tokens get an output (default all); keys and values come from `context` tokens (default all);
    `qkv` counts the tokens that are projected to query, key and value where that differs from both.
    """
    queries = tokens if queries is None else queries
    context = tokens if context is None else context
    project = 2 * width**2 * (queries + 2 * context if qkv is None else 3 * qkv)
    return project + 4 * queries * context * width + (2 + 16) * queries * width**2


def step(recipe: Recipe, mode: str, mask_ratio: float, batch: int, decode_fraction: float = 1.0) -> dict[str, float]:
    """FLOPs per image by stage: teacher, student, decoder, loss.

    `mode` is ``"released"``, ``"eager"`` (also right for `compiled`), ``"exact"`` or ``"cross"``.
    """
    (ds, student_depth, _), (dt, teacher_depth, _) = SIZES[recipe.student], SIZES[recipe.teacher]
    dd, depth, pixels = recipe.decoder_width, recipe.decoder_blocks, recipe.pixels
    patches, visible = recipe.patches, recipe.visible(mask_ratio)
    tokens = visible + 1
    loss = 3 * 2 * tokens * ds * dt
    student = 3 * student_depth * block(ds, tokens)

    if mode == "released":
        embed = 2 * patches * pixels
        full = depth * block(dd, patches + 1) + 2 * (patches + 1) * dd * pixels
        teacher = embed * dt + teacher_depth * block(dt, tokens) + 2 * tokens * dt * dd + full
        decoder = 2 * tokens * ds * dd + full
        return dict(teacher=teacher, student=student + 2 * embed * ds, decoder=3 * decoder, loss=loss)

    embed = 2 * visible * pixels
    teacher = embed * dt + (recipe.teacher_tap + 1) * block(dt, tokens)
    wanted = max(1, round(decode_fraction * (patches - visible)))
    everything = tokens + wanted
    decoder = 2 * tokens * ds * dd + 2 * wanted * dd * pixels
    if mode == "cross":
        decoder += depth * block(dd, everything, wanted, tokens)
    else:
        decoder += (depth - 1) * block(dd, everything) + block(dd, everything, queries=wanted)
    if mode == "exact" and depth > 1 and batch * wanted >= 2 * patches:
        # The first block's masked rows are projected once per batch.
        decoder += block(dd, everything, qkv=tokens + patches / batch) - block(dd, everything)
    return dict(teacher=teacher, student=student + 2 * embed * ds, decoder=3 * decoder, loss=loss)
