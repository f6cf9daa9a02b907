"""Runs that are killed, run out of disk or find their checkpoints damaged go on from the newest good one."""

from __future__ import annotations

from pathlib import Path

from process import run_python
from test_train import assert_same_run, metrics

TIMES = ("seconds", "images_per_second", "data_wait")


def rows(run: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics(run)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_twenty_kills_do_not_change_a_bit(tmp_path):
    kills = run_python("twenty_kills.py", tmp_path, OMP_NUM_THREADS=1)
    assert kills.returncode == 0 and kills.stdout.count("exit code") == 20, kills.stdout + kills.stderr
    run, whole = tmp_path / "killed", tmp_path / "whole"
    assert_same_run(run, whole)
    assert rows(run) == rows(whole)
    exported = "exported/student_timm.safetensors"
    assert (run / exported).read_bytes() == (whole / exported).read_bytes()
    assert names(run / "checkpoints") == ["last", "step_00000098", "step_00000100"]
    assert names(run / "exported") == ["student_timm.safetensors"]
