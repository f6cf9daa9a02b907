"""Fine-tuning: what timm would do with the same random numbers, where it starts, and a run from pictures to timm."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from test_cli import fastkd
from test_configs import assert_resumes
from test_evaluation import write_colours
from tiny_run import write_models

from fastkd.data import ImageLoader
from fastkd.evaluation.command import evaluate
from fastkd.evaluation.config import EvalConfig
from fastkd.models import load_vit
from fastkd.models.classifiers import load_classifier, save_classifier
from fastkd.models.finetuning import classifier_to_finetune
from fastkd.train import ConfigError, distill, held_out
from fastkd.train.build import build_loader, build_optimizer
from fastkd.train.configs.finetune import FinetuneConfig
from fastkd.train.distributed import Processes
from fastkd.train.track import RunFolder

timm = pytest.importorskip("timm")
from fastkd.methods.finetune import Finetune, TrainingView, layer_decay_groups  # noqa: E402

CLASSES = ["blue", "red"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    write_colours(root / "train", 24), write_colours(root / "val", 10, seed=1), write_models(root)
    return root


def config(folders, out, **changes) -> FinetuneConfig:
    values = dict(
        student=str(folders / "student.safetensors"), data=folders / "train", val_data=folders / "val", out=out,
        batch_size=6, steps=6, log_every=2, lr=1e-2, amp="off", workers=0, device="cpu",
    )  # fmt: skip
    return FinetuneConfig(**{**values, **changes})


def seed_all(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


class Recorder(torch.nn.Module):
    """A linear classifier that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 5)

    def forward(self, images):
        self.seen = images.clone()
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.0, 1.0), (0.8, 0.0), (0.0, 0.0)])
def test_images_and_targets_are_those_of_timm(mixup, cutmix):
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing

    torch.manual_seed(0)
    student = Recorder()
    method = Finetune(student, 5, mixup=mixup, cutmix=cutmix, smoothing=0.2, erase=0.5).train()
    pictures, labels = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 0])
    for seed in range(4):
        seed_all(seed)
        loss = method(pictures, labels)["loss"]
        seed_all(seed)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (method.mean, method.std))
        images = (pictures.permute(0, 3, 1, 2) / 255 - mean) / std
        images, target = RandomErasing(0.5, mode="pixel", device="cpu")(images), F.one_hot(labels, 5) * 0.8 + 0.04
        if mixup or cutmix:
            mix = Mixup(mixup, cutmix, label_smoothing=0.2, num_classes=5)
            images, target = mix(images, labels)
        assert torch.allclose(student.seen, images, atol=1e-5)
        plain = -(target * student(images).log_softmax(1)).sum(1).mean()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    before = student.seen
    judged = method.eval()(pictures, labels)["loss"]
    assert not torch.equal(student.seen, before)
    if mixup or cutmix:
        assert judged.item() == pytest.approx(F.cross_entropy(student(student.seen), labels).item())


def test_views_are_those_of_timm():
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import RandomResizedCropAndInterpolation

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    view = pickle.loads(pickle.dumps(TrainingView((16, 20), (0.3, 1.0), "rand-m9-mstd0.5-inc1")))
    hparams = dict(translate_const=7, img_mean=(124, 116, 104), interpolation=Image.Resampling.BICUBIC)
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    posterize = next(op for op in view._steps[1].transforms[0].ops if "Posterize" in op.name).aug_fn
    assert np.asarray(posterize(image, 0)).max() == 0  # what magnitude 10 asks for
    assert np.array_equal(posterize(image, 3), ImageOps.posterize(image, 3))
    crop = RandomResizedCropAndInterpolation((16, 20), scale=(0.3, 1.0), interpolation="bicubic")
    seen = set()
    for seed in range(8):
        seed_all(seed)
        got = view(image)
        seed_all(seed)
        wanted = crop(image)
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else wanted
        assert np.array_equal(got, np.asarray(augment(wanted))) and got.shape == (16, 20, 3) and got.dtype == np.uint8
        seen.add(got.tobytes())
    assert len(seen) == 8


def test_layer_decay(folders):
    """0.75 per layer from the head down, as published; tokens, positions, norms and biases keep their size."""
    student = classifier_to_finetune(folders / "student.safetensors", CLASSES)
    groups = layer_decay_groups(student, weight_decay=0.05, layer_decay=0.75)
    of = {id(p): group for group in groups for p in group["params"]}
    found = {name: of[id(p)] for name, p in student.named_parameters()}
    layers = dict(cls_token=0, pos_embed=0, patch_embed=0, blocks=None, fc_norm=4, head=4)
    for name, group in found.items():
        layer = layers[name.split(".")[0]]
        layer = int(name.split(".")[1]) + 1 if layer is None else layer
        assert group["lr_scale"] == pytest.approx(0.75 ** (4 - layer)), name
        matrix = name.endswith("weight") and "norm" not in name
        assert group["weight_decay"] == (0.05 if matrix else 0.0), name
    assert found["pos_embed"]["params"] and student.pos_embed.requires_grad
    assert sum(len(group["params"]) for group in groups) == len(found)


def test_a_run_takes_layer_decay_drop_path_and_published_numbers(folders, tmp_path):
    method, resolved = config(folders, tmp_path, lr=None).build(CPU)
    rates = [
        block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0 for block in method.student.blocks
    ]
    assert rates == pytest.approx([0, 0.075, 0.15])
    loader, resolved = build_loader(resolved, Processes(0, 1, CPU))
    assert resolved.lr == pytest.approx(5e-4 * 6 / 256) and resolved.warmup_epochs == pytest.approx(resolved.epochs / 5)
    optimizer = build_optimizer(resolved, method, capturable=False)
    assert {round(group["lr_scale"], 4) for group in optimizer.param_groups} == {1, 0.75, 0.5625, 0.4219, 0.3164}
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
    published = dict(
        epochs=100.0, blr=5e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.15, mixup=0.8, cutmix=1.0,
        smoothing=0.1, erase=0.25, augment="rand-m9-mstd0.5-inc1", min_lr=1e-6, pool="avg", scale=(0.08, 1.0),
    )  # fmt: skip
    assert {name: defaults[name] for name in published} == published
    assert isinstance(loader, ImageLoader) and next(iter(loader)).images.shape == (6, 16, 16, 3)


def test_it_starts_at_the_encoder(folders):
    vit = load_vit(folders / "student.safetensors")
    images = torch.rand(2, 3, 16, 16)
    tokens = vit(images).tokens
    student = classifier_to_finetune(folders / "student.safetensors", CLASSES, pool="token").eval()
    assert torch.allclose(student.forward_features(images), tokens, atol=1e-5)
    assert torch.allclose(
        student.forward_head(student.forward_features(images), pre_logits=True), tokens[:, 0], atol=1e-5
    )
    student = classifier_to_finetune(folders / "student.safetensors", CLASSES).eval()
    raw = vit(images, depth=3).tokens[:, 1:].mean(1)  # before the encoder's norm; the new one follows
    found = student.forward_head(student.forward_features(images), pre_logits=True)
    assert torch.allclose(found, F.layer_norm(raw, (16,), eps=1e-6), atol=1e-5)
    assert 0 < student.head.weight.abs().max() < 2e-4 and student.head.bias.abs().max() == 0
    larger = classifier_to_finetune(folders / "student.safetensors", CLASSES, img_size=24)
    assert larger(torch.rand(1, 3, 24, 24)).shape == (1, 2) and larger.classes == CLASSES


def test_it_starts_at_a_classifier(folders, tmp_path):
    first = classifier_to_finetune(folders / "student.safetensors", CLASSES, drop_path=0.1)
    torch.nn.init.normal_(first.head.weight)
    path = tmp_path / "first.safetensors"
    save_classifier(first, path)
    images = torch.rand(2, 3, 16, 16)
    same = classifier_to_finetune(path, CLASSES, drop_path=0.2).eval()
    assert torch.equal(same(images), first.eval()(images)) and same.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    other = classifier_to_finetune(path, ["a", "b", "c"], img_size=32)
    assert other(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    save_classifier(other, path)
    again = load_classifier(path)
    assert again.classes == ["a", "b", "c"] and again(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    assert again.pretrained_cfg["input_size"][1:] == [32, 32]


def test_it_starts_at_any_timm_model(tmp_path):
    scratch = classifier_to_finetune("untrained:test_resnet", CLASSES, in_chans=1)
    assert scratch(torch.rand(2, 1, 32, 32)).shape == (2, 2)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)  # of 1000 classes
    loaded = classifier_to_finetune("test_resnet", CLASSES, checkpoint=weights)
    name, value = next(iter(loaded.named_parameters()))
    assert torch.equal(value, torch.load(weights)[name]) and loaded.num_classes == 2
    with pytest.raises(ValueError, match="got 'nothing_such'"):
        classifier_to_finetune("nothing_such", CLASSES)


def test_a_run_learns_resumes_and_exports(folders, tmp_path, monkeypatch):
    """Mixing, erasing, RandAugment and drop path draw the same again after a resume, and timm reads the result."""
    whole = assert_resumes(lambda name: config(folders, tmp_path / name), monkeypatch)
    facts = (whole.run / "train.log").read_text()
    line = next(line for line in facts.splitlines() if "timm.create_model(" in line)
    loaded = eval(line.strip(), dict(timm=timm)).eval()
    mine = load_classifier(whole.run / "checkpoints/last/student.safetensors").eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), mine(images)) and isinstance(loaded.fc_norm, torch.nn.LayerNorm)
    assert loaded.pretrained_cfg["mean"] == mine.pretrained_cfg["mean"] or list(mine.pretrained_cfg["mean"])


def test_command(folders, capsys, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = [folders / "student.safetensors", "--data", folders / "train", "--val-data", folders / "val"]
    machine = ["--device", "cpu", "--amp", "off", "--workers", 0, "--out", run, "--log-every", 10]
    numbers = ["--batch-size", 8, "--steps", 40, "--lr", "0.01", "--mixup", 0, "--drop-path", 0, "--smoothing", 0.0,
               "--ema", 0.5]  # fmt: skip
    monkeypatch.setattr(held_out, "FEW", 0)  # decoded anew for every evaluation
    code, _, err = fastkd(capsys, "finetune", *arguments, *machine, *numbers)
    result = json.loads((run / "result.json").read_text())
    assert code == 0 and "of 10 held-out images; best during the run" in err
    assert result["top1"] >= 0.9 and result["images"] == 10 and result["classes"] == CLASSES and result["top5"] is None
    assert result["best"]["top1"] >= result["top1"] and result["interval"][0] < result["top1"]
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("val_loss" in row for row in rows) == 11
    judged = [row for row in rows if row["step"] == 40]
    assert result["top1"] in [row.get("val_accuracy") for row in judged]
    assert result["ema"]["top1"] in [row.get("val_ema_accuracy") for row in judged]
    assert result["ema"]["best"]["top1"] >= result["ema"]["top1"] and "averaged weights: top-1" in err
    assert load_classifier(run / "exported/student_ema_timm.safetensors").classes == CLASSES
    scores = evaluate(EvalConfig(source=str(run), data=folders / "train", val_data=folders / "val", linear=False,
                                 knn_k=(3,), amp="off", device="cpu", workers=0))  # fmt: skip
    assert scores["head"]["top1"] == result["top1"] and scores["features"] == "head"


def test_held_out_images_are_all_or_some(folders, tmp_path):
    method, resolved = config(folders, tmp_path, drop_path=0.9).build(CPU)
    torch.nn.init.normal_(method.student.head.weight)
    judge, run = resolved.held_out(method, CPU, None), RunFolder(tmp_path)
    with torch.no_grad():
        found = judge.judge(run, step=1, epoch=0.5)
        assert method.student.training
        images, indices = (torch.cat(parts) for parts in zip(*judge.crops))
        logits = method.student.eval()(method.prepare(images))
    labels = torch.tensor([0] * 5 + [1] * 5)
    assert indices.tolist() == list(range(10))
    assert found.top1 == (logits.argmax(1) == labels).float().mean().item()
    row = run.metrics()[0]
    assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["val_accuracy"] == found.top1 and (row["step"], row["epoch"]) == (1, 0.5)
    few = dataclasses.replace(resolved, val_images=3).held_out(method, CPU, None)
    assert few.judge(run, step=2, epoch=1).images == 3


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=5), "--batch-size: got 5, expected an even number; images are mixed in pairs"),
    (dict(cuda_graph=True), "--cuda-graph: got True, expected --no-cuda-graph"),
    (dict(in_chans=1), "--augment: got rand-m9-mstd0.5-inc1, expected none with grey images"),
    (dict(augment="lots"), "--augment: got 'lots', expected a RandAugment of timm"),
    (dict(student="nowhere.safetensors"), "--student: .*nowhere.safetensors"),
    (dict(data="train/red"), "--data: got 0 class folders and 12 images outside of them"),
    (dict(val_data="train/red"), "--val-data: got 12 images outside of class folders"),
    (dict(layer_decay=0.0, mixup=-1.0), "--mixup: got -1.0, .*\n--layer-decay: got 0.0"),
])  # fmt: skip
def test_wrong_arguments(folders, tmp_path, changes, message):
    changes = {k: folders / v if k in ("data", "val_data") else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        distill(config(folders, tmp_path / "run", **changes))


def test_odd_batches_and_graphs_where_nothing_is_mixed(folders, tmp_path):
    plain = dict(mixup=0.0, cutmix=0.0, erase=0.0, augment="none", batch_size=5, cuda_graph=True, steps=2)
    assert distill(config(folders, tmp_path / "run", **plain)).finished
