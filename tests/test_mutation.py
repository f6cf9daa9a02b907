"""The list of planted bugs fits the sources, and some of them are planted here."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutation import run
from mutation.mutants import MUTANTS, QUICK, Mutant

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_planted_bug_fits_the_sources(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: adapt {mutant.old!r} in tests/mutation/mutants.py"
    assert mutant.new != mutant.old


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15 and set(QUICK) <= {m.name for m in MUTANTS}


def test_quick_bugs_are_found(capsys):
    assert run.main(["--quick"]) == 0, capsys.readouterr().out
    assert f"{len(QUICK)} of {len(QUICK)} planted bugs found" in capsys.readouterr().out


def test_a_harmless_change_survives(tmp_path):
    """The judge does not call everything killed."""
    harmless = Mutant(
        "comment", "fastkd/train/schedule.py", "from __future__", "# a comment\nfrom __future__", QUICK_TESTS
    )
    assert run.Workspace(tmp_path / "copy").judge(harmless) == "survived"


QUICK_TESTS = ("test_golden_models.py", "-k", "lr_schedule")
