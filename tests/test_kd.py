"""Any classifier from any other: the loss of a step, taps, and runs of `fastkd distill --method kd`."""

import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_train import at_step
from torch import nn

from fastkd import nn as criteria
from fastkd.methods.kd import KD, ON_FEATURES, ON_LOGITS, projector
from fastkd.models.classifiers import load_classifier
from fastkd.train import ConfigError, distill
from fastkd.train.configs import METHODS, config_of
from fastkd.train.configs.kd import KDConfig
from fastkd.train.held_out import HeldOutClasses

timm = pytest.importorskip("timm")


class Small(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(3, width, 3, 2), nn.Conv2d(width, width, 3, 2)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Small(6), Small(8)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 12, 12, 3), dtype=torch.uint8, generator=random)
    return images, torch.randint(0, 4, (6,), generator=random)


@pytest.mark.parametrize("loss", [*ON_LOGITS, *ON_FEATURES])
def test_loss_is_the_sum_of_its_parts(loss, pair, batch):
    """0.3 CE + 0.7 classic, by hand, from the same module of fastkd.nn; value and gradient."""
    student, teacher = pair
    images, target = batch
    torch.manual_seed(2)
    method = KD(student, teacher, loss, weight=0.7, ce_weight=0.3, img_size=12)
    got = method(images, target)["loss"]
    x = method.prepare(images)
    logits = student(x)
    criterion = getattr(criteria, {**ON_LOGITS, **ON_FEATURES}[loss])
    if loss in ON_LOGITS:
        options = {"ce_weight": 0.0} if loss in ("kd", "dkd", "nkd", "standardized_kd") else {}
        arguments = (logits, teacher(x)) if loss == "dist" else (logits, teacher(x), target)
        part = criterion(**options)(*arguments)
    else:
        features = [m.layer2(m.layer1(x).relu()) for m in (student, teacher)]
        own = dict(projector=method.criteria[0].projector) if loss == "hint" else {}
        part = criterion(**own)(features[0], features[1].detach())
    want = 0.3 * F.cross_entropy(logits, target) + 0.7 * part
    assert torch.allclose(got, want, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(v, student.layer1.weight) for v in (got, want))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters()) and not any(p.requires_grad for p in teacher.parameters())


def test_taps_options_and_label_smoothing(pair, batch):
    student, teacher = pair
    method = KD(student, teacher, "at", taps={"student": ["layer1", 1], "teacher": ["layer1", "layer2"]})
    assert len(method.criteria) == 2 and method(*batch)["loss"] > 0
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    smooth = KD(student, None, label_smoothing=0.2)
    logits = student(smooth.prepare(batch[0]))
    assert torch.allclose(smooth(*batch)["loss"], F.cross_entropy(logits, batch[1], label_smoothing=0.2))
    kd = KD(student, teacher, "kd", temperature=2.0, label_smoothing=0.2, weight=0.5)
    part = criteria.KDLoss(temperature=2.0)(logits, teacher(smooth.prepare(batch[0])))
    assert torch.allclose(
        kd(*batch)["loss"], F.cross_entropy(logits, batch[1], label_smoothing=0.2) + 0.5 * part, rtol=1e-5
    )


@pytest.mark.parametrize("arguments, message", [
    (dict(loss="nkdd"), "loss: got 'nkdd', expected one of kd, dkd.*did you mean 'nkd'"),
    (dict(loss="kd", temp=3.0), "options: got temp, expected some of temperature"),
    (dict(loss="kd", taps={"student": 0, "teacher": 0}), "taps: got .* 'kd' compares logits"),
    (dict(loss="at", taps={"student": (0, 1), "teacher": 0}), "taps: got 2 and 1 places"),
    (dict(loss="kd", weight=-1.0), "weight, ce_weight: got -1.0 and 1.0"),
])  # fmt: skip
def test_wrong_arguments(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        KD(*pair, **arguments)


def test_a_teacher_of_other_classes_is_refused(pair, batch):
    pair[1].head = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"teacher: got logits \(6, 5\), expected \(6, 4\)"):
        KD(*pair)(*batch)


def test_compile_and_autocast(pair, batch):
    method = KD(*pair, "at")
    want = method(*batch)["loss"]
    with method.taps, method.teacher.taps:
        got = torch.compile(lambda x, y: method(x, y)["loss"], backend="aot_eager")(*batch)
    assert torch.allclose(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(method(*batch)["loss"], want, rtol=0.1)


def test_projectors():
    maps, tokens = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 4)
    assert projector(maps, maps) is None and projector(maps, torch.zeros(1, 7, 3, 3)).weight.shape == (7, 4, 1, 1)
    assert projector(tokens, torch.zeros(1, 9, 6)).weight.shape == (6, 4)


def write_pictures(root, seed=0, count=12):
    """Two classes: bright above, bright below."""
    random = np.random.default_rng(seed)
    for i in range(count):
        name = "above" if i % 2 else "below"
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (40, 40, 3), np.uint8)
        pixels[slice(0, 20) if i % 2 else slice(20, 40)] += 150
        Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(HeldOutClasses, "draw", lambda self, run: None)
    write_pictures(tmp_path / "train"), write_pictures(tmp_path / "val", 1, 6)
    return dict(student="test_resnet", data=tmp_path / "train", val_data=tmp_path / "val", img_size=32, batch_size=4,
                log_every=2, lr=3e-3, amp="off", workers=0, device="cpu", scale=(0.9, 1.0))  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_makes_a_teacher_that_teaches_and_resumes(options, tmp_path, monkeypatch):
    teacher = distill(KDConfig(teacher="none", out=tmp_path / "teacher", steps=12, **options))
    assert rows(teacher.run)[-1]["val_accuracy"] == 1.0
    # A run stopped in the middle goes on to the same weights.
    settings = dict(teacher=str(teacher.run), loss="dkd", options={"beta": 2.0}, steps=6, **options)
    whole = distill(KDConfig(out=tmp_path / "whole", **settings))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    part = distill(KDConfig(out=tmp_path / "part", **settings))
    assert (part.step, part.finished) == (3, False)
    again = distill(KDConfig(out=tmp_path / "part", **settings))
    a, b = (load_file(run.exported) for run in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    # What comes out loads in timm, and as a student to go on with.
    model = timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(whole.exported))
    assert all(torch.equal(value, a[name]) for name, value in model.state_dict().items())
    assert load_classifier(whole.exported, num_classes=2).num_classes == 2
    with pytest.raises(ValueError, match="got a classifier of 2 classes, expected 3"):
        load_classifier(whole.exported, num_classes=3)


@pytest.mark.parametrize("changes, message", [
    (dict(student="resnet_18"), "--student: got 'resnet_18', expected a timm name such as resnet18"),
    (dict(weight=-1.0), "--weight: got -1.0, expected at least 0"),
    (dict(student_taps=("layer1",)), "--teacher-taps: got .*expected 1 places"),
    (dict(teacher_checkpoint="nowhere.pth"), "--teacher-checkpoint: got nowhere.pth, expected an existing file"),
    (dict(loss="kdd", teacher="test_resnet", teacher_checkpoint="own"), "loss: got 'kdd'"),
])  # fmt: skip
def test_config_errors(options, tmp_path, changes, message):
    own = tmp_path / "own.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), own)
    if "teacher_checkpoint" in changes:
        changes = {
            **changes,
            "teacher_checkpoint": own
            if changes["teacher_checkpoint"] == "own"
            else own.with_stem("nowhere").relative_to(tmp_path),
        }  # noqa: E501
    with pytest.raises(ConfigError, match=message):
        distill(KDConfig(**{"teacher": "none", "out": tmp_path / "run", **options, **changes}))


def test_images_without_classes_are_refused(options, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    with pytest.raises(ConfigError, match="--data: got 0 class folders and 1 images outside"):
        distill(KDConfig(teacher="none", out=tmp_path / "run", **{**options, "data": flat}))


def test_every_method_has_a_config():
    for name in METHODS:
        config = config_of(name)
        assert config.__dataclass_fields__["method"].default == name
        assert config.build is not None and config.__doc__
