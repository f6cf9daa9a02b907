"""TensorBoard and Weights & Biases get what metrics.jsonl gets, also over a restart."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
from test_train import metrics
from tiny_run import tiny_config

from fastkd.train import ConfigError, distill
from fastkd.train.track import Reporter


def kill_after(step: int, config, monkeypatch) -> None:
    """Starts a run that ends after so many steps without a last checkpoint."""

    class Killed(Exception):
        pass

    count = itertools.count(1)

    def advance(self):
        if next(count) == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Reporter, "step", advance)
        distill(config)


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path, steps=6, log_every=1, save_every=2, val_every=3, val_data=tmp_path / "pictures",
                         trackers=("tensorboard",))  # fmt: skip
    kill_after(4, config, monkeypatch)
    result = distill(config)  # from step 2 on: step 3 was written before, too
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    rows = metrics(result.run)
    for name in ("loss", "pixel_loss", "lr", "val_align_loss"):
        expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    assert {"loss_curves", "reconstruction", "feature_similarity"} == set(events.Tags()["images"])


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    runs = {}

    class Run:
        def __init__(self):
            self.rows, self.finished = [], 0

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            self.finished += 1

    def init(**options):
        assert options["project"] == "fastkd" and options["name"] == "run" and options["config"]["steps"] == 6
        return runs.setdefault(options["id"], Run())

    fake = types.SimpleNamespace(init=init, Image=str, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny_config(tmp_path, steps=6, log_every=1, save_every=2, trackers=("wandb",))
    kill_after(4, config, monkeypatch)
    result = distill(config)
    (run,) = runs.values()
    assert run.finished == 2
    logged = dict((step, row["loss"]) for step, row in run.rows if "loss" in row)
    assert logged == {row["step"]: row["loss"] for row in metrics(result.run)}
    assert any("reconstruction" in row for _, row in run.rows)
    distill(tiny_config(tmp_path, steps=6, log_every=1, trackers=("wandb",), resume="never", out=tmp_path / "b/run"))
    assert len(runs) == 2


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--trackers: got .*wandb.*pip install wandb"):
        distill(tiny_config(tmp_path, trackers=("wandb",)))
