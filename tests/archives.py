"""Tar archives for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """An archive of (name or header, content); a header keeps its type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            member = tarfile.TarInfo(member) if isinstance(member, str) else member
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, out: Path, shards: int = 2, prefix: str = "") -> Path:
    """The files of a folder dealt out to several archives."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for shard in range(shards):
        members = ((prefix + path.relative_to(folder).as_posix(), path.read_bytes()) for path in files[shard::shards])
        write_tar(out / f"{shard:05}.tar", members)
    return out
