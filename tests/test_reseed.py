"""What a step draws follows from the seed, the step and the rank, whatever ran before it and whoever draws."""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest
import torch
from conftest import DEVICE
from test_train import assert_same_run, at_step
from tiny_run import tiny_config

from fastkd.methods import DMAE
from fastkd.train import distill
from fastkd.train.reseed import reseed

HERE = torch.device(DEVICE)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.draw", lambda self, run: None)


def drawn() -> tuple:
    """One number of each generator that a library may use."""
    return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), device=HERE).item()


def at(seed: int, step: int, rank: int = 0) -> tuple:
    reseed(HERE, seed, step, rank)
    return drawn()


def test_draws_follow_from_seed_step_and_rank():
    first = at(0, 5)
    drawn()
    assert at(0, 5) == first
    others = [at(1, 5), at(0, 6), at(0, 5, rank=1), at(5, 0), at(0, 51), at(0, 5, rank=11)]
    for generator in range(3):
        assert len({first[generator], *(other[generator] for other in others)}) == 1 + len(others)


@pytest.fixture
def noisy(monkeypatch):
    """DMAE whose student sees noise of all three generators and skips branches, as timm's augmentations would make it;
    all that was drawn."""
    log, original = [], DMAE.forward

    def forward(self, images, *args, **kwargs):
        self.student.set_drop_path(0.5)
        log.append((random.random(), np.random.rand(), torch.rand(()).item()))
        result = original(self, images, *args, **kwargs)
        return {**result, "loss": result["loss"] * sum(log[-1])}

    monkeypatch.setattr(DMAE, "forward", forward)
    return log


@pytest.mark.parametrize("changes", [{}, dict(accumulate=2)], ids=["plain", "accumulate"])
def test_a_resumed_run_draws_the_same_numbers(tmp_path, monkeypatch, noisy, changes):
    distill(tiny_config(tmp_path, "whole", **changes))
    whole, noisy[:] = list(noisy), []
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert not distill(tiny_config(tmp_path, **changes)).finished
    drawn()  # as code between two runs may
    distill(tiny_config(tmp_path, **changes))
    assert noisy == whole and len(set(whole)) == len(whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_runs_between_two_steps_does_not_change_them(tmp_path, monkeypatch, noisy):
    """Evaluation, pictures and checkpoints may draw too, on the main process alone."""
    distill(tiny_config(tmp_path, "plain"))
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.evaluate", lambda *_: drawn())
    distill(tiny_config(tmp_path, "drawing", val_every=1))
    assert_same_run(tmp_path / "drawing", tmp_path / "plain")


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_replays_of_a_graph_draw_what_the_step_says():
    out, graph = torch.zeros(8, device=HERE), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out.copy_(torch.rand(8, device=HERE))
    for step in (0, 1, 0):
        reseed(HERE, 3, step)
        graph.replay()
        replayed = out.clone()
        reseed(HERE, 3, step)
        assert torch.equal(replayed, torch.rand(8, device=HERE))
