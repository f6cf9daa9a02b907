"""Fair comparisons: rows that are kept, paired differences, verdicts and tuning."""

import json

import pytest

from fastkd.demos.compare import Arm, Claim, CompareConfig, Metric, compare, difference, tune, values_of


@pytest.fixture
def config(tmp_path):
    return CompareConfig(out=tmp_path, seeds=3)


def arms(calls):
    def run(name, base):
        def inside(seed):
            calls.append((name, seed))
            return {"accuracy": base + 0.1 * seed, "loss": 3.0 - base}

        return inside

    return [Arm("plain", run("plain", 0.5), note="without"), Arm("method", run("method", 0.6))]


METRICS = (Metric("accuracy", "accuracy, %"), Metric("loss", "loss", percent=False))


def test_rows_table_and_verdict(config, capsys):
    calls = []
    options = dict(baseline="plain", settings={"steps": 3}, metrics=METRICS)
    claims = [Claim("method", "plain", at_least=0.05)]
    assert compare("toy", arms(calls), config, claims=claims, **options) == 0
    assert calls[:2] == [("plain", 0), ("method", 0)] and len(calls) == 6
    shown = capsys.readouterr().out
    assert "60.0 ± 10.0" in shown and "+10.0 ± 0.0" in shown and "holds: method − plain +10.0" in shown
    assert "plain: without" in (config.out / "results.md").read_text()
    lines = [json.loads(line) for line in (config.out / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "demo": "toy", "quick": False, "baseline": "plain", "steps": 3,
        "metrics": [["accuracy", "accuracy, %", True], ["loss", "loss", False]],
    }  # fmt: skip
    assert len(lines) == 7
    assert values_of(lines[1:], "method", "accuracy") == pytest.approx([0.6, 0.7, 0.8])

    # Finished rows are kept; other settings start anew; a claim that fails decides the exit code.
    assert compare("toy", arms(calls), config, claims=[Claim("method", "plain", 0.2)], **options) == 1
    assert len(calls) == 6 and "DOES NOT HOLD" in capsys.readouterr().out
    compare("toy", arms(calls), config, **{**options, "settings": {"steps": 4}})
    assert len(calls) == 12


def test_quick_runs_one_seed_and_judges_nothing(config):
    calls = []
    config.quick = True
    claims = [Claim("plain", "method", at_least=1.0)]
    assert compare("toy", arms(calls), config, baseline="plain", settings={}, claims=claims) == 0
    assert calls == [("plain", 0), ("method", 0)]


def test_tuning_marks_the_best_candidate(config, capsys):
    def run(arm, setting, seed):
        return -abs(setting["lr"] - 0.2) + 0.001 * (seed - 100)

    assert tune("toy", {"CE": [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.4}]}, run, config) == 0
    best = [line for line in capsys.readouterr().out.splitlines() if "best" in line]
    assert len(best) == 1 and "'lr': 0.2" in best[0]


def test_difference_is_paired():
    assert difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == "+1.0 ± 0.0"
    assert difference([3.0], [1.0]) == "+2.0"
    with pytest.raises(ValueError):
        difference([1.0, 2.0], [1.0])
