"""The pipeline demo: its folders and splits, its table, and a whole short run through the public commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.demos import DEMOS, pipeline, pipeline_data, pipeline_report
from fastkd.train.config import ConfigError


def picture(random: np.random.Generator, size: tuple[int, int], channels: int = 3) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (4, 4, channels), np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def write(image: Image.Image, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_photographs_of_the_packages_are_no_art(tmp_path, random):
    wallpapers, mate, own = tmp_path / "wallpapers", tmp_path / "backgrounds/mate", tmp_path / "own"
    for path in (
        wallpapers / "Path/contents/images/2560x1600.jpg", wallpapers / "Path/contents/screenshot.jpg",
        wallpapers / "Cluster/contents/images/3840x2160.png", mate / "nature/Dune.jpg", mate / "abstract/Silk.png",
        own / "beach.JPG", own / "2026/wood.png",
    ):  # fmt: skip
        write(picture(random, (8, 8)), path)
    (wallpapers / "Path/contents/images/1024x768.jpg").symlink_to("2560x1600.jpg")
    found = pipeline_data.photographs([wallpapers, mate, own])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == [
        "wallpapers/Path/contents/images/2560x1600.jpg", "backgrounds/mate/nature/Dune.jpg", "own/2026/wood.png",
        "own/beach.JPG",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected photographs; apt install plasma-workspace-wallpapers"):
        pipeline_data.photographs([tmp_path / "empty"])


def test_tiles_are_disjoint_and_split_by_photograph(tmp_path, random):
    photos = [tmp_path / f"{number}.jpg" for number in range(6)]
    for path, size in zip(photos, [(2000, 1600)] + 5 * [(300, 280)]):
        write(picture(random, size), path)
    pipeline_data.write_tiles(photos, tmp_path / "tiles")
    seen, held_out = (sorted((tmp_path / "tiles" / part).rglob("*.jpg")) for part in ("seen", "held_out"))
    assert [path.parent.name for path in held_out] == ["005"]  # every sixth photograph, every sixth of its four tiles
    assert {path.parent.name for path in seen} == {f"00{n}" for n in range(5)} and len(seen) == 7 * 6 + 4 * 4
    # Shrunk first: the tiles of the large photograph, side by side, are nearly the whole of it.
    whole = np.asarray(Image.open(photos[0]).resize((1000, 800), Image.Resampling.BICUBIC)).astype(float)
    for path in seen[: 7 * 6]:
        top, left = map(int, path.stem.split("_"))
        assert np.abs(np.asarray(Image.open(path)) - whole[top : top + 128, left : left + 128]).mean() < 3


def test_each_stamp_is_there_once(tmp_path, random):
    first, second = (picture(random, (40, 30), 4) for _ in range(2))
    for image, path in (
        (first, "animals/birds/duck.png"), (first, "people/duck.png"), (second, "town/bus.png"),
        (second.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "vehicles/bus.png"), (second, "town/bus_mirror.png"),
    ):  # fmt: skip
        write(image, tmp_path / path)
    images, categories = pipeline_data.load_stamps(tmp_path, 28)
    assert images.shape == (2, 28, 28, 3) and categories == ["animals", "town"]


def test_split_is_seeded_and_holds_every_category():
    labels = ["a"] * 40 + ["b"] * 10 + ["c"] * 2
    held_out = pipeline_data.split(labels, seed=0)
    assert [sum(held_out[:40]), sum(held_out[40:50]), sum(held_out[50:])] == [10, 2, 1]
    assert held_out == pipeline_data.split(labels, seed=0) != pipeline_data.split(labels, seed=1)


def test_folders_hold_every_stamp_on_one_side(tmp_path, random):
    write(picture(random, (128, 128)), tmp_path / "tiles/seen/000/0_0.jpg")
    write(picture(random, (128, 128)), tmp_path / "tiles/held_out/005/0_0.jpg")
    images = torch.from_numpy(random.integers(0, 256, (8, 28, 28, 3), np.uint8))
    folders = pipeline_data.write(images, ["a", "b"] * 4, tmp_path / "tiles", tmp_path / "seed_0", 0)
    assert folders.counts() == dict(unlabelled=7, held_out=3, train=6, val=2)
    sides = [{path.name for path in folder.rglob("*.png")} for folder in (folders.train, folders.val)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8
    assert {path.name for path in (folders.unlabelled / "stamps").rglob("*.png")} == sides[0]
    assert {path.name for path in (folders.held_out / "stamps").rglob("*.png")} == sides[1]
    # The view that a stamp is judged by is the whole stamp.
    from fastkd.data import load_images

    path = next(folders.val.rglob("*.png"))
    assert torch.equal(load_images([path], 28)[0], images[int(path.stem)])


def test_table_pairs_by_seed():
    rows = [
        dict(arm=arm, seed=seed, knn=base + step * seed, linear=0.5, seconds=60.0, unlabelled=9, train=6, val=100)
        for arm, base, step in ((pipeline_report.MAE, 0.4, 0.1), (pipeline_report.BOTH, 0.5, 0.1))
        for seed in (1, 0)
    ]
    rows[2]["export_gaps"] = dict(timm=2e-7, transformers=1e-7)
    table = pipeline_report.table(rows)
    both = next(row for row in table.rows if row[0] == pipeline_report.BOTH)
    assert both == (
        pipeline_report.BOTH,
        "2",
        "55.0 (45 to 64)",
        "+10.0 ± 0.0",
        "50.0 (40 to 60)",
        "+0.0 ± 0.0",
        "",
        "",
        "60",
    )
    assert any("at most 2e-07" in note for note in pipeline_report.notes(rows))


def test_what_is_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ConfigError) as error:
        pipeline.main(pipeline.Config(stamps=tmp_path, photos=(tmp_path,), out=tmp_path / "out"))
    assert any("pip install no-such-package" in line for line in error.value.problems)
    assert any("--photos" in line for line in error.value.problems)
    assert any("tuxpaint-stamps-default" in line for line in error.value.problems)
    assert not (tmp_path / "out").exists()


def test_quick_run(tmp_path, capfd, monkeypatch):
    """Every command of the way works on what the one before it left, and what is finished is not done again."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert "pipeline" in DEMOS
    monkeypatch.setattr("fastkd.train.plots.loss_curves", lambda *_: None)  # half of the time, and shown elsewhere
    config = pipeline.Config(out=tmp_path / "out", quick=True)
    assert pipeline.main(config) == 0
    commands = [line.split()[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("$ fastkd ")]
    judged = ["eval", "finetune"]
    controls = [*judged, "pretrain", *judged, "distill", *judged]
    whole_way = ["pretrain", "distill", *judged, "export", "export"]
    assert [words[0] for words in commands] == [*controls, *whole_way, "eval", "eval"]
    trained = [words for words in commands if words[0] in ("pretrain", "distill")]
    option = {name: [words[words.index(name) + 1] for words in trained] for name in ("--steps", "--student", "--out")}
    assert option["--steps"] == ["4", "4", "2", "2"]  # no control is shorter than both phases together
    assert len(set(option["--student"][:3])) == 1 and option["--student"][3] == option["--out"][2]
    settings, *rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert settings["quick"] and [row["arm"] for row in rows] == list(pipeline_report.ARMS)
    assert all(0 <= row[score] <= 1 for row in rows for score in ("knn", "linear"))
    assert all(0 <= row["finetuned"] <= 1 for row in rows[:4]) and "finetuned" not in rows[4]
    assert max(rows[3]["export_gaps"].values()) < 1e-5
    for name in ("feature_similarity.png", "reconstruction.png"):
        assert Image.open(tmp_path / "out" / name).width > 300
    assert "MAE, then distilled" in (tmp_path / "out/results.md").read_text()

    monkeypatch.setattr(pipeline.cli, "main", lambda words: pytest.fail(f"ran again: {words}"))
    assert pipeline.main(config) == 0

    # An export that is not what it came from fails the demo.
    rows[3]["export_gaps"]["timm"] = 0.01
    (tmp_path / "out/rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (settings, *rows)))
    assert pipeline.main(config) == 1


def test_a_command_that_fails_ends_the_demo(tmp_path):
    from rich.console import Console

    seed = object.__new__(pipeline.Seed)
    seed.console = Console(quiet=True)
    with pytest.raises(SystemExit) as stopped:
        seed.fastkd("eval", "nothing", data=tmp_path / "none", val_data=tmp_path)
    assert stopped.value.code == 2
