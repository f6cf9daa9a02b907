"""What a planted bug is."""

from __future__ import annotations

from typing import NamedTuple

MASKED = "fastkd/ops/masked"
FEATURES = "fastkd/ops/features"


class Mutant(NamedTuple):
    """One planted bug: `old` occurs once in `file` and becomes `new`; `tests` are arguments of pytest.

    `cpu`: the CPU variant that must run, where the file is compiled in one alone.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    cpu: str = ""


def accuracy(op: str, backend: str) -> tuple[str, ...]:
    return ("test_ops.py", "-k", f"test_accuracy and {op} and {backend}")
