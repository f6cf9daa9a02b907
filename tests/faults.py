"""File operations that fail when a test wants it: what a full disk, a bad disk or a read-only one does."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.scandir", "os.fsync"}
READS = {"os.remove", "os.rmdir", "os.scandir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Lets file operations below a folder fail with ENOSPC, chosen by their number.

    Python reports its file operations to audit hooks, and an error that a hook raises is the operation's. Hooks stay
    for good, so there is one.
    """

    def __init__(self) -> None:
        self.folder, self.seen = "", 0
        self._fails: Callable[[int], bool] = lambda number: False
        self._fsync = os.fsync
        sys.addaudithook(self._audit)

    def fail(self, folder: Path, fails: Callable[[int], bool], reads: bool = True) -> None:
        """Starts to count from 1; an operation for whose number `fails` is true fails.

        Without `reads` those that read or delete are left out, which a full disk still does.
        """
        self.folder, self.seen, self._fails, self._reads = str(folder), 0, fails, reads
        os.fsync = self._audited_fsync

    def stop(self) -> int:
        """Back to health; how many operations were counted."""
        self.folder, os.fsync = "", self._fsync
        return self.seen

    def _audited_fsync(self, descriptor: int) -> None:
        sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def _audit(self, event: str, arguments: tuple) -> None:
        folder = self.folder
        if not folder or event not in OPERATIONS or not str(arguments[0]).startswith(folder):
            return
        reads = event in READS or event == "open" and not arguments[2] & WRITING
        if self._reads or not reads:
            self.seen += 1
            self.folder = ""  # what `fails` looks at does not count
            fails, self.folder = self._fails(self.seen), folder
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


FAULTS = Faults()
