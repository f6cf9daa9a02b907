"""The demo of self-distillation: what its arms share, and a short run of all of them."""

from __future__ import annotations

import json

import pytest
import torch

from fastkd.demos import DEMOS, selfdist

pytest.importorskip("sklearn")


@pytest.fixture
def study(tmp_path) -> selfdist.Study:
    return selfdist.Study(selfdist.Config(out=tmp_path, steps=2, fine_tuning_steps=2))


def test_digits_are_split_by_the_seed(study):
    assert study.images.shape == (1797, 16, 16, 1) and study.images.dtype == torch.uint8
    assert study.images.amax() == 255 and study.images.amin() == 0
    pictures, labelled, held_out = study._split(3)
    assert len(pictures) == 200 and len(held_out) == 1597 and len(torch.cat([pictures, held_out]).unique()) == 1797
    assert study.labels[labelled].bincount().tolist() == [10] * 10 and torch.isin(labelled, pictures).all()
    assert torch.equal(study._split(3)[0], pictures) and not torch.equal(study._split(4)[0], pictures)


def test_both_phases_start_from_the_same_weights_and_see_the_same_batches(study):
    """One step without learning leaves theta_0; without its weight phase 2 is phase 1."""
    before = study.theta_0.state_dict()
    still = study._pretrain(5, 2, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in still.state_dict().items())
    phase_1 = study._pretrain(5, 2, 1e-3)
    vectors = torch.zeros(200, study.theta_0.embed_dim)
    phase_2 = study._pretrain(5, 2, 1e-3, vectors, weight=0.0)
    for name, value in phase_2.state_dict().items():
        torch.testing.assert_close(value, phase_1.state_dict()[name], rtol=0, atol=2e-4, msg=name)
    pulled = study._pretrain(5, 2, 1e-3, vectors, weight=1.0)
    assert any((value - phase_1.state_dict()[name]).abs().max() > 5e-4 for name, value in pulled.state_dict().items())


def test_quick_demo(tmp_path):
    assert "selfdist" in DEMOS
    assert selfdist.main(selfdist.Config(out=tmp_path, quick=True)) == 0
    settings, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(selfdist.CHOSEN) and settings["baseline"] == selfdist.PLAIN
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    distance = {row["arm"]: row["log2_distance"] for row in rows if "log2_distance" in row}
    assert distance[selfdist.SELF] < distance[selfdist.NONE]
