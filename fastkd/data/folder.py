"""Lists the images of a folder tree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .reading import read_file
from .source import ImageFiles, by_folder

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .ppm .pgm .pbm .pnm .tif .tiff .gif .jp2 .tga".split()
)


class ImageFolder(ImageFiles):
    """The images below a folder, at any depth, sorted by path.

    Class folders are optional. Where there are some, the class of an image is the first folder level below the
    root: ``root/cat/a.jpg`` and ``root/cat/more/b.png`` are both ``cat``.

    Args:
        root: folder. Links are followed; hidden files and folders (leading dot) are left out.

    Attributes:
        root: the folder, a `Path`.
        paths: paths of the images relative to the root, strings with ``/``.
        classes: sorted names of the first-level folders that hold images.
        labels: for each image the index of its class, -1 for an image directly in the root.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: `root` is a file, or holds no image.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser()
        if not self.root.exists():
            raise FileNotFoundError(f"image folder {str(root)!r}: no such folder; check the path")
        if not self.root.is_dir():
            raise ValueError(f"image folder {str(root)!r}: got a file, expected a folder of images")
        self.paths = sorted(walk(self.root))
        if not self.paths:
            names = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            raise ValueError(
                f"image folder {str(root)!r}: got no image, expected files at any depth with one of the endings {names}"
            )
        self.classes, self.labels = by_folder(self.paths)

    def path(self, index: int) -> str:
        """Full path of an image."""
        return f"{self.root}/{self.paths[index]}"

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def stamps(self):
        for index in range(len(self)):
            try:
                status = os.stat(self.path(index))
            except OSError:  # a broken link: reading will say so
                yield None
            else:
                yield status.st_size, status.st_mtime_ns


def walk(root: Path, endings: Iterable[str] = IMAGE_SUFFIXES) -> Iterator[str]:
    """Paths relative to a folder of the files below it with one of these endings, in no order; hidden ones left out."""
    root, endings = str(root), tuple(endings)
    seen: set[tuple[int, int]] = set()  # real folders already visited: a link may point back up
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(endings):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
