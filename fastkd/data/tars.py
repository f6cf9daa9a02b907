"""Pictures in tar archives, WebDataset shards among them, read where they lie: nothing is ever unpacked.

Each archive is scanned once for names and places of its members, and the result kept in the user's cache; after that a
picture is one read at its offset, in any order and from any process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from .folder import IMAGE_SUFFIXES, walk
from .reading import check_length, printable
from .source import ImageFiles, by_folder

logger = logging.getLogger("fastkd")

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z")
MOST_CLASSES = 1 << 20  # a larger class number is taken for a mistake
LABEL_BYTES = 1 << 20  # of a .cls or .json member
LAYOUT = 1  # of what the cache holds


class TarImages(ImageFiles):
    """The pictures in one .tar archive, or in all below a folder, sorted by name, then by archive.

    A member counts by its ending, as files in folders do. The label of ``KEY.jpg`` is what ``KEY.cls`` of the same
    archive holds, else "label" in ``KEY.json``: a class number or a class name. Where no picture at all has one, the
    first folder of the names is the class.

    Args:
        root: a .tar file, or a folder of them at any depth.

    Attributes:
        root, paths, classes, labels: as `ImageSource` says; with class numbers, `classes` are "0", "1", ...
        refused: ((archive:member, reason), ...) of what is not read: links, devices, sparse files, names that point
            out of the archive, labels that make no sense, and where an archive ends too early.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: compressed, or no archive, or no picture in it; class names beside class numbers.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser()
        self._archives = _list(self.root)
        found = _indices(self._archives)
        names = [name for index in found for name in index["name"]]
        archive = np.repeat(np.arange(len(found), dtype=np.int32), [len(index["name"]) for index in found])
        order = sorted(range(len(names)), key=names.__getitem__)  # stable: then by archive
        self.paths = [names[place] for place in order]
        self._archive = archive[order]
        self._offset, self._size = (
            np.array([value for index in found for value in index[column]], np.int64)[order]
            for column in ("offset", "size")
        )
        given = [label for index in found for label in index["label"]]
        self.refused = tuple((place, why) for index in found for place, why in index["refused"])
        if self.refused:
            told = "; ".join(f"{place}: {why}" for place, why in self.refused[:5])
            more = f" and {len(self.refused) - 5} more" if len(self.refused) > 5 else ""
            logger.warning("%s: %d members not read: %s%s", self.root, len(self.refused), told, more)
        if not self.paths:
            why = f" ({self.refused[0][0]}: {self.refused[0][1]})" if self.refused else ""
            raise ValueError(f"archive {str(root)!r}: got no image in {len(self._archives)} archives{why}")
        self.classes, self.labels = _classes(self.root, [given[place] for place in order], self.paths)

    def path(self, index: int) -> str:
        return f"{self._archives[self._archive[index]]}:{self.paths[index]}"

    def read(self, index: int) -> bytes:
        size, offset = int(self._size[index]), int(self._offset[index])
        check_length(size)
        with open(self._archives[self._archive[index]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise OSError("the archive became shorter")
        return data

    def stamps(self):
        status = {path: os.stat(path) for path in self._archives}
        for index, (offset, size) in enumerate(zip(self._offset.tolist(), self._size.tolist())):
            archive = status[self._archives[self._archive[index]]]
            yield offset, size, archive.st_size, archive.st_mtime_ns


def is_archive(path: Path) -> bool:
    """Whether a path is a tar file, by its name; also a compressed one, which `TarImages` refuses."""
    return path.is_file() and path.name.lower().endswith((".tar", *COMPRESSED))


def holds_archives(folder: Path) -> bool:
    """Whether there are archives below a folder, and no image files."""
    return next(walk(folder, (".tar", *COMPRESSED)), None) is not None and next(walk(folder), None) is None


def _list(root: Path) -> list[Path]:
    if not root.exists():
        raise FileNotFoundError(f"archive {str(root)!r}: no such file or folder; check the path")
    found = [root] if root.is_file() else [root / name for name in sorted(walk(root, (".tar", *COMPRESSED)))]
    compressed = [path for path in found if path.name.lower().endswith(COMPRESSED)]
    if compressed:
        raise ValueError(
            f"archive {str(compressed[0])!r}: got a compressed archive, expected a plain .tar, which can be read at "
            "any place; uncompress it first (gunzip, bunzip2, unxz, unzstd): pictures are compressed already"
        )
    return [path for path in found if path.is_file()]


def _indices(archives: list[Path]) -> list[dict]:
    """What `_scan` says of each archive: from the cache where it has not changed since, else found in parallel."""
    places = {path: _cache(path) for path in archives}
    found = {}
    for path, cache in places.items():
        with contextlib.suppress(OSError, ValueError):
            found[path] = json.loads(cache.read_text())
    new = [path for path in archives if path not in found]
    if new:
        logger.info("listing the members of %d archives; the list is kept in %s", len(new), places[new[0]].parent)
    with contextlib.ExitStack() as stack:
        run = map
        if len(new) > 1:
            workers = min(len(new), os.cpu_count() or 1)
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(workers)).map
        for path, index in zip(new, run(_scan, new)):
            found[path] = index
            with contextlib.suppress(OSError):  # no place for a cache: the next run scans again
                cache = places[path]
                cache.parent.mkdir(parents=True, exist_ok=True)
                fresh = cache.with_suffix(f".{os.getpid()}.part")
                fresh.write_text(json.dumps(index))
                os.replace(fresh, cache)
    return [found[path] for path in archives]


def _cache(path: Path) -> Path:
    """Where the list of an archive as it is now is kept."""
    status = path.stat()
    key = hashlib.sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns, LAYOUT)).encode()).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd/tars" / f"{key[:32]}.json"


def _scan(path: Path) -> dict:
    """Columns name, offset, size and label of the pictures, and what is `refused`."""
    found: dict[str, list] = dict(name=[], offset=[], size=[], label=[], refused=[])
    labels: dict[str, dict[str, int | str]] = {".cls": {}, ".json": {}}  # by ending, then by KEY
    length = path.stat().st_size
    for tar, member in _members(path, found["refused"]):
        name = member.name.removeprefix("./")
        key, ending = os.path.splitext(name)
        ending = ending.lower()
        hidden = any(part.startswith(".") and part.strip(".") for part in name.split("/"))
        if hidden or member.isdir() or not (ending in IMAGE_SUFFIXES or ending in labels):
            continue
        why = _why_not(member, name, length)
        if not why and ending in labels:
            try:
                label = _label(tar, member, ending)
                if label is not None:
                    labels[ending][key] = label
            except (ValueError, RecursionError) as error:
                why = f"no label: {error}"
        elif not why:
            for column, value in zip(("name", "offset", "size"), (name, member.offset_data, member.size)):
                found[column].append(value)
        if why:
            found["refused"].append((printable(f"{path}:{name}"), why))
    keys = (os.path.splitext(name)[0] for name in found["name"])
    found["label"] = [labels[".cls"].get(key, labels[".json"].get(key)) for key in keys]
    return found


def _members(path: Path, refused: list) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of an archive up to where it is damaged or cut, which is added to `refused`."""
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
        except tarfile.ReadError as error:
            raise ValueError(
                f"archive {str(path)!r}: not a plain tar archive ({error}); if it is compressed, uncompress it first"
            ) from error
        end = -1
        with tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep all of them
                    if tar.offset <= end:
                        raise ValueError("a member ends before it begins")
                    end = tar.offset
                    yield tar, member
            except Exception as error:  # tarfile raises many types on damaged headers
                refused.append((str(path), f"damaged or cut at byte {max(end, 0)}: {error}"))
            else:
                refused += [(str(path), why) for why in _wrong_end(file, tar.offset)]


def _why_not(member: tarfile.TarInfo, name: str, length: int) -> str:
    """Why a member is not read; empty where it is."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "a name that points out of the archive"
    if member.issym() or member.islnk():
        return f"a link (to {printable(member.linkname)!r}), which is not followed"
    if member.issparse():
        return "a sparse file; pack it again without --sparse"
    if not member.isreg():
        return "a device or pipe"
    if member.offset_data + member.size > length:
        return f"cut: the archive ends {member.offset_data + member.size - length} bytes too early"
    return ""


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> int | str | None:
    """What a .cls or .json member says; None for JSON without label. ValueError where it makes no sense."""
    if member.size > LABEL_BYTES:
        raise ValueError(f"{member.size} bytes, more than {LABEL_BYTES}")
    text = os.pread(tar.fileobj.fileno(), member.size, member.offset_data).decode().strip()
    label = text
    if ending == ".json":
        content = json.loads(text)
        label = content.get("label") if isinstance(content, dict) else None
        if label is None:
            return None
    elif text.removeprefix("-").isdecimal():
        label = int(text)
    if type(label) not in (int, str) or label == "" or (isinstance(label, int) and not 0 <= label < MOST_CLASSES):
        raise ValueError(f"got {label!r}, expected a class number from 0 on or a class name")
    return label


def _wrong_end(file, offset: int) -> list[str]:
    """What is wrong with the end of an archive: a whole one has zeros from its last member on."""
    file.seek(offset)
    tail = file.read(1 << 16)
    if not tail:
        return [f"ends at byte {offset} without an end mark: it may be cut"]
    return [f"what follows byte {offset} is damaged, cut or another archive, and not read"] if any(tail) else []


def _classes(root: Path, given: list[int | str | None], names: list[str]) -> tuple[list[str], list[int]]:
    """Names of the classes, and each picture's."""
    kinds = {type(label) for label in given} - {type(None)}
    if not kinds:
        return by_folder(names)
    if kinds == {int}:
        classes = [str(number) for number in range(max(label for label in given if label is not None) + 1)]
        return classes, [-1 if label is None else label for label in given]
    if kinds == {str}:
        classes = sorted({label for label in given if label is not None})
        index = {name: place for place, name in enumerate(classes)} | {None: -1}
        return classes, [index[label] for label in given]
    raise ValueError(f"archive {str(root)!r}: got class numbers and class names as labels, expected one kind")
