"""The demo of PromptKD on made-up towers and pictures, and what it says where its packages are missing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastkd.demos import DEMOS, promptkd, promptkd_towers, stamps

FOLDERS = ["animals/birds", "town/roadsigns", "food/fruit", "plants/trees"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.layer(x)).mean(1, keepdim=True)


class Upper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class Text(nn.Module):
    """Words by their letters; one prompt that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Module()
        self.prompts.tokens = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, texts):
        letters = torch.tensor([[text.count(c) for c in "abcdefghijklmnop"] for text in texts]).float()
        return letters + self.prompts.tokens[0]

    def plain(self, texts):
        return self(texts).detach() - self.prompts.tokens[0].detach()


@pytest.fixture
def config(tmp_path, monkeypatch) -> promptkd.Config:
    """Eight pictures of each of four folders, and one of a folder that is too small to be a class."""
    folders = [folder for folder in FOLDERS for _ in range(8)] + ["odd"]
    kinds = torch.tensor([FOLDERS.index(f) if f in FOLDERS else 0 for f in folders])
    random = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(4, 20, generator=random)[kinds] + torch.randn(len(kinds), 20, generator=random)
    tokens = torch.randn(4, 3, 8, generator=random)[kinds] + 0.3 * torch.randn(len(kinds), 3, 8, generator=random)
    upper = Upper().requires_grad_(False)
    captions = [f"A {folder} picture." for folder in folders]
    pixels = torch.zeros(len(kinds), 2, 2, 3, dtype=torch.uint8)
    monkeypatch.setattr(stamps, "load", lambda folder: stamps.Stamps(pixels, captions, folders))
    monkeypatch.setattr(promptkd_towers, "teacher_features", lambda pictures: images)
    monkeypatch.setattr(promptkd_towers, "student_tokens", lambda pictures: (upper, tokens))
    monkeypatch.setattr(promptkd_towers, "upper_blocks", lambda: upper)
    monkeypatch.setattr(promptkd_towers, "TextTower", Text)
    monkeypatch.setattr(promptkd_towers, "missing", lambda folder: [])
    return promptkd.Config(out=tmp_path, quick=True)


def test_folders_and_pictures_are_split_by_the_seed(config):
    demo = promptkd.Demo(config)
    assert demo.names == ["birds", "fruit", "trees", "road signs"] and demo.labels[-1] == -1
    split = demo.split(3)
    assert len(split.base) == len(split.novel) == 2 and len(torch.cat([split.base, split.novel]).unique()) == 4
    assert split.train[:-1].sum() == 16 and split.train[-1] and not split.is_base[-1]
    assert torch.equal(promptkd.Demo(config).split(3).train, split.train)
    assert not torch.equal(demo.split(4).train, split.train)


def test_scores_judge_base_and_novel_apart_on_pictures_that_were_not_seen(config):
    demo = promptkd.Demo(config)
    split = demo.split(0)
    right = torch.nn.functional.one_hot(demo.labels.clamp_min(0), 4).float()
    assert demo.scores(right, 0) == dict(base=1.0, novel=1.0, mean=1.0)
    wrong = torch.where((split.train | split.is_base)[:, None], 1 - right, right)
    assert demo.scores(wrong, 0) == dict(base=0.0, novel=1.0, mean=0.0)


def test_arms_start_alike_and_stage_one_changes_the_words(config):
    demo = promptkd.Demo(config)
    one, other = demo.student(5), demo.student(5, prompts=False)
    for name, value in other.projector.state_dict().items():
        assert torch.equal(value, one.projector.state_dict()[name])
    assert other.encoder.prompts is None and one.encoder.prompts.tokens.shape == (2, 4, 8)
    assert demo.text.prompts.tokens.abs().max() > 0
    assert torch.equal(demo.teacher(5).bank.text_features, promptkd.Demo(config).teacher(5).bank.text_features)


def test_quick_demo(config, tmp_path):
    assert "promptkd" in DEMOS
    assert promptkd.main(config) == 0
    settings, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {row["arm"] for row in rows}
    assert {*promptkd.TRAINED, promptkd.TEACHER, promptkd.UNTRAINED, promptkd.ZERO_SHOT} == found
    assert settings["baseline"] == promptkd.HARD
    assert all(0 <= row[metric.key] <= 1 for row in rows for metric in promptkd.METRICS)


def test_what_is_missing_is_said_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(promptkd_towers, "PACKAGES", {"no_such_module": "no-such-package==1.0"})
    with pytest.raises(SystemExit, match="(?s)pip install --no-deps no-such-package==1.0.*apt install tuxpaint"):
        promptkd.main(promptkd.Config(out=tmp_path, stamps=tmp_path))
    with pytest.raises(FileNotFoundError, match="got no pictures.*dpkg-deb -x"):
        stamps.load(tmp_path)


def test_stamps_are_put_on_white_squares(tmp_path):
    from PIL import Image

    for name in ("animals/cat/red.png", "animals/cat/red_mirror.png", "symbols/x.png", "animals/cartoon/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (8, 4), (255, 0, 0, 255)).save(tmp_path / name)
    (tmp_path / "animals/cat/red.txt").write_text("A red thing.\nfr.utf8=Une chose.\n")
    found = stamps.load(tmp_path, size=8)
    assert found.captions == ["A red thing."] and found.folders == ["animals/cat"]
    assert found.images.shape == (1, 8, 8, 3)
    assert found.images[0, 0, 0].tolist() == [255, 255, 255] and found.images[0, 4, 4].tolist() == [255, 0, 0]
