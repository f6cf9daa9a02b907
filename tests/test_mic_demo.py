"""The demo of masked image consistency: its scenes, its score, and a short run of all arms."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastkd.demos import DEMOS, mic
from fastkd.demos.outfits import CLASSES, COMPANIONS, TOPS, Scenes, scenes
from fastkd.demos.pictures import FASHION_CLASSES, embedded


@pytest.fixture(scope="module")
def train():
    return embedded()[0]


def test_a_scene_is_of_one_style_and_its_labels_are_where_its_garments_are(train):
    made = scenes(train, 20, shifted=False, seed=3)
    assert made.images.shape == (20, 32, 32, 1) and made.labels.shape == (20, 32, 32)
    assert torch.equal(made.images, scenes(train, 20, shifted=False, seed=3).images)
    for image, labels in zip(made.images[..., 0], made.labels):
        garments = labels.unique()[1:].long() - 1
        assert len((garments % 4).unique()) == 1  # one style
        assert image[labels > 0].min() > 0.15 * 255 - 1 and image[labels == 0].max() <= 0.15 * 255 + 1
    assert len(made.labels.unique()) == 9
    assert CLASSES[1:] == tuple(FASHION_CLASSES[c] for c in TOPS + COMPANIONS)


def test_the_target_has_less_contrast_and_noise_but_the_same_labels(train):
    clean, shifted = (scenes(train, 30, shifted=s, seed=3) for s in (False, True))
    assert torch.equal(clean.labels, shifted.labels)
    difference = shifted.images.float() / 255 - (0.25 + 0.5 * clean.images.float() / 255)
    assert abs(difference.mean()) < 0.02 and 0.1 < difference.std() < 0.16


def test_mean_iou_counts_all_pixels_at_once():
    class Constant(nn.Module):
        mean, std = (0.5,), (0.25,)

        def forward(self, x):
            return torch.eye(9)[:, 1].view(1, 9, 1, 1).expand(len(x), 9, 2, 2)

    labels = torch.zeros(2, 4, 4, dtype=torch.uint8)
    labels[0, :2] = 1  # 8 of 32 pixels: IoU 0.25 of class 1, 0 of the others
    part = Scenes(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), labels)
    assert mic.mean_iou(Constant(), part) == pytest.approx(0.25 / 9)


def test_arms_differ_in_their_treatment_alone(tmp_path):
    study = mic.Study(mic.Config(out=tmp_path, quick=True, steps=2, warmup=0))
    one, two = (study._batch(torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    source = study.run(mic.SOURCE, dict(lr=1e-3), 5)
    assert study.run(mic.SOURCE, dict(lr=1e-3), 5) == source
    assert study.run(mic.MIC, dict(lr=1e-3, weight=0.0), 5) == source  # without its weight nothing is left of it
    assert study.run(mic.SOURCE, dict(lr=0.0), 5) == study.run(mic.UNTRAINED, {}, 5)


def test_quick_demo(tmp_path):
    assert "mic" in DEMOS
    assert mic.main(mic.Config(out=tmp_path, quick=True)) == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(mic.CHOSEN)
    assert all(0 <= row["miou"] <= 1 for row in rows)
