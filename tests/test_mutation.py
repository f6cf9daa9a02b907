"""The list of planted bugs fits the sources, and some of them are planted here."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutation.mutants import HARMLESS, MUTANTS, QUICK
from process import run_python

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", [*MUTANTS, HARMLESS], ids=lambda m: m.name)
def test_planted_bug_fits_the_sources(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: adapt {mutant.old!r} in tests/mutation/mutants.py"
    assert mutant.new != mutant.old


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15 and set(QUICK) <= {m.name for m in MUTANTS}


def test_quick_bugs_are_found():
    done = run_python("mutation/run.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUICK)} of {len(QUICK)} planted bugs found" in done.stdout
