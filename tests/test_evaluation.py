"""fastkd eval: neighbours and heads against plain formulas, what chooses and what only judges, and its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_cli import fastkd
from tiny_run import write_models

from fastkd.data import ImageFolder
from fastkd.evaluation import knn as neighbours_module
from fastkd.evaluation.command import evaluate
from fastkd.evaluation.config import EvalConfig
from fastkd.evaluation.encoders import HeadEncoder, TokenEncoder, load_encoder
from fastkd.evaluation.extract import CenterCrops, extract
from fastkd.evaluation.knn import knn, neighbours, votes
from fastkd.evaluation.linear import Head, judge, split, sweep, train
from fastkd.evaluation.scores import ranking, score, wilson
from fastkd.models import load_vit
from fastkd.models.classifiers import load_classifier, save_classifier
from fastkd.train import ConfigError


def blobs(images: int, classes: int = 4, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one point per class, on scales that differ by feature, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    scales = torch.logspace(-1, 1, width)
    return (centres[labels] + 0.6 * torch.randn(images, width, generator=random)) * scales, labels


def test_neighbours_are_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(neighbours_module, "KEYS", 17)  # several chunks
    monkeypatch.setattr(neighbours_module, "QUERIES", 9)
    sklearn = pytest.importorskip("sklearn.neighbors")
    (keys, labels), (queries, _) = blobs(100), blobs(40, seed=1)
    reference = sklearn.NearestNeighbors(n_neighbors=25, metric="cosine", algorithm="brute").fit(keys.numpy())
    distance, index = reference.kneighbors(queries.numpy())
    cosine, found = neighbours(keys, queries, 25)
    assert np.array_equal(found.numpy(), index)
    assert np.allclose(cosine.numpy(), 1 - distance, atol=1e-6)

    ranked = knn(keys, labels, queries, 4, [1, 7, 25], ranking, temperature=0.07)
    assert list(ranked) == [(k, vote) for k in (1, 7, 25) for vote in ("plain", "weighted")]
    plain = sklearn.KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(keys.numpy(), labels.numpy())
    assert np.array_equal(ranked[7, "plain"][:, 0].numpy(), plain.predict(queries.numpy()))
    weigh = dict(weights=lambda distances: np.exp((1 - distances) / 0.07))
    weighted = sklearn.KNeighborsClassifier(25, metric="cosine", algorithm="brute", **weigh)
    predicted = weighted.fit(keys.numpy(), labels.numpy()).predict(queries.numpy())
    assert np.array_equal(ranked[25, "weighted"][:, 0].numpy(), predicted)
    assert not torch.equal(ranked[25, "weighted"], ranked[25, "plain"])
    with pytest.raises(ValueError, match="k: got 101, expected 1 to 100"):
        neighbours(keys, queries, 101)


def test_votes_by_hand():
    similarity, labels = torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[2, 0, 0]])
    assert votes(similarity, labels, 3).tolist() == [[2.0, 0.0, 1.0]]
    weighted = votes(similarity, labels, 3, 0.1)[0]
    assert torch.allclose(weighted, torch.tensor([math.exp(5) + math.exp(4), 0.0, math.exp(9)]))
    assert ranking(torch.tensor([[1.0, 3.0, 1.0, 0.0, 0.0, 0.0]])).tolist() == [[1, 0, 2, 3, 4]]


@pytest.mark.parametrize("scaling", ["standardized", "raw"])
def test_a_head_takes_the_steps_of_torch_sgd(scaling):
    """Also among others: the heads of a sweep do not touch each other."""
    features, labels = blobs(60)
    heads = [Head(1e-4, 0.0, scaling), Head(0.05, 0.01, scaling), Head(0.1, 0.0, "raw"), Head(1.0, 0.0, "raw")]
    heads = heads if scaling == "standardized" else heads[:2]
    rows = torch.arange(60)
    probe = train(features, labels, 4, heads, rows, epochs=5, seed=3, device="cpu")
    head = probe.heads.index(Head(0.05, 0.01, scaling))

    x = (features - features.mean(0)) / features.std(0, correction=0) if scaling == "standardized" else features
    layer = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    groups = [dict(params=[layer.weight], weight_decay=0.01), dict(params=[layer.bias])]
    optimizer = torch.optim.SGD(groups, lr=0.05 * 6 / 256, momentum=0.9)  # batches of 60 / 10
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for batch in torch.randperm(60, generator=generator).split(6):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    assert torch.allclose(probe.logits(features)[:, head], layer(x), rtol=1e-4, atol=1e-5)
    accuracies, losses = judge(probe, features, labels, rows)
    assert losses[head] == pytest.approx(F.cross_entropy(layer(x), labels).item(), rel=1e-4)
    assert accuracies[head] == pytest.approx((layer(x).argmax(1) == labels).float().mean().item())


def test_the_sweep_is_as_good_as_logistic_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    (features, labels), (queries, truth) = blobs(400), blobs(400, seed=1)
    found = sweep(features, labels, 4, lrs=(1e-6, 1e-3, 0.1, 1e6), epochs=30)
    mine = (found.probe.logits(queries)[:, 0].argmax(1) == truth).float().mean().item()
    scaled = (features - features.mean(0)) / features.std(0)
    judge_ = sklearn.LogisticRegression(max_iter=500).fit(scaled.numpy(), labels.numpy())
    theirs = judge_.score(((queries - features.mean(0)) / features.std(0)).numpy(), truth.numpy())
    assert mine > 0.8 and mine == pytest.approx(theirs, abs=0.02)
    assert found.best.lr in (1e-3, 0.1) and len(found.heads) == len(found.accuracies) == 8
    assert max(found.accuracies) == found.accuracies[found.heads.index(found.best)]


def test_a_head_that_diverges_is_not_chosen():
    features, labels = blobs(100)
    found = sweep(features * 1e18, labels, 4, lrs=(1e-40, 1e12), epochs=3)
    assert -1.0 in found.accuracies and found.best.scaling == "standardized"


def test_a_tenth_of_each_class_chooses():
    labels = torch.arange(5).repeat_interleave(40)
    fit, choose = split(labels, seed=1)
    assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(200))
    assert torch.bincount(labels[choose]).tolist() == [4] * 5
    assert not torch.equal(choose, split(labels, seed=2)[1])
    with pytest.raises(ValueError, match="got 19 training images, expected at least 20"):
        sweep(torch.zeros(19, 2), torch.zeros(19, dtype=torch.int64), 2, lrs=(0.1,))


def test_wilson_interval_and_score():
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)  # Wilson 1927, as any table has it
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)
    ranked = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [2, 1, 0, 3, 4]])
    found = score(ranked, torch.tensor([0, 1, 0, 5]), list("abcdefg"))
    assert (found.top1, found.top5) == (0.25, 0.5)
    assert found.per_class == dict(a=0.5, b=0.0, c=None, d=None, e=None, f=0.0, g=None)
    assert score(ranked[:2, :1], torch.tensor([0, 1]), list("abcde")).top5 is None


def write_colours(root: Path, count: int, seed: int = 0) -> Path:
    """Noisy pictures in two class folders, one of them bluish, the other reddish."""
    random = np.random.default_rng(seed)
    for index in range(count):
        folder = root / ("blue" if index % 2 else "red")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 120, (20, 20, 3), dtype=np.uint8)
        pixels[..., 2 if index % 2 else 0] += 90
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Training and held-out pictures, a file that is no picture, and the tiny models."""
    root = tmp_path_factory.mktemp("evaluation")
    write_colours(root / "train", 30), write_colours(root / "val", 12, seed=1), write_models(root)
    (root / "train" / "red" / "000a.png").write_bytes(b"no picture")
    return root


def config(folders, **changes) -> EvalConfig:
    values = dict(
        source=str(folders / "student.safetensors"), data=folders / "train", val_data=folders / "val", amp="off",
        device="cpu", workers=0, batch_size=7, linear_epochs=20,
    )  # fmt: skip
    return EvalConfig(**{**values, **changes})


def test_features_of_all_readable_images_in_order(folders):
    folder, vit = ImageFolder(folders / "train"), load_vit(folders / "student.safetensors")
    crops = CenterCrops(folder, (16, 16), 7)
    got = extract(TokenEncoder(vit, "cls+mean").eval(), crops, torch.tensor(folder.labels), torch.device("cpu"), None)
    assert got.unreadable == 1 and len(crops) == 31 and got.features.shape == (30, 32)
    assert [path.endswith("000a.png") for path in crops.failures] == [True]
    assert got.labels.tolist() == [0] * 15 + [1] * 15
    tokens = vit(torch.from_numpy(folder.center_crop(20, (16, 16)).copy())[None]).tokens[0]
    assert torch.allclose(got.features[19], torch.cat([tokens[0], tokens[1:].mean(0)]), atol=1e-5)


def test_report(folders, capsys, tmp_path):
    out = tmp_path / "deep" / "results.json"
    values = vars(config(folders))
    arguments = [values["source"], "--data", values["data"], "--val-data", values["val_data"], "--knn-k", 3, 5, 500]
    options = ["--linear-epochs", 20, "--device", "cpu", "--workers", 1, "--amp", "bf16", "--out", out]
    code, shown, _ = fastkd(capsys, "eval", *arguments, *options)
    results = json.loads(out.read_text())
    assert code == 0 and "kNN, k = 3, weighted" in shown and "linear" in shown and "1 unreadable" in shown
    assert results["train_images"] == 30 and results["val_images"] == 12
    assert results["unreadable"] == dict(train=1, val=0) and results["features"] == "mean"
    assert {(row["k"], row["vote"]) for row in results["knn"]} == {
        (k, v) for k in (3, 5) for v in ("plain", "weighted")
    }
    linear = results["linear"]
    assert linear["top1"] > 0.9 and linear["top5"] is None and set(linear["per_class"]) == {"blue", "red"}
    assert linear["interval"][0] < linear["top1"] <= linear["interval"][1]
    assert len(linear["heads"]) == 16 * 2 * 2 and results["head"] is None
    assert results["seconds"]["total"] > 0 and results["versions"]["torch"]


def test_a_choice_at_the_edge_of_the_grid_is_said(folders, caplog):
    evaluate(config(folders, linear_lr=(1e-9, 1e-8)))
    assert "at the edge of the grid: try a wider --linear-lr" in caplog.text


def test_held_out_labels_choose_nothing(folders, tmp_path):
    """Held-out images under the other class's name change the scores, and nothing else."""
    swapped = tmp_path / "val"
    for name, other in (("red", "blue"), ("blue", "red")):
        (swapped / name).parent.mkdir(exist_ok=True)
        (swapped / name).symlink_to(folders / "val" / other)
    right, wrong = (evaluate(config(folders, val_data=path))["linear"] for path in (folders / "val", swapped))
    assert right["chosen"] == wrong["chosen"] and right["heads"] == wrong["heads"]
    assert wrong["top1"] == pytest.approx(1 - right["top1"]) and right["top1"] > 0.9


def test_held_out_classes_are_known_by_their_names(folders, tmp_path):
    """Some classes may be missing there; their scores are null."""
    (tmp_path / "red").symlink_to(folders / "val" / "red")
    linear = evaluate(config(folders, val_data=tmp_path))["linear"]
    assert linear["images"] == 6 and linear["top1"] == linear["per_class"]["red"] > 0.9
    assert linear["per_class"]["blue"] is None


def test_a_classifier_is_judged_by_its_own_head_too(folders, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = load_classifier("test_resnet", num_classes=2).eval()
    model.classes = ["blue", "red"]
    path = tmp_path / "classifier.safetensors"
    save_classifier(model, path)
    options = dict(source=str(path), img_size=32, linear=False)
    results = evaluate(config(folders, **options))
    encoder = load_encoder(path, img_size=32)
    assert isinstance(encoder, HeadEncoder) and encoder.classes == ["blue", "red"] and results["features"] == "head"
    folder = ImageFolder(folders / "val")
    images = torch.from_numpy(np.stack([folder.center_crop(i, (32, 32)) for i in range(len(folder))]))
    with torch.no_grad():
        features, logits = encoder(images)
        assert torch.allclose(model.get_classifier()(features), logits, atol=1e-5)
    right = (logits.argmax(1) == torch.tensor(folder.labels)).float().mean().item()
    assert results["head"]["top1"] == pytest.approx(right) and results["linear"] is None
    model.classes = ["cat", "dog"]
    save_classifier(model, path)
    assert evaluate(config(folders, **options))["head"] is None


@pytest.mark.parametrize("changes, message", [
    (dict(data="nowhere", val_data="nowhere", knn_k=(0,)), "--data: .*\n--val-data: .*\n--knn-k: got"),
    (dict(source="nowhere.safetensors"), "SOURCE: .*nowhere.safetensors"),
    (dict(data="train/red"), "--data: got 0 class folders and 16 images outside of them, expected every image"),
    (dict(val_data="other"), "--val-data: got classes green, expected those of --data: blue, red"),
    (dict(knn_k=(31,)), "--knn-k: got .31,., expected 1 to 30"),
    (dict(features="cls", source="untrained:test_resnet"), "SOURCE: "),
])  # fmt: skip
def test_wrong_arguments(folders, changes, message):
    (folders / "other" / "green").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(folders / "other" / "green" / "a.png")
    for name in ("data", "val_data"):
        if name in changes:
            changes = {**changes, name: folders / changes[name]}
    with pytest.raises(ConfigError, match=message):
        evaluate(config(folders, **changes))
