"""NKD and USKD as methods: their loss from its parts, where USKD's feature comes from, quick runs of both demos."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import ops
from fastkd.demos import DEMOS, classifiers, nkd, uskd
from fastkd.methods.kd import KD
from fastkd.methods.nkd import NKD
from fastkd.methods.uskd import USKD, default_tap


class Small(nn.Module):
    """Three convolutional stages and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 3 * width]
        stages = (nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in zip(widths, widths[1:]))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x):
        return self.head(self.stages(x).relu().mean((2, 3)))


def network(width: int, seed: int) -> Small:
    torch.manual_seed(seed)
    return Small(width)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    images = torch.randn(5, 1, 16, 16, generator=random)
    return images, torch.randint(0, 10, (5,), generator=random)


def test_nkd_adds_the_loss_of_the_teacher_to_cross_entropy(batch):
    student, teacher = network(2, 0), network(3, 1)
    method = NKD(student, teacher, temperature=3.0, gamma=3.5).train()
    images, target = batch
    result = method(images, target)
    logits = copy.deepcopy(student)(images)
    want = F.cross_entropy(logits, target) + ops.nkd_loss(
        logits, teacher(images).detach(), target, temperature=3.0, gamma=3.5
    )
    torch.testing.assert_close(result["loss"], want)
    result["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.head.weight.grad.abs().max() > 0
    assert {name.split(".")[0] for name in method.state_dict()} == {"student"} and not teacher.training


@pytest.mark.parametrize("mixed", [False, True], ids=["classes", "mixed"])
def test_uskd_is_cross_entropy_and_the_loss_on_the_pooled_stage(batch, mixed):
    student = network(2, 0)
    method = USKD(student, alpha=0.2, beta=0.3, mu=0.4, img_size=16, in_chans=1).train()
    images, target = batch
    if mixed:
        target = 0.7 * F.one_hot(target, 10) + 0.3 * F.one_hot((target + 3) % 10, 10)
    plain = copy.deepcopy(student)
    loss = method(images, target)["loss"]
    feature = plain.stages[:2](images).mean((2, 3))
    logits = plain(images)
    want = F.cross_entropy(logits, target) + ops.uskd_loss(
        logits, method.criterion.fc(feature), target, alpha=0.2, beta=0.3, mu=0.4
    )
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert method.criterion.fc.weight.grad.abs().max() > 0
    assert set(method.training_state()) == {"criterion.fc.weight", "criterion.fc.bias"}


def test_probing_the_width_leaves_the_student_as_it_was():
    student = network(2, 0).train()
    before = copy.deepcopy(student.state_dict())
    USKD(student, img_size=16, in_chans=1)
    assert student.training and not any(m._forward_hooks for m in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("name, tap, width", [
    ("resnet10t", 2, 256), ("vit_tiny_patch16_224", 5, 192), ("swin_tiny_patch4_window7_224", 2, 384),
    ("efficientnet_lite0", 5, 192),
])  # fmt: skip
def test_features_of_timm_models(name, tap, width):
    """Convolutional networks and Swin: the pooled last stage but one; ViT: the class token at half of the depth."""
    timm = pytest.importorskip("timm")
    small = dict(img_size=32) if name.startswith(("vit", "swin")) else {}
    if name.startswith("swin"):
        small |= dict(window_size=2, depths=(1, 1, 1, 1))
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=4, **small)
    assert default_tap(student) == tap
    method = USKD(student, img_size=32)
    assert method.criterion.fc.in_features == width
    images = torch.randn(2, 3, 32, 32)
    feature = method.taps(images).features[0]
    if name.startswith("vit"):
        torch.testing.assert_close(method._pooled(feature), feature[:, 0])
    elif name.startswith("swin"):
        assert feature.shape[-1] == width
        torch.testing.assert_close(method._pooled(feature), feature.flatten(1, 2).mean(1))
    loss = method.train()(images, torch.tensor([1, 3]))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and not any(m._forward_hooks for m in student.modules())


def test_uskd_compiles_in_one_graph_and_takes_autocast(batch):
    method = USKD(network(2, 0), img_size=16, in_chans=1).eval()
    images, target = batch
    want = method(images, target)["loss"]
    torch._dynamo.reset()
    with method.taps:
        compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images, target)["loss"], want)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(images, target)["loss"]
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.05


def test_arms_share_initial_weights_and_batches():
    """Without weight USKD is cross entropy: to the same parameters, batch by batch."""
    random = torch.Generator().manual_seed(2)
    images, labels = torch.randn(40, 1, 8, 8, generator=random), torch.randint(0, 10, (40,), generator=random)
    found = []
    for make in (
        lambda student: KD(student, None),
        lambda student: USKD(student, alpha=0, beta=0, mu=0, img_size=8, in_chans=1),
    ):
        student = classifiers.network(2, 3)
        classifiers.fit(make(student), images, labels, steps=3, lr=1e-2, seed=3, batch_size=8)
        found.append(student.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("demo", [nkd, uskd], ids=["nkd", "uskd"])
def test_quick_demo(demo, tmp_path):
    name = demo.__name__.rpartition(".")[2]
    assert name in DEMOS
    pytest.importorskip("sklearn")
    assert demo.main(demo.Config(out=tmp_path, quick=True)) == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} >= set(demo.CHOSEN) and demo.UNTRAINED in {row["arm"] for row in rows}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_students_of_a_teacher_see_its_answers_where_there_is_no_label(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    study = nkd.Study(nkd.Config(out=tmp_path, each=2, steps=1))
    data = study.data(1)
    answers = study.teacher(1)[1]
    assert data.labelled == 20 and data.labels[:20].bincount().tolist() == [2] * 10
    assert len(data.images) == 1197 and len(data.test_images) == 600
    seen = {}
    monkeypatch.setattr(nkd, "fit", lambda method, images, target, **_: seen.update(last=(len(images), target)))
    for arm, count, target in (
        (nkd.CE, 20, data.labels[:20]),
        (nkd.TRUTH, 1197, data.labels),
        (nkd.NKD_, 1197, torch.cat((data.labels[:20], answers[20:]))),
        (nkd.ANSWERS, 1197, torch.cat((data.labels[:20], answers[20:]))),
    ):
        study._train(arm, dict(nkd.CHOSEN[arm]), classifiers.network(2, 0), 1)
        assert seen["last"][0] == count and torch.equal(seen["last"][1], target), arm
