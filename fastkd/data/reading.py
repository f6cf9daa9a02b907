"""From a file to an upright picture in memory, and what is refused on the way before it can do harm.

Every path that reads a picture (training views, evaluation views, packing, archives, DALI) goes through `read_file` or
its archive's `read`, and then through `opened`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # where Pillow's own default refuses, too; decoded that is half a gigabyte
MAX_BYTES = 1 << 30  # of an encoded picture: one of MAX_PIXELS is smaller
FORMATS = "JPEG MPO PNG WEBP GIF TIFF BMP DIB PPM JPEG2000 AVIF TGA".split()  # none that starts another program

_TRANSPOSE = {  # EXIF orientation -> what puts the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112

Picture = str | os.PathLike | bytes  # a path, or the content of a file


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a file. OSError where it is none (a pipe, a device: it is not waited for), empty or too large."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        check_length(status.st_size)
        return file.read()


def check_length(length: int) -> None:
    """OSError where a file of so many bytes is no picture."""
    if length == 0:
        raise OSError("the file is empty")
    if length > MAX_BYTES:
        raise OSError(f"the file has {length} bytes, more than the {MAX_BYTES} that are read")


def printable(name: str) -> str:
    """A name for messages: bytes that are no UTF-8 show as question marks."""
    return name.encode(errors="replace").decode()


@contextlib.contextmanager
def opened(picture: Picture) -> Iterator[Image.Image]:
    """A picture of which only the header was read.

    Raises:
        OSError: no regular file, or no picture that is read here (UnidentifiedImageError).
        Image.DecompressionBombError: more than `MAX_PIXELS` pixels.
    """
    data = picture if isinstance(picture, bytes) else read_file(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is one limit, and it is an error
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except UnidentifiedImageError:
            raise UnidentifiedImageError(_what_else(data)) from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, limit of {MAX_PIXELS} exceeded")
        yield image


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _what_else(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return f"a picture or film of type {data[8:12].decode('latin1')!r}, which this Pillow does not read; convert it"
    return f"no picture, or damaged at its beginning ({data[:8]!r})"


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it makes no sense."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError):  # damaged metadata of a picture that may be whole
        return 1
    return orientation if orientation in range(1, 9) else 1


def is_turned(image: Image.Image) -> bool:
    """Whether rows become columns when the picture is put upright."""
    return orientation_of(image) >= 5


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """The picture as it is meant to be seen, RGB (channels=3) or grey (1).

    Transparent pixels become white. 16 bits become 8 by rounding, 32-bit integers are taken for 16-bit ones unless
    they fit into 8, real numbers are 0 to 1 or, where one is larger, 0 to 255. ValueError where they are not finite.
    """
    orientation = orientation_of(image)
    image = image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    most = values.max(initial=0)
    if mode.startswith("F"):
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        return (values * (255 if most <= 1 else 1)).round().clip(0, 255).astype(np.uint8)
    if mode == "I" and most <= 255:
        return values.clip(0).astype(np.uint8)
    return ((values.clip(0, 65535).astype(np.uint32) * 255 + 32895) >> 16).astype(np.uint8)  # round(value / 257)
