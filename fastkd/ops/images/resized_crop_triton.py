"""Triton kernels of `resized_crop`: weights of both axes, then one pass along each axis with bytes in between.

A program of a pass makes a tile of lines x bytes of one image. Which axis comes first depends on the image, so both
passes know both axes. All loads are masked by the size of the buffer that they read: wrong boxes touch nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .resized_crop import PLACES, taps

LINES, BYTES = 8, 128
_PLACES, _ONE, _HALF = tl.constexpr(PLACES), tl.constexpr(1 << PLACES), tl.constexpr(1 << (PLACES - 1))


@triton.jit
def _cubic(x):
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit(do_not_specialize=["rows", "columns", "most_taps"])
def _weights_kernel(boxes, firsts, weights, rows, columns, height, width, most_taps, most_out, BLOCK: tl.constexpr):
    """Of one axis of one image: the first input pixel of each output pixel, and its weights [most_taps, most_out].

    Float64 in the order of Pillow's operations, without fused products, for the sake of the last bit.
    """
    image, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    most = tl.where(axis == 0, rows, columns)
    length = tl.minimum(tl.maximum(tl.load(boxes + image * 4 + 2 + axis), 1), most).to(tl.int32)
    out = tl.where(axis == 0, height, width)
    scale = length.to(tl.float64) / out.to(tl.float64)
    widening = tl.maximum(scale, 1.0)
    narrowing, support = 1.0 / widening, 2.0 * widening
    centre = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + support + 0.5).to(tl.int32), length) - first
    total = tl.zeros([BLOCK], tl.float64)
    for t in range(0, most_taps):
        total += tl.where(t < count, _cubic(((first + t).to(tl.float64) - centre + 0.5) * narrowing), 0.0)
    total = tl.where(total == 0, 1.0, total)  # behind the last output pixel
    place = (image * 2 + axis) * most_out + i
    tl.store(firsts + place, first, mask=i < out)
    place = (image * 2 + axis) * most_taps * most_out + i
    for t in range(0, most_taps):
        w = tl.where(t < count, _cubic(((first + t).to(tl.float64) - centre + 0.5) * narrowing), 0.0) / total
        w = w * _ONE
        w = (w + tl.where(w < 0, -0.5, 0.5)).to(tl.int32)
        tl.store(weights + place + t * most_out, w, mask=i < out)


@triton.jit
def _window(length, out):
    """Weights that one output pixel has at most, as `taps`."""
    return 2 * tl.maximum(2, (2 * length + out - 1) // out) + 1


@triton.jit
def _down(sums, source, limit, at, pitch, firsts, weights, line, lines, valid, count, most_out):
    """sums + weights of each output line x the lines of its window; `at`: the bytes of the first input line."""
    at += tl.load(firsts + line, mask=line < lines, other=0) * pitch
    for t in range(0, count):
        w = tl.load(weights + t * most_out + line, mask=line < lines, other=0)
        x = tl.load(source + at, mask=valid & (at >= 0) & (at < limit), other=0)
        sums += x.to(tl.int32) * w
        at += pitch
    return sums


@triton.jit
def _across(sums, source, limit, at, firsts, weights, column, width, valid, count, most_out, C: tl.constexpr):
    """sums + weights of each output column x the pixels of its window; `at`: the first pixel of the input line."""
    inside = (column >= 0) & (column < width)
    at += tl.load(firsts + column, mask=inside, other=0) * C
    for t in range(0, count):
        w = tl.load(weights + t * most_out + column, mask=inside, other=0)
        x = tl.load(source + at, mask=valid & (at >= 0) & (at < limit), other=0)
        sums += x.to(tl.int32) * w
        at += C
    return sums


@triton.jit(do_not_specialize=["limit", "rows", "columns", "most_taps", "between"])  # they differ from batch to batch
def _pass_kernel(
    source, target, offsets, sizes, boxes, flip, firsts, weights, limit, rows, columns, height, width, most_taps,
    most_out, between, C: tl.constexpr, SECOND: tl.constexpr, LINES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """First pass: from the box in `source` to `target` [B, between]; second: from there to [B, height, width * C]."""
    image = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None]
    byte = tl.program_id(2) * BYTES + tl.arange(0, BYTES)[None, :]
    tall = tl.minimum(tl.maximum(tl.load(boxes + image * 4 + 2), 1), rows).to(tl.int32)
    wide = tl.minimum(tl.maximum(tl.load(boxes + image * 4 + 3), 1), columns).to(tl.int32)
    rows_first = (tall > height) & (tall - height > 2 * (wide - width))
    down = rows_first != SECOND  # this pass goes along rows
    pitch_between = tl.where(rows_first, wide, width) * C
    if SECOND:
        pitch = pitch_between.to(tl.int64)
        start = image * between
        lines, size = height, width * C
        to = target + image * height * width * C + line * width * C + byte
    else:
        pitch = tl.load(sizes + image * 2 + 1) * C
        start = tl.load(offsets + image) + tl.load(boxes + image * 4) * pitch + tl.load(boxes + image * 4 + 1) * C
        lines, size = tl.where(rows_first, height, tall), pitch_between
        to = target + image * between + line * pitch_between + byte
    valid = (line < lines) & (byte < size)
    sums = tl.full([LINES, BYTES], _HALF, tl.int32)
    firsts += image * 2 * most_out
    weights += image * 2 * most_taps * most_out
    if down:
        count = tl.minimum(_window(tall, height), most_taps)
        sums = _down(sums, source, limit, start + byte, pitch, firsts, weights, line, lines, valid, count, most_out)
    else:
        count = tl.minimum(_window(wide, width), most_taps)
        column = byte // C
        column = tl.where(tl.load(flip + image) != 0, width - 1 - column, column)
        firsts += most_out
        weights += most_taps * most_out
        at = start + line * pitch + byte % C
        sums = _across(sums, source, limit, at, firsts, weights, column, width, valid, count, most_out, C)
    tl.store(to, tl.minimum(tl.maximum(sums >> _PLACES, 0), 255).to(tl.uint8), mask=valid)


def resized_crop(
    pixels: torch.Tensor, offsets: torch.Tensor, sizes: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor,
    max_box: list[int], out: torch.Tensor,
) -> None:  # fmt: skip
    """Fills out [B, height, width, C] from contiguous inputs; no box is larger than max_box."""
    batch, height, width, channels = out.shape
    rows, columns = max_box
    most_taps, most_out = max(taps(rows, height), taps(columns, width)), max(height, width)
    firsts = torch.empty((batch, 2, most_out), dtype=torch.int32, device=out.device)
    weights = torch.empty((batch, 2, most_taps, most_out), dtype=torch.int32, device=out.device)
    between = max(rows * width, height * columns) * channels  # bytes of an image after the first pass
    half = torch.empty((batch, between), dtype=torch.uint8, device=out.device)
    _weights_kernel[(batch, 2, triton.cdiv(most_out, 64))](
        boxes, firsts, weights, rows, columns, height, width, most_taps, most_out,
        BLOCK=64, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    shared = offsets, sizes, boxes, flip.view(torch.uint8), firsts, weights
    shape = rows, columns, height, width, most_taps, most_out, between
    most_lines, most_bytes = max(rows, height), max(columns, width) * channels
    for second, source, target, lines, line_bytes in (
        (False, pixels, half, most_lines, most_bytes),
        (True, half, out, height, width * channels),
    ):
        _pass_kernel[(batch, triton.cdiv(lines, LINES), triton.cdiv(line_bytes, BYTES))](
            source, target, *shared, source.numel(), *shape, C=channels, SECOND=second, LINES=LINES, BYTES=BYTES,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
