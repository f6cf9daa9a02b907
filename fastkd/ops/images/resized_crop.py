"""Crop, resize (bicubic, antialiased) and flip of a batch of uint8 images that lie one behind the other in one buffer.

The numbers are those of Pillow 13, bit for bit: ``image.crop(box).resize(size, BICUBIC)``, mirrored where `flip` says
so. One axis of n pixels that becomes m is resampled with

    s = max(1, n / m)            the filter widens when shrinking: that is the antialiasing
    c = (i + 1/2) n / m          centre of output pixel i in the input
    w_ij = k((j + 1/2 - c) / s)  for the pixels j within 2 s of c, then divided by their sum

where k is the cubic convolution kernel with a = -1/2 (Keys 1981, equation 15). Weights are computed in float64 and
rounded to 22 binary places; each axis ends in bytes, round(sum w x) cut to 0..255, so the order of the two shows.
Columns come first, unless the height shrinks by more than twice as many pixels as the width (Pillow before 13 knew no
such exception).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register

OP = "resized_crop"
PLACES = 22  # binary places of a weight: 8 bits of a pixel and 2 for sums of more than one fit beside them in 32
CHUNK = 16  # images that the reference gathers at once


def taps(pixels: int, out: int) -> int:
    """The most input pixels that one output pixel is made of, where `pixels` become `out`."""
    return 2 * math.ceil(2 * max(1.0, pixels / out)) + 1


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _weights(lengths: Tensor, most: int, out: int) -> Tensor:
    """[B] lengths of an axis -> [B, out, most] weights times 2^22, whole numbers as float64."""
    length = lengths.double()[:, None, None]
    scale = length / out
    widening = scale.clamp(min=1.0)
    i = torch.arange(out, device=lengths.device, dtype=torch.float64)[None, :, None]
    j = torch.arange(most, device=lengths.device, dtype=torch.float64)
    centre, support = (i + 0.5) * scale, 2.0 * widening
    first = (centre - support + 0.5).trunc().clamp(min=0)
    end = torch.minimum((centre + support + 0.5).trunc(), length)
    w = torch.where((j >= first) & (j < end), _cubic((j - centre + 0.5) * (1.0 / widening)), 0.0)
    w = w / w.cumsum(-1)[..., -1:]  # summed from left to right, as Pillow does: the last bit decides roundings
    return (w * 2.0**PLACES + torch.where(w < 0, -0.5, 0.5)).trunc()


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + 2.0 ** (PLACES - 1)) / 2.0**PLACES).floor().clamp(0, 255)


def rows_first(tall: Tensor, wide: Tensor, size: tuple[int, int]) -> Tensor:
    """[B] bool: the images whose rows are resampled before their columns."""
    return (tall > size[0]) & (tall - size[0] > 2 * (wide - size[1]))


def _reference(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flip: Tensor, size, channels: int, max_box
) -> Tensor:
    (rows, columns), (height, width) = max_box, size
    top, left, tall, wide = boxes.unbind(1)
    y = torch.arange(rows, device=pixels.device)[:, None, None].minimum((tall - 1)[:, None, None, None])
    x = torch.arange(columns, device=pixels.device)[:, None].minimum((wide - 1)[:, None, None, None])
    place = (top[:, None, None, None] + y) * sizes[:, 1, None, None, None] + left[:, None, None, None] + x
    place = offsets[:, None, None, None] + place * channels + torch.arange(channels, device=pixels.device)
    crops = pixels[place].double()  # [B, rows, columns, C]; float64 sums of these whole numbers are exact
    down, across = _weights(tall, rows, height), _weights(wide, columns, width)
    across = torch.where(flip[:, None, None], across.flip(1), across)

    def resample_rows(images: Tensor) -> Tensor:
        return _to_bytes(torch.einsum("biy,byxc->bixc", down, images))

    def resample_columns(images: Tensor) -> Tensor:
        return _to_bytes(torch.einsum("bjx,byxc->byjc", across, images))

    # Both orders for all: which one counts is known on the device only.
    first, second = resample_columns(resample_rows(crops)), resample_rows(resample_columns(crops))
    return torch.where(rows_first(tall, wide, size)[:, None, None, None], first, second).to(torch.uint8)


def _fill_reference(pixels, offsets, sizes, boxes, flip, max_box, out) -> None:
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        arguments = offsets[part], sizes[part], boxes[part], flip[part]
        out[part] = _reference(pixels, *arguments, out.shape[1:3], out.shape[3], max_box)


def _check_boxes(pixels: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, channels: int, max_box) -> None:
    """ValueError for a box outside of its image or an image outside of the buffer."""
    limits = torch.tensor(max_box)
    corner, extent = boxes[:, :2], boxes[:, 2:]
    inside = ((corner >= 0) & (extent >= 1) & (extent <= limits) & (corner + extent <= sizes)).all(1)
    if not inside.all():
        worst = int((~inside).int().argmax())
        got = f"{tuple(boxes[worst].tolist())} in image {worst} of size {tuple(sizes[worst].tolist())}"
        expected = f"boxes inside of their images, of at least 1 and at most {tuple(max_box)} pixels"
        _check.fail(OP, "boxes", got, expected)
    ends = offsets + sizes.prod(1) * channels
    if offsets.min() < 0 or ends.max() > len(pixels):
        got = f"images from byte {int(offsets.min())} to {int(ends.max())}"
        _check.fail(OP, "offsets", got, f"images within the {len(pixels)} bytes of pixels")


kernel = Kernel(
    OP, reference=_fill_reference, triton="fastkd.ops.images.resized_crop_triton:resized_crop",
)  # fmt: skip


@custom_op(OP)
def _op(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, flip: Tensor, size: list[int], channels: int,
    max_box: list[int],
) -> Tensor:  # fmt: skip
    out = torch.empty((len(boxes), *size, channels), dtype=torch.uint8, device=pixels.device)
    if len(boxes):
        if pixels.device.type == "cpu":
            _check_boxes(pixels, offsets, sizes, boxes, channels, max_box)
        kernel(pixels, offsets, sizes, boxes, flip, max_box, out)
    return out


@_op.register_fake
def _(pixels, offsets, sizes, boxes, flip, size, channels, max_box) -> Tensor:
    return torch.empty((len(boxes), *size, channels), dtype=torch.uint8, device=pixels.device)


def resized_crop(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    max_box: tuple[int, int] | None = None,
) -> Tensor:
    """Cuts a box out of each image, resizes it (bicubic, antialiased, the bits of Pillow) and mirrors some.

    Args:
        pixels: [N] uint8, all images one behind the other (gaps do no harm), each [height, width, channels].
        offsets: [B] int64, where each image begins in `pixels`.
        sizes: [B, 2] int64, (height, width) of each image.
        boxes: [B, 4] int64, (top, left, height, width) within the image, as torchvision orders them.
        flip: [B] bool, mirror the result left to right.
        size: (height, width) of the results, an int for a square.
        channels: 3 (RGB) or 1 (grey).
        max_box: (height, width) that no box exceeds. On a GPU it is needed, for the host cannot look at `boxes`
            without waiting for the device; on the CPU the default is the largest box.

    Returns:
        [B, height, width, channels] uint8.

    On the CPU boxes and images are checked. On a GPU wrong ones give wrong pixels, but nothing outside is touched.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that do not fit, max_box missing on a GPU, or (CPU) a box outside of its image.
    """
    height, width = _check.pair(OP, "size", size)
    if channels not in (1, 3):
        _check.fail(OP, "channels", channels, "3 (RGB) or 1 (grey)")
    _check.check_tensor(OP, "pixels", pixels, 1, (torch.uint8,))
    _check.check_tensor(OP, "boxes", boxes, 2, (torch.int64,))
    _check.check_tensor(OP, "offsets", offsets, 1, (torch.int64,))
    _check.check_tensor(OP, "sizes", sizes, 2, (torch.int64,))
    _check.check_tensor(OP, "flip", flip, 1, (torch.bool,))
    batch = len(boxes)
    for name, value, shape in (
        ("boxes", boxes, (batch, 4)),
        ("offsets", offsets, (batch,)),
        ("sizes", sizes, (batch, 2)),
        ("flip", flip, (batch,)),
    ):
        _check.check_shape(OP, name, value, shape, "(one row per image)")
    _check.check_same_device(OP, pixels=pixels, offsets=offsets, sizes=sizes, boxes=boxes, flip=flip)
    if max_box is None:
        if pixels.device.type != "cpu":
            expected = "(height, width) that no box exceeds"
            _check.fail(OP, "max_box", "None", expected, "on a GPU the host does not read the boxes: pass max_box")
        max_box = (1, 1) if batch == 0 else tuple(boxes[:, 2:].amax(0).clamp(min=1).tolist())
    max_box = _check.pair(OP, "max_box", max_box)
    offsets, sizes, boxes, flip = (t.contiguous() for t in (offsets, sizes, boxes, flip))
    return _op(pixels.contiguous(), offsets, sizes, boxes, flip, [height, width], channels, list(max_box))


def _reference_crop(pixels, offsets, sizes, boxes, flip, size, *, channels=3, max_box) -> Tensor:
    return _reference(pixels, offsets, sizes, boxes, flip, size, channels, max_box)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    """Random images of at most `image` pixels and random boxes; `box` fixes the size of the boxes."""
    random = torch.Generator().manual_seed(case.get("seed", 0))

    def integers(low: int, high: int) -> list[int]:
        return torch.randint(low, high + 1, (case["batch"],), generator=random).tolist()

    tall, wide = case["image"]
    least = case.get("box", (1, 1))
    heights, widths = integers(max(least[0], tall // 2), tall), integers(max(least[1], wide // 2), wide)
    boxes, offsets, end = [], [], 5  # something before the first image
    for (h, w), *u in zip(zip(heights, widths), *torch.rand(4, case["batch"], generator=random).tolist()):
        high, broad = case.get("box", (1 + int(u[0] * h), 1 + int(u[1] * w)))
        boxes.append((int(u[2] * (h - high + 1)), int(u[3] * (w - broad + 1)), high, broad))
        offsets.append(end)
        end += h * w * case["channels"]
    pixels = torch.randint(0, 256, (end,), generator=random, dtype=torch.uint8)
    if case.get("extreme"):
        pixels = (pixels > 127).byte() * 255  # overshoots on both sides
    boxes = torch.tensor(boxes, dtype=torch.int64).view(-1, 4)
    return dict(
        pixels=pixels.to(device),
        offsets=torch.tensor(offsets, dtype=torch.int64, device=device),
        sizes=torch.tensor([heights, widths], dtype=torch.int64, device=device).t(),
        boxes=boxes.to(device),
        flip=(torch.rand(case["batch"], generator=random) < 0.5).to(device),
        size=case["size"],
        channels=case["channels"],
        max_box=(tall, wide),
    )


def _law(kwargs: dict) -> None:
    """Mirrored images are the others from right to left; a constant image stays what it is."""
    plain = resized_crop(**kwargs)
    mirrored = resized_crop(**kwargs | dict(flip=~kwargs["flip"]))
    assert torch.equal(plain.flip(2), mirrored)
    constant = resized_crop(**kwargs | dict(pixels=torch.full_like(kwargs["pixels"], 77)))
    assert (constant == 77).all()


def _crop_bytes(kwargs: dict) -> int:
    boxes, (height, width) = kwargs["boxes"], kwargs["size"]
    return kwargs["channels"] * (int((boxes[:, 2] * boxes[:, 3]).sum()) + len(boxes) * height * width)


def _multiplications(kwargs: dict) -> int:
    """Two per pixel and weight of both passes; four weights, or more by the factor of shrinking."""
    total, (height, width) = 0, kwargs["size"]
    for _, _, tall, wide in kwargs["boxes"].tolist():
        total += tall * width * 4 * max(1, wide / width) + height * width * 4 * max(1, tall / height)
    return int(2 * kwargs["channels"] * total)


SPEC = register(
    OpSpec(
        name=OP,
        function=resized_crop,
        reference=_reference_crop,
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "mixed": dict(batch=4, image=(50, 70), size=(20, 33), channels=3),
            "grey": dict(batch=3, image=(40, 40), size=(17, 16), channels=1, extreme=True),
            "one_pixel": dict(batch=2, image=(9, 8), size=(5, 6), channels=3, box=(1, 1)),
            "to_one_pixel": dict(batch=2, image=(30, 31), size=(1, 1), channels=3),
            "same_size": dict(batch=2, image=(24, 29), size=(20, 18), channels=3, box=(20, 18)),
            "enlarged": dict(batch=2, image=(7, 9), size=(40, 35), channels=3, extreme=True),
            "thin": dict(batch=2, image=(90, 3), size=(8, 12), channels=1),
        },
        space=dict(
            batch=(1, 3), image=((1, 1), (2, 37), (33, 16), (40, 41), (15, 70)),
            size=((1, 1), (7, 16), (16, 7), (17, 19)), channels=(1, 3), extreme=(False, True), seed=tuple(range(5)),
        ),
        bench={"imagenet": dict(batch=64, image=(256, 341), size=(224, 224), channels=3)},
        bytes_moved=_crop_bytes,
        flops=_multiplications,
        law=_law,
    )
)  # fmt: skip
