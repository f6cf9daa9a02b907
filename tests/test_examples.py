"""The examples really run: their losses are the plain formulas and fall, and what they write can be loaded."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from pages import ROOT

from fastkd import ops
from fastkd.demos import pictures
from fastkd.models import MaskedAutoencoderViT, load_vit


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lightning_module():
    pytest.importorskip("lightning")
    pytest.importorskip("timm")
    return example("lightning_module")


@pytest.fixture
def trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return example("trainer")


def test_lightning_module_has_the_loss_of_the_formula(lightning_module):
    torch.manual_seed(0)
    shape = dict(img_size=28, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, mean=(0.3,), std=(0.4,))
    student = MaskedAutoencoderViT(**shape, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    teacher, images = load_vit(lightning_module.TEACHER), pictures.embedded()[0].images[:4]
    module = lightning_module.Distillation(student, teacher, 0.75, 1e-3)
    assert all(name.startswith("method.") and "teacher" not in name for name in module.state_dict())
    torch.manual_seed(1)
    got = module.training_step((images,), 0)
    torch.manual_seed(1)
    masking = ops.random_masking(4, 49, 0.75)
    seen = student(images, masking.ids_keep, taps=(2,))
    hidden = masking.ids_shuffle[:, 12:, None].expand(-1, -1, 16)
    pixels = ops.patchify((images.permute(0, 3, 1, 2) / 255 - 0.3) / 0.4, 4).gather(1, hidden)
    pixel_loss = F.mse_loss(student.decode(seen.tokens, masking.ids_shuffle), pixels)
    ours = module.method.aligned_feature_projection_heads[0](seen.taps[2])
    theirs = teacher(images, masking.ids_keep, taps=(4,)).taps[4]
    align_loss = F.l1_loss(F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1))
    torch.testing.assert_close(got, pixel_loss + 30 * align_loss, rtol=1e-5, atol=1e-6)


def test_lightning_module_runs(lightning_module, tmp_path, monkeypatch):
    some = [part.subset(slice(1000)) for part in pictures.embedded()]
    monkeypatch.setattr(pictures, "embedded", lambda: some)
    accuracy = lightning_module.main(steps=40, batch_size=32, out=tmp_path)
    assert accuracy > 0.3  # 0.1 by chance
    (log,) = tmp_path.rglob("metrics.csv")
    losses = [float(row["loss"]) for row in csv.DictReader(log.open())]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.8 * sum(losses[:8])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    encoder = load_vit(tmp_path / "student_timm.safetensors")
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, trained["method.student.blocks.0.mlp.fc1.weight"])


def test_trainer_runs(trainer, tmp_path):
    teacher, student = trainer.main(steps=40, batch_size=32, out=tmp_path)
    assert teacher > 0.3 and student > 0.2  # 0.1 by chance
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.9 * sum(losses[:4]) and all(map(math.isfinite, losses))
    loaded = trainer.transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert trainer.accuracy(loaded, trainer.Garments(pictures.embedded()[1])) == student
