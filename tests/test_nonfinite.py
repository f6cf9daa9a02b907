"""Steps with NaN or inf: left out as if they had never been, counted, told with their files, and at last fatal."""

from __future__ import annotations

import functools
import itertools
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from rehearsed import Rehearsed
from test_step import RATIO, assert_equal, make_batches, make_model
from test_train import assert_same_run, at_step, metrics, python, weights
from tiny_run import tiny_config
from torch import nn

from fastkd.data import ImageLoader
from fastkd.methods import DMAE
from fastkd.train import TrainingError, TrainingStep, checkpoint, distill, param_groups, set_lr
from fastkd.train.optimizer import capturable, make_optimizer


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.draw", lambda self, run: None)


def poison(monkeypatch, keys: list[int], value: float = math.nan) -> None:
    """Batches that contain one of these keys have such a loss, in graphs and after a restart as well."""
    original = DMAE.forward

    def forward(self, images, *args, keys=None, **kwargs):
        result = original(self, images, *args, keys=keys, **kwargs)
        if keys is None:
            return result
        bad = torch.isin(keys, torch.tensor(wanted, device=keys.device)).any()
        return {**result, "loss": result["loss"] * torch.where(bad, value, 1.0)}

    wanted = keys
    monkeypatch.setattr(DMAE, "forward", forward)


def train(batches, kind="adamw", graphs=None, accumulate=1, amp=None):
    """(losses of the last step, model, the step, whether each step was left out) after training under the guard."""
    model = make_model()
    optimizer = make_optimizer(kind, param_groups(model, 0.05), 1e-2, capturable=graphs is not None)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=amp == torch.float16)
    run = TrainingStep(
        model, optimizer, RATIO, accumulate=accumulate, amp=amp, scaler=scaler, graphs=graphs, guard=True
    )
    queue, left_out = iter(batches), []
    for _ in range(len(batches) // accumulate):
        set_lr(optimizer, 1e-2)
        run(queue)
        left_out.append(run.left_out.item())
    return run.losses.clone(), model, run, left_out


@pytest.mark.parametrize("accumulate, value", [(1, math.nan), (2, math.inf)], ids=str)
@pytest.mark.parametrize("kind, graphs", [("adamw", 0), ("adamw", 1), ("sgd", 0), ("sgd", 1), ("lamb", 0), ("lars", 0)])
@pytest.mark.skipif(DEVICE == "cuda", reason="graphs are rehearsed")
def test_a_step_that_is_left_out_changes_nothing(monkeypatch, kind, graphs, accumulate, value):
    """The very first one, one in the middle, and one that a graph replays: the rest trains as if alone."""
    batches = make_batches(7 * accumulate)
    steps = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    bad = 0, 2, 5
    poison(monkeypatch, [steps[number][-1].keys[1].item() for number in bad], value)
    good = [batch for number, step in enumerate(steps) if number not in bad for batch in step]
    rehearsed = [Rehearsed() if graphs else None for _ in range(2)]
    *ours, run, left_out = train(batches, kind, rehearsed[0], accumulate)
    assert_equal(ours, train(good, kind, rehearsed[1], accumulate))
    assert left_out == [float(number in bad) for number in range(7)]
    assert not graphs or rehearsed[0].captured == accumulate
    for state in run.optimizer.state.values():
        assert state.get("step", torch.tensor(4)) == 4  # where an optimiser counts, it counted the others


@pytest.mark.parametrize("graphs", [0, 1])
@pytest.mark.skipif(DEVICE == "cuda", reason="graphs are rehearsed")
def test_float16_leaves_out_what_its_scaler_cannot_see(monkeypatch, graphs):
    """An infinite loss whose gradient is finite, beside a scaler that leaves steps out by itself."""
    batches = make_batches(8)
    original, marked = DMAE.forward, batches[5].keys[0].item()

    def forward(self, images, *args, keys=None, **kwargs):
        result = original(self, images, *args, keys=keys, **kwargs)
        return {**result, "loss": result["loss"] + torch.where((keys == marked).any(), math.inf, 0.0)}

    monkeypatch.setattr(DMAE, "forward", forward)
    losses, model, run, left_out = train(batches, graphs=Rehearsed() if graphs else None, amp=torch.float16)
    assert left_out == [0, 0, 0, 0, 0, 1, 0, 0] and run.scaler.get_scale() == 512
    alone = train(batches[:5] + batches[6:], amp=torch.float16)
    for (name, a), b in zip(model.named_parameters(), alone[1].parameters()):
        if name.endswith("qkv.bias"):  # that of keys has no gradient but rounding, which the other scale changes
            a, b = (torch.cat((bias.chunk(3)[0], bias.chunk(3)[2])) for bias in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Normalised(nn.Module):
    """A method with statistics that forward changes, NaN in the first pixel of batches with a key below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 1, 4)

    def forward(self, images, keys):
        x = images.permute(0, 3, 1, 2).float() / 255
        x = x + torch.where((keys < 0).any(), math.nan, 0.0)
        return {"loss": self.head(self.norm(x)).square().mean()}


def test_statistics_of_a_bad_batch_are_forgotten():
    model = Normalised().to(DEVICE)
    batches = make_batches(2)
    batches[1] = batches[1]._replace(keys=-1 - batches[1].keys)
    optimizer = make_optimizer("adamw", param_groups(model, 0.05), 1e-2)
    run = TrainingStep(model, optimizer, None, names=("loss",), guard=True)
    run(iter(batches[:1]))
    before = model.norm.running_mean.clone(), model.norm.running_var.clone()
    run(iter(batches[1:]))
    assert run.left_out == 1 and run.losses.isnan().all()
    assert torch.equal(model.norm.running_mean, before[0]) and torch.equal(model.norm.running_var, before[1])
    assert before[0].isfinite().all() and before[0].abs().sum() > 0


@functools.cache
def seen(pictures: Path, batch_size: int = 4, rank: int = 0, world: int = 1) -> list:
    """The first batches of `tiny_config`."""
    loader = ImageLoader(pictures, (16, 16), batch_size, rank=rank, world_size=world)
    return list(itertools.islice(loader, 12))


def files(pictures: Path, batch) -> list[str]:
    paths = ImageLoader(pictures, (16, 16), 4).folder
    return sorted(paths.path(index) for index in batch.indices.tolist())


def bad_steps(tmp_path: Path, monkeypatch, *numbers: int) -> list:
    """Makes the steps of these numbers fail; all batches of the run."""
    tiny_config(tmp_path)
    batches = seen(tmp_path / "pictures")
    poison(monkeypatch, [batches[number - 1].keys[2].item() for number in numbers])
    return batches


def test_the_message_names_the_files_of_the_batch(tmp_path, monkeypatch):
    batches = bad_steps(tmp_path, monkeypatch, 5)
    with pytest.raises(TrainingError, match=r"^step 5: loss is nan.* and 1 more \(listed in ") as error:
        distill(tiny_config(tmp_path, steps=12, save_every=2, log_every=6))
    listed = (tmp_path / "run/nonfinite/step_5.txt").read_text().splitlines()
    assert sorted(listed) == files(tmp_path / "pictures", batches[4]) and len(listed) == 4
    assert all(file in str(error.value) for file in listed[:3])
    assert "the last good checkpoint is kept: " in str(error.value) and "--skip-nonfinite N" in str(error.value)
    assert not (tmp_path / "run/nonfinite/step_6.txt").exists()  # its loss is NaN because of step 5
    assert checkpoint.load_state(tmp_path / "run/checkpoints/last")["step"] == 4


def test_tolerated_steps_are_counted_and_the_next_one_stops_the_run(tmp_path, monkeypatch):
    """Steps 2, 4 and 8 fail; the run is interrupted after the fourth, with a report after the third."""
    batches = bad_steps(tmp_path, monkeypatch, 2, 4, 8)
    options = dict(steps=9, log_every=3, ema=0.9)
    whole = distill(tiny_config(tmp_path, "whole", skip_nonfinite=3, **options)).run
    rows = [row for row in metrics(whole) if "loss" in row]
    assert [row["nonfinite"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "pixel_loss", "grad_norm"))
    assert all(tensor.isfinite().all() for tensor in weights(whole).values())
    log = (whole / "train.log").read_text()
    assert log.count("is left out") == 3 and "step 4 is left out (2 of 3 tolerated): loss is nan" in log
    listed = (whole / "nonfinite/step_8.txt").read_text().splitlines()
    assert sorted(listed) == files(tmp_path / "pictures", batches[7])

    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    assert not distill(tiny_config(tmp_path, skip_nonfinite=3, **options)).finished
    state = checkpoint.load_state(tmp_path / "run/checkpoints/last")
    assert state["nonfinite"] == 1 and state["history"][0, 0].isnan()  # and one that waits for the report
    with pytest.raises(TrainingError, match="step 8: .*Training stops .3 such steps, 2 are tolerated"):
        distill(tiny_config(tmp_path, skip_nonfinite=2, **options))  # may differ from the first half
    assert distill(tiny_config(tmp_path, skip_nonfinite=3, **options)).finished
    assert_same_run(tmp_path / "run", whole)
    ends = [checkpoint.load_state(run / "checkpoints/last") for run in (tmp_path / "run", whole)]
    assert ends[0]["nonfinite"] == ends[1]["nonfinite"] == 3
    assert all(torch.equal(ends[0]["ema"][name], value) for name, value in ends[1]["ema"].items())
    assert ends[1]["ema"] and all(value.isfinite().all() for value in ends[1]["ema"].values())


def test_a_healthy_run_is_the_same_under_the_guard(tmp_path):
    distill(tiny_config(tmp_path, "plain"))
    distill(tiny_config(tmp_path, "guarded", skip_nonfinite=5))
    assert_same_run(tmp_path / "guarded", tmp_path / "plain")


def test_gradients_that_are_not_finite_count(tmp_path, monkeypatch):
    """A finite loss with an infinite gradient would break the weights of the next step."""
    original, calls = DMAE.forward, []

    def forward(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            result["loss"] = result["loss"] + (self.student.mask_token.sum() * 0).sqrt()  # gradient inf * 0
        return result

    monkeypatch.setattr(DMAE, "forward", forward)
    run = distill(tiny_config(tmp_path, skip_nonfinite=1)).run
    assert [row["nonfinite"] for row in metrics(run) if "loss" in row] == [0, 1, 1]
    assert "step 3 is left out (1 of 1 tolerated): loss is 1" in (run / "train.log").read_text()


RANK = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
from test_nonfinite import DMAE, poison, seen
from tiny_run import tiny_config
from fastkd.train import distill
folder = Path(sys.argv[2])
keys = [seen(folder / "pictures", 2, rank, 2)[number - 1].keys[0].item() for number, rank in ((2, 1), (5, 0))]
with pytest.MonkeyPatch.context() as patch:
    poison(patch, keys)
    distill(tiny_config(folder, "two", batch_size=2, log_every=3, save_every=4, skip_nonfinite=1,
                         clip_grad=1.0, ema=0.9, activation_checkpointing=True))
"""


def test_processes_leave_the_same_steps_out(tmp_path):
    """Step 2 fails in the second process and is tolerated, step 5 fails in the first one and stops both."""
    tiny_config(tmp_path)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    logs = tmp_path / "logs"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=3", "--log-dir", logs]
    run = python(*torchrun, script, Path(__file__).parent, tmp_path)
    assert run.returncode != 0
    said = ["".join(p.read_text() for p in sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log"))) for rank in (0, 1)]
    ends = [[line for line in text.splitlines() if "TrainingError: step 5" in line] for text in said]
    assert len(ends[0]) == len(ends[1]) == 1, said
    assert "the batch is " in ends[0][0] and "see what the others say" in ends[1][0]
    listed = (tmp_path / "two/nonfinite/step_2_rank_1.txt").read_text().splitlines()
    assert sorted(listed) == files(tmp_path / "pictures", seen(tmp_path / "pictures", 2, 1, 2)[1])
    assert not (tmp_path / "two/nonfinite/step_2_rank_0.txt").exists()
    assert [row["nonfinite"] for row in metrics(tmp_path / "two") if "loss" in row] == [1]
    state = checkpoint.load_state(tmp_path / "two/checkpoints/last")
    assert state["step"] == 4 and state["nonfinite"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "two").values())


def test_what_a_graph_can_hold():
    assert capturable("adamw", guard=True) and capturable("sgd") and capturable("apex")
    assert not capturable("apex", guard=True) and not capturable("lamb") and not capturable("lars")
