"""--ema: the average of the student's weights over a run."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from test_nonfinite import bad_steps
from test_train import assert_same_run, at_step, metrics, weights
from tiny_run import tiny_config

from fastkd.methods import DMAE
from fastkd.models import MaskedAutoencoderViT
from fastkd.models.ema import EMATeacher
from fastkd.train import checkpoint, distill


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.draw", lambda self, run: None)


def average_of(run) -> dict[str, torch.Tensor]:
    state = checkpoint.load_state(run / "checkpoints/last")["ema"]
    return {name.removeprefix("model."): value for name, value in state.items()}


@pytest.mark.parametrize("bad", [(), (1, 4)], ids=str)
def test_the_average_follows_its_formula_and_leaves_training_alone(tmp_path, monkeypatch, bad):
    """The mean of the weights so far, until 1 - 1/n reaches the share; student and losses are those without it.

    Steps that are left out do not move it; where the first one is, it begins with the initial weights.
    """
    history, original = [], DMAE.after_step

    def after_step(self, step):
        original(self, step)
        history.append({name: value.double().clone() for name, value in self.student.state_dict().items()})

    options = dict(val_data=tmp_path / "pictures", val_every=3, val_images=4, skip_nonfinite=len(bad))
    tiny_config(tmp_path)
    bad_steps(tmp_path, monkeypatch, *bad)
    distill(tiny_config(tmp_path, "plain", **options))
    monkeypatch.setattr(DMAE, "after_step", after_step)
    run = distill(tiny_config(tmp_path, ema=0.75, **options)).run
    assert_same_run(run, tmp_path / "plain")
    want = load_file(tmp_path / "student.safetensors")
    for number, values in enumerate(history, 1):
        share = 1 if number in bad else min(0.75, 1 - 1 / number)
        want = {name: share * want[name] + (1 - share) * values[name] for name in want}
    got = average_of(run)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got["cls_token"], weights(run)["cls_token"])

    exported = load_file(run / "exported/student_ema_timm.safetensors")
    assert torch.equal(exported["blocks.0.attn.qkv.weight"], got["blocks.0.attn.qkv.weight"])
    assert exported.keys() == load_file(run / "exported/student_timm.safetensors").keys()
    # Held-out losses are those of a student with these weights.
    rows = metrics(run)
    assert [row["step"] for row in rows if "val_ema_loss" in row] == [3, 6]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == [
        row["val_loss"] for row in metrics(tmp_path / "plain") if "val_loss" in row
    ]
    student = MaskedAutoencoderViT(embed_dim=16, depth=3, num_heads=2, img_size=16, patch_size=4, decoder_embed_dim=16,
                                   decoder_depth=2, decoder_num_heads=2)  # fmt: skip
    student.load_state_dict(got)
    config = tiny_config(tmp_path, **options)
    method, config = config.build(torch.device("cpu"))
    method.load_training_state(checkpoint.load_state(run / "checkpoints/last")["heads"])
    method.student.load_state_dict(got)

    class Said:
        def add(self, row):
            self.row = row

    said = Said()
    config.held_out(method, torch.device("cpu"), None).evaluate(said, 6, 2.0)
    assert said.row["val_loss"] == pytest.approx([row for row in rows if "val_ema_loss" in row][-1]["val_ema_loss"])


@pytest.mark.parametrize("changes", [{}, dict(skip_nonfinite=2)], ids=["plain", "guarded"])
def test_it_resumes_to_the_same_bits(tmp_path, monkeypatch, changes):
    options = dict(ema=0.9, amp="bf16", val_data=tmp_path / "pictures", val_images=4, **changes)
    tiny_config(tmp_path)
    distill(tiny_config(tmp_path, "whole", **options))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert not distill(tiny_config(tmp_path, **options)).finished
    assert distill(tiny_config(tmp_path, **options)).finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    ours, theirs = average_of(tmp_path / "run"), average_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    ends = [[row["val_ema_loss"] for row in metrics(run) if "val_ema_loss" in row][-1] for run in
            (tmp_path / "run", tmp_path / "whole")]  # fmt: skip
    assert ends[0] == ends[1]


def test_a_run_may_begin_its_average_later(tmp_path):
    distill(tiny_config(tmp_path, "first", steps=3))
    run = distill(tiny_config(tmp_path, "second", steps=4, ema=0.75, resume=str(tmp_path / "first"))).run
    start, end, got = weights(tmp_path / "first"), weights(run), average_of(run)
    torch.testing.assert_close(got["cls_token"], 0.75 * start["cls_token"] + 0.25 * end["cls_token"])


def test_a_step_that_is_left_out_does_not_count():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    averages = [EMATeacher(model, 0.999, buffers="ema", mode="eval") for _ in range(2)]
    flags = torch.zeros(()), torch.ones(())
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3))
        averages[0].update(model, step)
        averages[1].update(model, step, flags[0])
        before = {name: value.clone() for name, value in averages[1].state_dict().items()}
        averages[1].update(model, step + 1, flags[1])
        for name, value in averages[1].state_dict().items():
            assert torch.equal(value, before[name]) and torch.equal(value, averages[0].state_dict()[name]), name


def test_weights_are_swapped_and_back_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    average = EMATeacher(model, 0.5)
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.fill_(7)
    places, kept = [p.data_ptr() for p in model.parameters()], average.model[0].weight.clone()
    with pytest.raises(RuntimeError, match="in evaluation"), average.swapped(model):
        assert torch.equal(model[0].weight, kept) and model[1].running_mean.sum() == 0
        raise RuntimeError("in evaluation")
    assert [p.data_ptr() for p in model.parameters()] == places
    assert model[0].weight.abs().sum() == 0 and torch.equal(average.model[0].weight, kept)
    assert model[1].running_mean.sum() == 28
