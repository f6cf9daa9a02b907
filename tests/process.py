"""Runs Python in another process, with the fastkd that is being tested here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastkd

TESTS = Path(__file__).parent
PACKAGE_ROOT = Path(fastkd.__file__).parents[1]


def run_python(*arguments: object, root: Path = PACKAGE_ROOT, **environment: object) -> subprocess.CompletedProcess:
    """Runs ``python arguments`` in the folder of the tests; `root` is where fastkd is imported from."""
    # Not in the repository's root: Python would find the package there, even where another one is installed.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=TESTS, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, **{k: str(v) for k, v in environment.items()}},
    )  # fmt: skip


def run_pytest(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Runs pytest on files of the tests folder, quietly and without leaving files behind."""
    return run_python("-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *arguments, **options)
