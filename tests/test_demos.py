"""The demos: embedded data, probes, paired training, statistics, and one whole run on a few pictures."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.demos import DEMOS, dmae, pictures, report, training
from fastkd.evaluation import pictures as evaluate
from fastkd.methods.dmae import DMAE
from fastkd.models.checkpoints import load_vit
from fastkd.models.saving import save
from fastkd.train.config import ConfigError

SHAPE = dict(img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=16,
             decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of 12 pictures, red and blue, some of them transparent, some below a second folder level."""
    random = np.random.default_rng(0)
    for label, channel in (("blue", 2), ("red", 0)):
        for i in range(12):
            pixels = random.integers(0, 60, (20, 14, 4), np.uint8)
            pixels[..., channel] += 180
            pixels[..., 3] = 255
            pixels[:8, :, 3] = 0 if i == 0 else 255
            path = tmp_path / "photos" / label / ("deep" if i % 2 else "") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "empty").mkdir()
    return tmp_path / "photos"


def test_embedded_pictures():
    train, test = pictures.embedded()
    assert train.images.shape == (6000, 28, 28, 1) and test.images.shape == (2000, 28, 28, 1)
    assert train.images.dtype == torch.uint8
    assert (train.labels.bincount() == 600).all() and (test.labels.bincount() == 200).all()
    assert "Zalando" in (pictures.ASSETS / "LICENSE.fashion-mnist").read_text()
    # Trousers leave the lower corners free and bags do not reach the top: labels belong to their pictures.
    means = torch.stack([train.images[train.labels == c].float().mean((0, 3)) for c in range(10)])
    assert means[1][:, 13:15].mean() > 4 * means[1][:, :4].mean() and means[8][:4].mean() < means[0][:4].mean()


def test_embedded_teacher_beats_its_untrained_self():
    train, test = (part.subset(slice(500)) for part in pictures.embedded())
    teacher = load_vit(dmae.TEACHER)
    untrained = training.masked_autoencoder(
        dict(img_size=28, patch_size=4, in_chans=1, embed_dim=teacher.embed_dim, depth=teacher.depth,
             num_heads=teacher.num_heads, mean=teacher.mean, std=teacher.std), seed=0,
    )  # fmt: skip
    with training.one_thread():
        trained, base = (evaluate.evaluate(model, train, test) for model in (teacher, untrained))
    assert trained.knn > base.knn + 0.03 and trained.linear > base.linear


def test_fashion_reads_the_idx_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        pictures.fashion(tmp_path)
    images = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([9, 0, 4])))
    train, _ = pictures.fashion(tmp_path)
    assert train.labels.tolist() == [9, 0, 4]
    assert torch.equal(train.images, torch.from_numpy(images).view(3, 28, 28, 1))


def test_folder_of_pictures(folder):
    train, test = pictures.folder(folder, size=8, channels=3)
    assert train.classes == ("blue", "red") and len(train.labels) == 18 and len(test.labels) == 6
    assert train.labels.bincount().tolist() == [9, 9] and test.labels.bincount().tolist() == [3, 3]
    for part in (train, test):
        channel = torch.where(part.labels == 0, 2, 0)
        middle = part.images[:, 4, 4].gather(1, channel[:, None])
        assert (middle > 170).all()
    everything = torch.cat([train.images, test.images])
    assert len(everything.unique(dim=0)) == 24  # no picture is in both parts
    assert (everything[:, 0] == 255).all(-1).any()  # transparent turns white
    again, _ = pictures.folder(folder, size=8, channels=3)
    assert torch.equal(again.images, train.images)
    assert pictures.folder(folder, size=8, channels=1)[0].images.shape == (18, 8, 8, 1)


def test_folder_without_classes(folder):
    with pytest.raises(ValueError, match="0 class folders"):
        pictures.folder(folder / "red" / "deep", size=8, channels=3)
    with pytest.raises(FileNotFoundError, match="one folder per class"):
        pictures.folder(folder / "nowhere", size=8, channels=3)


def test_probes_on_known_features():
    train = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [0.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    test, truth = torch.tensor([[9.0, 1.0], [0.5, 1.0], [1.0, 0.5]]), torch.tensor([0, 1, 1])
    assert evaluate.knn_accuracy(train, labels, test, truth, k=1) == pytest.approx(2 / 3)
    assert evaluate.knn_accuracy(train, labels, test, truth, k=5) == pytest.approx(2 / 3)  # all vote: class 1
    with pytest.raises(ValueError, match="expected 1 to 5"):
        evaluate.knn_accuracy(train, labels, test, truth, k=6)
    assert evaluate.linear_accuracy(train, labels, test, truth) == pytest.approx(2 / 3)


def test_features_are_mean_patch_tokens():
    model = training.masked_autoencoder(SHAPE, seed=0).train()
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    got = evaluate.features(model, images, batch_size=2)
    assert model.training and not got.requires_grad
    assert torch.allclose(got, model(images).tokens[:, 1:].mean(1).detach(), atol=1e-6)


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(49, 0.75, 12), (49, 0.95, 2), (49, 0.98, 1), (16, 0.98, 1)])
def test_visible_ratio(patches, ratio, visible):
    count, exact = training.visible_ratio(patches, ratio)
    assert count == visible == int(patches * (1 - exact))


def test_runs_are_paired():
    """Student, batches and masks are those of the seed, with or without a teacher."""
    images = torch.randint(0, 256, (32, 8, 8, 3), dtype=torch.uint8)
    teacher = training.masked_autoencoder(SHAPE, seed=9)
    recipe = training.Recipe(steps=2, batch_size=4, lr=1e-3)

    def losses(with_teacher: bool, seed: int) -> list[dict]:
        student = training.masked_autoencoder(SHAPE, seed)
        torch.manual_seed(0)  # the projector
        method = DMAE(student, teacher, (1,), (1,)) if with_teacher else DMAE(student, None)
        rows = []
        training.fit(method, images, 0.75, recipe, seed, lambda step, row: rows.append(row))
        return rows

    plain, distilled, again, other = losses(False, 3), losses(True, 3), losses(True, 3), losses(False, 4)
    assert plain[0]["pixel_loss"] == distilled[0]["pixel_loss"] != other[0]["pixel_loss"]
    assert distilled[0]["align_loss"] > 0 == plain[0]["align_loss"]
    assert distilled == again


def test_statistics_of_seeds():
    stats = report.interval([1.0, 2.0, 4.0])
    assert stats.mean == pytest.approx(7 / 3) and stats.deviation == pytest.approx(1.5275, abs=1e-4)
    assert stats.half_width == pytest.approx(4.3027 * 1.5275 / math.sqrt(3), abs=1e-3)
    assert report.spread([0.5]) == "50.0" and report.spread([0.5, 0.52]) == "51.0 ± 1.4"
    assert report.difference([0.6], [0.5]) == "+10.0"
    assert report.difference([0.6, 0.7], [0.5, 0.6]) == "+10.0 ± 0.0"
    with pytest.raises(ValueError):
        report.difference([0.6], [0.5, 0.6])


def test_markdown_between_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    report.write_between_markers(path, report.Table("T", ("a", "b", "c"), [("x", "y", "1"), ()]).markdown())
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| a | b | c |\n|---|---|---:|\n| x | y | 1 |\n" in text
    path.write_text("nothing")
    for page in (path, tmp_path / "missing.md"):  # said before anything is trained
        with pytest.raises(ConfigError, match="markdown.*results: begin"):
            dmae.main(dmae.Config(markdown=page, out=tmp_path))


def test_wrong_options_are_all_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        dmae.main(dmae.Config(full=True, ratios=(1.5,), width=10))
    assert [line.split(":")[0] for line in error.value.problems] == ["--full", "--ratios", "--width"]
    with pytest.raises(ConfigError, match="apt-get install"):
        dmae.main(dmae.Config(fashion=tmp_path, out=tmp_path))


def test_demo_on_a_folder(folder, tmp_path, capsys, monkeypatch):
    """A whole --full run on 24 pictures, then its continuation, which trains nothing again."""
    assert "dmae" in DEMOS
    teacher = save(training.masked_autoencoder(SHAPE, seed=1), tmp_path / "teacher.safetensors")
    out = tmp_path / "run"
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.MARKERS))
    config = dmae.Config(
        out=out, full=True, data=folder, size=8, teacher=str(teacher), ratios=(0.75,), seeds=(0, 1), steps=4,
        batch_size=4, width=16, depth=4, heads=2, markdown=page,
    )  # fmt: skip
    assert dmae.main(config) == 0
    shown = capsys.readouterr().out
    assert "timm loads it strictly" in shown
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()][1:]
    assert len(rows) == 2 + 2 + 2 * 2 + 2 * len(dmae.OPTIONS)
    assert all(0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 for row in rows)
    table = page.read_text()
    assert table.count("| 75 % |") == 2 + 1 + len(dmae.OPTIONS) and "| untrained student |" in table
    for file in ("scores.png", "curves.png", "reconstruction_75.png"):
        assert Image.open(out / file).size[0] > 300
    monkeypatch.setattr(dmae, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert dmae.main(config) == 0
    assert page.read_text() == table
