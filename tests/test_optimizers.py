"""Optimisers over the same groups, against their formulas; the norm of gradients and its clipping."""

from __future__ import annotations

import signal
import sys
import types

import pytest
import torch
from conftest import DEVICE
from rehearsed import Rehearsed
from test_step import RATIO, make_batches, make_model
from test_train import assert_same_run, at_step, metrics
from tiny_run import tiny_config

from fastkd.train import ConfigError, TrainingStep, distill, param_groups, set_lr
from fastkd.train.build import build_optimizer
from fastkd.train.optimizer import make_optimizer, skips_on_device

RATES = dict(adamw=1e-2, sgd=1e-1, lamb=1e-2, lars=10.0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("fastkd.train.held_out.HeldOut.draw", lambda self, run: None)


def adam(g, m, v, number, betas):
    """(direction, m, v) of the step of this number."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    return m / (1 - betas[0] ** number), v / (1 - betas[1] ** number), m, v


def by_formula(kind, p, gradients, lr, decay, adapt, betas=(0.9, 0.95), momentum=0.9):
    """A tensor after some steps, in float64."""
    p, m, v = p.double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double()
    for number, g in enumerate(gradients, 1):
        g = g.double()
        if kind in ("adamw", "lamb"):
            first, second, m, v = adam(g, m, v, number, betas)
            move = first / (second.sqrt() + (1e-8 if kind == "adamw" else 1e-6)) + decay * p
            p = p - lr * move * (p.norm() / move.norm() if kind == "lamb" and adapt else 1)
        else:
            rate = 0.001 * p.norm() / (g.norm() + decay * p.norm()) if kind == "lars" and adapt else 1
            m = momentum * m + rate * (g + decay * p)
            p = p - lr * m
    return p


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", RATES)
def test_optimisers_follow_their_formulas(kind, decay):
    """A matrix and a vector over three steps: one does not decay and its rate does not follow norms."""
    torch.manual_seed(1)
    module = torch.nn.Linear(5, 4).to(DEVICE)
    start = [p.detach().cpu().clone() for p in module.parameters()]
    gradients = [[torch.randn(p.shape) for p in module.parameters()] for _ in range(3)]
    optimizer = make_optimizer(kind, param_groups(module, decay), 1.0)
    set_lr(optimizer, RATES[kind])
    for step in gradients:
        for p, g in zip(module.parameters(), step):
            p.grad = g.to(DEVICE)
        optimizer.step()
    for index, p in enumerate(module.parameters()):
        matrix = index == 0
        want = by_formula(kind, start[index], [g[index] for g in gradients], RATES[kind], decay * matrix, matrix)
        torch.testing.assert_close(p.detach().cpu().double(), want, rtol=1e-5, atol=1e-7)


def test_rates_of_groups_are_scaled_for_all():
    for kind in RATES:
        groups = [{**group, "lr_scale": scale} for group, scale in zip(param_groups(make_model(), 0.1), (0.5, 1.0))]
        optimizer = make_optimizer(kind, groups, 1.0, capturable=kind in ("adamw", "sgd"))
        set_lr(optimizer, 0.25)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.25], kind
        assert skips_on_device(optimizer) == (kind in ("adamw", "sgd"))


@pytest.mark.parametrize("kind", ["sgd", "lamb", "lars"])
def test_runs_resume_to_the_same_bits(tmp_path, monkeypatch, kind):
    options = dict(optimizer=kind, lr=RATES[kind], clip_grad=0.5)
    distill(tiny_config(tmp_path, "whole", **options))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert not distill(tiny_config(tmp_path, **options)).finished
    assert distill(tiny_config(tmp_path, **options)).finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] and all(row["grad_norm"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="does not fit: optimizer: got AdamW, expected "):
        distill(tiny_config(tmp_path, "other", resume=str(tmp_path / "run"), steps=8))


def test_packages_that_are_missing_and_values_that_are_wrong(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, optimizer="lamb", momentum=1.0, clip_grad=0.0, ema=1.0, skip_nonfinite=-1)
    said = "\n".join(config.problems())
    for option, got in (("momentum", 1.0), ("clip-grad", 0.0), ("ema", 1.0), ("skip-nonfinite", -1)):
        assert f"--{option}: got {got}, expected " in said
    assert len(config.problems()) == 4
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"--optimizer lamb: timm.optim.Lamb does not import .* 'fastkd\[models\]'"):
        build_optimizer(tiny_config(tmp_path, optimizer="lamb", lr=1.0), make_model(), capturable=False)
    with pytest.raises(ValueError, match="make_optimizer: kind: got 'adam', expected one of adamw, apex, lamb"):
        make_optimizer("adam", param_groups(make_model(), 0.0), 1.0)


def test_apex_lamb_does_not_clip_by_itself(monkeypatch):
    class FusedLAMB(torch.optim.SGD):
        def __init__(self, groups, lr, betas, max_grad_norm):
            super().__init__(groups, lr)
            self.seen = betas, max_grad_norm

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedLAMB=FusedLAMB))
    optimizer = make_optimizer("apex-lamb", param_groups(make_model(), 0.3), 1e-3, betas=(0.8, 0.9))
    assert optimizer.seen == ((0.8, 0.9), float("inf"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def gradient_of(batches, accumulate: int) -> torch.Tensor:
    """Of the first step, all parameters in one vector."""
    model = make_model()
    for batch in batches[:accumulate]:
        (model(batch.images, RATIO, keys=batch.keys)["loss"] / accumulate).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="graphs are rehearsed")
def test_the_gradient_is_shortened_to_the_norm(amp, accumulate, graphs):
    """Plain gradient descent at rate 1 moves by the gradient: by at most the given norm, along the whole gradient."""
    batches = make_batches(4 * accumulate)
    exact = gradient_of(batches, accumulate)
    long, short = 0.5 * exact.norm().item(), 2 * exact.norm().item()
    for largest in (long, short):
        model = make_model()
        optimizer = make_optimizer("sgd", param_groups(model, 0.0), 1.0, momentum=0.0, capturable=graphs)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=amp is not None)
        run = TrainingStep(
            model, optimizer, RATIO, amp=amp, accumulate=accumulate, scaler=scaler, clip_grad=largest,
            graphs=Rehearsed() if graphs else None,
        )  # fmt: skip
        before = [p.detach().clone() for p in model.parameters()]
        queue = iter(batches)
        losses = run(queue)
        tolerance = 1e-5 if amp is None else 2e-2
        assert run.names[-1] == "grad_norm" and losses[-1].item() == pytest.approx(exact.norm().item(), rel=tolerance)
        moved = torch.cat([(a - p.detach()).flatten() for a, p in zip(before, model.parameters()) if p.requires_grad])
        want = exact * min(1, largest / exact.norm().item())
        assert (moved - want).norm() < tolerance * want.norm()
        for _ in range(3):
            run(queue)  # the last one as a graph
        assert not graphs or run.graphs.captured == accumulate
