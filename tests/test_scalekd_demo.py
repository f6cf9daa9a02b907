"""The demo of ScaleKD: what its arms share, the cached teacher, and a short run of all of them."""

from __future__ import annotations

import json

import pytest
import torch

from fastkd.demos import DEMOS, scalekd

pytest.importorskip("sklearn")
pytest.importorskip("timm")


@pytest.fixture
def study(tmp_path) -> scalekd.Study:
    return scalekd.Study(scalekd.Config(out=tmp_path, steps=2, teacher_steps=1))


def test_the_student_has_seen_no_held_out_digit(study):
    assert len(study.test.labels) == 600 and len(study.train.labels) == 1197
    assert study.train.images.shape[1:] == (8, 8, 1) and study.train.images.amax() == 255
    assert study.train.labels.bincount().min() > 80


def test_arms_start_from_the_same_student(study):
    """Without learning all arms end at the same weights, whatever projectors they drew."""
    found = {}
    judged = study._judge

    def keep(model):
        found[arm] = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
        return judged(model)

    study._judge = keep
    for arm in (scalekd.CE, scalekd.LOGITS, scalekd.FULL):
        study.run(arm, dict(lr=0.0, alpha=1.0), 3)
    for name, value in found[scalekd.CE].items():
        if "num_batches" not in name:
            assert torch.equal(value, found[scalekd.LOGITS][name]) and torch.equal(value, found[scalekd.FULL][name])


def test_the_trained_teacher_is_kept(study):
    first = study.teacher()
    again = scalekd.Study(study.config).teacher()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert len(list(study.config.out.glob("teacher_*.safetensors"))) == 1


def test_quick_demo(tmp_path):
    assert "scalekd" in DEMOS
    assert scalekd.main(scalekd.Config(out=tmp_path, quick=True)) == 0
    settings, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(scalekd.CHOSEN) and settings["baseline"] == scalekd.CE
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
