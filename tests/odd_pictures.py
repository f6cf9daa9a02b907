"""Pictures as they come from the world: each kind with what must become of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

RED, BLUE, WHITE = (200, 40, 40), (40, 40, 200), (255, 255, 255)
GREY_RED, GREY_BLUE = (88,) * 3, (58,) * 3


class Odd(NamedTuple):
    """A file and its fate: the colours of its left and right half, or the reason for which it is skipped.

    `content` is None for what is no regular file (see `write_odd`); `colours` is None where only survival counts.
    """

    content: bytes | None
    colours: tuple[tuple, tuple] | None = None
    reason: str = ""


def two_halves(size=(40, 30), left=RED, right=BLUE) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file from scanlines that begin with their filter byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _without_adobe_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:start] + jpeg[start + 16 :]


def _turned(orientation: int, kind: str = "JPEG") -> bytes:
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    image, exif = two_halves(), Image.Exif()
    exif[0x0112] = orientation
    return encoded(image.transpose(undo[orientation]) if orientation in undo else image, kind, exif=exif)


def _animated(kind: str) -> bytes:
    rest = [two_halves(left=(0, 255, 0), right=(0, 0, 0))] * 2
    return encoded(two_halves(), kind, save_all=True, append_images=rest, duration=40)


def odd_pictures() -> dict[str, Odd]:
    """By file name."""
    halves, colours, greys = two_halves(), (RED, BLUE), (GREY_RED, GREY_BLUE)
    jpeg, plain_png = encoded(halves, "JPEG", quality=95), encoded(halves, "PNG")
    gif, half_alpha = encoded(halves, "GIF"), halves.convert("RGBA")
    half_alpha.paste((0, 0, 0, 0), (20, 0, 40, 30))
    palette = halves.quantize(2)
    hidden = palette.getpixel((39, 0))
    wide = (np.asarray(halves.convert("L"), np.uint16) * 257).astype(">u2")
    rgb16 = (np.asarray(halves, np.uint16) * 257).astype(">u2")
    scanlines = lambda pixels: b"".join(b"\0" + row.tobytes() for row in pixels)  # noqa: E731
    unit = np.asarray(halves.convert("L"), np.float32) / 255
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 1))
    cut = dict(reason="OSError.*truncated")
    bomb = dict(reason="DecompressionBombError")
    nothing = dict(reason="no picture, or damaged")
    huge_jpeg = jpeg.index(b"\xff\xc0") + 5
    odd = {
        "plain.jpg": Odd(jpeg, colours),
        "cmyk.jpg": Odd(encoded(halves.convert("CMYK"), "JPEG", quality=95), colours),
        "cmyk_without_marker.jpg": Odd(
            _without_adobe_marker(encoded(halves.convert("CMYK"), "JPEG", quality=95)), colours
        ),
        "cmyk.tif": Odd(encoded(halves.convert("CMYK"), "TIFF"), colours),
        "grey.jpg": Odd(encoded(halves.convert("L"), "JPEG", quality=95), greys),
        "grey.png": Odd(encoded(halves.convert("L"), "PNG"), greys),
        "palette.png": Odd(encoded(palette, "PNG"), colours),
        "palette_transparent.png": Odd(encoded(palette, "PNG", transparency=hidden), (RED, WHITE)),
        "transparent.png": Odd(encoded(half_alpha, "PNG"), (RED, WHITE)),
        "transparent.webp": Odd(encoded(half_alpha, "WEBP", lossless=True), (RED, WHITE)),
        "grey_transparent.png": Odd(encoded(half_alpha.convert("LA"), "PNG"), (GREY_RED, WHITE)),
        "bits16_grey.png": Odd(png(40, 30, 16, 0, scanlines(wide)), greys),
        "bits16_rgb.png": Odd(png(40, 30, 16, 2, scanlines(rgb16)), colours),
        "bits16.pgm": Odd(b"P5 40 30 65535 " + wide.tobytes(), greys),
        "float.tif": Odd(encoded(Image.fromarray(unit), "TIFF"), greys),
        "not_finite.tif": Odd(encoded(Image.fromarray(unit * np.nan), "TIFF"), reason="not finite"),
        "int32.tif": Odd(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), greys),
        "lzw.tif": Odd(encoded(halves, "TIFF", compression="tiff_lzw"), colours),
        "pages.tif": Odd(_animated("TIFF"), colours),
        "cut.tif": Odd(encoded(halves, "TIFF", compression="tiff_lzw")[:60], **nothing),
        "animated.gif": Odd(_animated("GIF"), colours),
        "animated.webp": Odd(_animated("WEBP"), colours),
        "animated.png": Odd(_animated("PNG"), colours),
        "turned3.jpg": Odd(_turned(3), colours),
        "turned6.jpg": Odd(_turned(6), colours),
        "turned8.jpg": Odd(_turned(8), colours),
        "turned6.png": Odd(_turned(6, "PNG"), colours),
        "turned99.jpg": Odd(_turned(99), colours),
        "damaged_exif.jpg": Odd(_turned(1).replace(b"MM\0*", b"XX\0*"), colours),
        "1x1.png": Odd(encoded(Image.new("RGB", (1, 1), RED), "PNG"), (RED, RED)),
        "1x700.png": Odd(encoded(Image.new("RGB", (1, 700), RED), "PNG"), (RED, RED)),
        "3000x1.jpg": Odd(encoded(Image.new("RGB", (3000, 1), RED), "JPEG"), (RED, RED)),
        "20000x8.png": Odd(encoded(two_halves((20000, 8)), "PNG"), colours),
        "20000x1000.jpg": Odd(encoded(two_halves((20000, 1000)), "JPEG"), colours),
        "a_png.jpg": Odd(plain_png, colours),
        "a_jpeg.png": Odd(jpeg, colours),
        "a_text.jpg": Odd(b"this is a text\n" * 20, **nothing),
        "postscript.jpg": Odd(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", **nothing),
        "heic.jpg": Odd(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), reason="type 'heic'.*convert it"),
        "empty.jpg": Odd(b"", reason="the file is empty"),
        "cut.jpg": Odd(jpeg[:-40], **cut),
        "cut.png": Odd(plain_png[: len(plain_png) // 2], **cut),
        "header_alone.png": Odd(plain_png[:33], **nothing),
        "bomb.png": Odd(png(60_000, 60_000, 8, 2, bytes(99)), **bomb),
        "bomb.jpg": Odd(jpeg[:huge_jpeg] + b"\xff\xf0\xff\xf0" + jpeg[huge_jpeg + 4 :], **bomb),
        "bomb.gif": Odd(gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:], **bomb),
        "just_too_large.png": Odd(png(178_956_971, 1, 1, 0, bytes(99)), **bomb),
        "text_bomb.png": Odd(png(1, 1, 8, 0, b"\0\0", text), reason="ValueError.*too large"),
        "nowhere.jpg": Odd(None, reason="FileNotFoundError"),
        "pipe.jpg": Odd(None, reason="not a regular file"),
        "device.jpg": Odd(None, reason="not a regular file"),
        "forbidden.jpg": Odd(None, **(dict(colours=colours) if os.geteuid() == 0 else dict(reason="PermissionError"))),
    }  # fmt: skip
    if features.check("avif"):
        odd["an_avif.jpg"] = Odd(encoded(halves, "AVIF", quality=95), colours)
    return odd


def write_odd(folder: Path, odd: dict[str, Odd]) -> Path:
    """The files, and a folder that has the name of one."""
    (folder / "folder.jpg").mkdir(parents=True)
    for name, (content, *_) in odd.items():
        if content is not None:
            (folder / name).write_bytes(content)
    if "pipe.jpg" in odd:
        (folder / "nowhere.jpg").symlink_to(folder / "gone")
        os.mkfifo(folder / "pipe.jpg")
        (folder / "device.jpg").symlink_to("/dev/zero")
        (folder / "forbidden.jpg").write_bytes(odd["plain.jpg"].content)
        (folder / "forbidden.jpg").chmod(0)
    return folder
