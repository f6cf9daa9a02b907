"""--activation-checkpointing: the same numbers, to the bit, from fewer saved bytes."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from conftest import DEVICE
from test_step import make_batches
from test_train import assert_same_run, at_step
from tiny_run import SHAPE, tiny_config

from fastkd.methods import DMAE
from fastkd.models import MaskedAutoencoderViT, Teacher, VisionTransformer
from fastkd.train import ConfigError, distill
from fastkd.train.build import recompute_activations
from fastkd.train.distributed import Processes
from fastkd.train.reseed import reseed
from fastkd.train.step import choose_graphs

DEEP = dict(embed_dim=32, depth=6, num_heads=2, **SHAPE | dict(decoder_depth=4))


def saved_bytes(run) -> tuple[object, int]:
    """What it returns, and the bytes that autograd keeps for backward meanwhile, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, sum(size for size, _ in kept.values())


def one_step(model, backward, amp=None):
    """(loss, gradients, saved bytes) of one forward pass with seeded stochastic depth."""
    (batch,) = make_batches(1)
    reseed(torch.device(DEVICE), 0, 3)
    with torch.autocast(DEVICE, amp, enabled=amp is not None):
        loss, size = saved_bytes(lambda: backward(model, batch))
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.detach(), found, size


def distilled(model, batch):
    return model(batch.images, 0.5, keys=batch.keys)["loss"]


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_same_loss_and_gradients_from_less_memory(decoder, amp):
    torch.manual_seed(0)
    student = MaskedAutoencoderViT(**DEEP, decoder=decoder)
    student.set_drop_path(0.5)
    teacher = Teacher(MaskedAutoencoderViT(embed_dim=32, depth=4, num_heads=2, **SHAPE), 2)
    model = DMAE(student, teacher, (1,), (2,)).to(DEVICE).train()
    kept = one_step(model, distilled, amp)
    student.set_grad_checkpointing()
    again = one_step(model, distilled, amp)
    assert torch.equal(kept[0], again[0]) and len(kept[1]) == len(again[1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1]))
    assert again[2] < 0.4 * kept[2]
    student.set_grad_checkpointing(False)
    assert one_step(model, distilled, amp)[2] == kept[2]


def test_the_class_token_alone_and_features_on_the_way():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=6, num_heads=2).to(DEVICE)

    def run(model, batch):
        taps = model(batch.images, taps=(1, 5)).taps
        return model.encode(batch.images).square().sum() + sum(tap.sin().sum() for tap in taps.values())

    kept = one_step(model, run)
    model.set_grad_checkpointing()
    again = one_step(model, run)
    assert torch.equal(kept[0], again[0]) and all(torch.equal(a, b) for a, b in zip(kept[1], again[1]))
    assert again[2] < 0.4 * kept[2]
    with torch.no_grad():
        assert not model.encode(make_batches(1)[0].images).requires_grad


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_run_has_the_same_bits_and_resumes(tmp_path, monkeypatch, amp):
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.draw", lambda self, run: None)
    distill(tiny_config(tmp_path, "whole", amp=amp))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert not distill(tiny_config(tmp_path, amp=amp)).finished
    seen, original = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("fastkd.models.vit.checkpoint", lambda *a, **k: seen.append(1) or original(*a, **k))
    assert distill(tiny_config(tmp_path, amp=amp, activation_checkpointing=True)).finished  # out of memory, say
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len(seen) == 3 * (3 + 2)  # steps times blocks, none in evaluation


class Wrapped(torch.nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student


def test_students_of_timm_and_those_that_cannot(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    config = tiny_config(tmp_path, activation_checkpointing=True)
    student = timm.create_model("test_vit", num_classes=2)
    recompute_activations(config, Wrapped(student))
    assert student.grad_checkpointing
    with pytest.raises(ConfigError, match="--activation-checkpointing: got Linear, which cannot compute its blocks ag"):
        recompute_activations(config, Wrapped(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="got ResNet with BatchNorm, whose statistics would see each batch twice"):
        recompute_activations(config, Wrapped(timm.create_model("test_resnet")))
    recompute_activations(dataclasses.replace(config, activation_checkpointing=False), Wrapped(torch.nn.Linear(2, 2)))
    monkeypatch.setattr("fastkd.train.step.CudaGraphs", lambda device: device)
    assert choose_graphs(config, Processes(0, 1, torch.device("cuda", 0))) is None
