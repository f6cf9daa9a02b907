"""A fair comparison: the same task under several treatments (arms), over several seeds, judged in pairs.

A demo says what its arms are and what it expects of them; this file runs them, keeps the rows, and tells means with
their spread, paired differences with a 95 % t-interval, and whether the expectations held.

    def main(config: Config) -> int:
        arms = [Arm("CE", lambda seed: train(seed)), Arm("NKD", lambda seed: train(seed, teacher=teacher))]
        claims = [Claim("NKD", "CE", at_least=0.01)]
        return compare("nkd", arms, config, baseline="CE", claims=claims, settings=SETTINGS)

An arm is a function of the seed alone. What two arms share, such as initial weights and the order of batches, they
must draw from that seed in the same way: then their difference is due to the treatment.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import report
from .training import one_thread

TUNING_SEEDS = (100, 101)


@dataclasses.dataclass(kw_only=True)
class CompareConfig:
    """Options that every comparison has; a demo's `Config` inherits them."""

    out: Path
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    seeds: int = 5
    """How many seeds, from 0 on."""
    quick: bool = False
    """One seed and few steps: shows that everything runs, judges nothing."""
    tune: bool = False
    """Choose settings instead: every candidate of every arm on seeds 100 and 101, which no result uses."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One treatment: ``run(seed)`` gives the metrics, by name."""

    name: str
    run: Callable[[int], Mapping[str, float]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the table: key of the rows, heading, and whether it is a share that reads as percent."""

    key: str
    heading: str
    percent: bool = True


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a demo promises: the mean paired difference of a metric between two arms is at least so much."""

    arm: str
    than: str
    at_least: float = 0.0
    metric: str = "accuracy"


ACCURACY = Metric("accuracy", "held-out accuracy, %")


def compare(
    name: str,
    arms: Sequence[Arm],
    config: CompareConfig,
    *,
    baseline: str,
    settings: Mapping[str, Any],
    metrics: Sequence[Metric] = (ACCURACY,),
    claims: Sequence[Claim] = (),
    title: str = "",
) -> int:
    """Runs all arms on all seeds, shows and writes the table.

    Files in `config.out`: rows.jsonl (the first line: the settings; then a row per arm and seed), results.md.

    Args:
        name: of the demo.
        baseline: the arm that paired differences are taken to.
        settings: all that the rows depend on, JSON-ready; rows of other settings are dropped.
        claims: what must hold; nothing is judged under `config.quick`.

    Returns:
        0; 1 where a claim does not hold.
    """
    console = Console(width=None if Console().is_terminal else 150)
    seeds = range(1 if config.quick else config.seeds)
    # Baseline and metrics stand in the file too, so that a page can be made of it alone.
    about = {
        "demo": name,
        "quick": config.quick,
        "baseline": baseline,
        "metrics": [dataclasses.astuple(m) for m in metrics],
    }
    rows = Rows(config.out / "rows.jsonl", {**about, **settings})
    todo = [(seed, arm) for seed, arm in itertools.product(seeds, arms) if (arm.name, seed) not in rows]
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
    with one_thread(), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=len(todo))
        for seed, arm in todo:
            bar.update(task, description=f"{name}: {arm.name}, seed {seed}")
            start = time.thread_time()
            values = {key: float(value) for key, value in arm.run(seed).items()}
            rows.add(arm=arm.name, seed=seed, **values, seconds=round(time.thread_time() - start, 2))
            bar.advance(task)
    table = table_of(rows.rows, [arm.name for arm in arms], baseline, metrics, title or name)
    notes = [f"{arm.name}: {arm.note}" for arm in arms if arm.note]
    verdicts = [] if config.quick else [verdict(rows.rows, claim, metrics) for claim in claims]
    console.print(table.rich())
    for line in (*notes, *(text for _, text in verdicts)):
        console.print(line, highlight=False)
    text = "\n\n".join([table.markdown(), *notes, *(text for _, text in verdicts)])
    (config.out / "results.md").write_text(text + "\n")
    console.print(f"rows: {rows.path}", highlight=False, soft_wrap=True)
    return 0 if all(good for good, _ in verdicts) else 1


def tune(
    name: str,
    candidates: Mapping[str, Sequence[Mapping[str, Any]]],
    run: Callable[[str, Mapping[str, Any], int], float],
    config: CompareConfig,
) -> int:
    """Every candidate setting of every arm on the tuning seeds; shows each mean and marks the best of an arm.

    Args:
        candidates: per arm the settings to try.
        run: ``run(arm, settings, seed)``, the number to maximise.
    """
    console = Console(width=None if Console().is_terminal else 150)
    everything = {arm: [dict(c) for c in tried] for arm, tried in candidates.items()}
    rows = Rows(config.out / "tuning.jsonl", {"demo": name, "seeds": TUNING_SEEDS, "candidates": everything})
    with one_thread():
        for arm, tried in everything.items():
            means = []
            for number, setting in enumerate(tried):
                for seed in TUNING_SEEDS:
                    if (f"{arm} {number}", seed) not in rows:
                        rows.add(arm=f"{arm} {number}", seed=seed, value=float(run(arm, setting, seed)))
                values = [row["value"] for row in rows.rows if row["arm"] == f"{arm} {number}"]
                means.append(sum(values) / len(values))
            for number, (setting, mean) in enumerate(zip(tried, means)):
                best = "  <- best" if number == means.index(max(means)) else ""
                console.print(f"{arm:24} {mean:.4f}  {setting}{best}", highlight=False, soft_wrap=True)
    return 0


class Rows:
    """Lines of a file, the first one the settings; another file's worth of settings starts it anew."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        settings = json.loads(json.dumps(settings, default=str))
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.rows: list[dict[str, Any]] = lines[1:] if lines[:1] == [settings] else []
        if not self.rows:
            self.path.write_text(json.dumps(settings) + "\n")

    def __contains__(self, key: tuple[str, int]) -> bool:
        return any((row["arm"], row["seed"]) == key for row in self.rows)

    def add(self, **row: Any) -> None:
        """Adds a row and writes it at once."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def values_of(rows: Sequence[Mapping[str, Any]], arm: str, metric: str) -> list[float]:
    """A metric of an arm, in the order of the seeds."""
    return [row[metric] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm and metric in row]


def table_of(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[str], baseline: str, metrics: Sequence[Metric], title: str
) -> report.Table:
    """Mean and standard deviation of each arm, and its paired difference to the baseline."""
    lines = []
    for arm in arms:
        cells = []
        for metric in metrics:
            scale = 100 if metric.percent else 1
            mine, theirs = ([scale * v for v in values_of(rows, who, metric.key)] for who in (arm, baseline))
            paired = arm != baseline and len(mine) == len(theirs) > 0
            cells += [spread(mine), difference(mine, theirs) if paired else ""]
        seconds = values_of(rows, arm, "seconds")
        lines.append((arm, str(len(seconds)), *cells, f"{sum(seconds) / max(1, len(seconds)):.1f}"))
    headings = [text for metric in metrics for text in (metric.heading, f"− {baseline}")]
    return report.Table(title, ("arm", "seeds", *headings, "s"), lines)


def verdict(rows: Sequence[Mapping[str, Any]], claim: Claim, metrics: Sequence[Metric]) -> tuple[bool, str]:
    """Whether a claim holds, and a sentence about it."""
    scale = next((100 if m.percent else 1 for m in metrics if m.key == claim.metric), 1)
    mine, theirs = (values_of(rows, who, claim.metric) for who in (claim.arm, claim.than))
    stats = report.interval([scale * (a - b) for a, b in zip(mine, theirs, strict=True)])
    good = stats.mean >= scale * claim.at_least
    return good, (
        f"{'holds' if good else 'DOES NOT HOLD'}: {claim.arm} − {claim.than} {number(stats.mean, sign=True)} "
        f"(expected at least {number(scale * claim.at_least, sign=True)}, {claim.metric})"
    )


def spread(values: Sequence[float]) -> str:
    """``mean ± standard deviation``; the mean alone of one value, a dash of none."""
    if not values:
        return "-"
    stats = report.interval(values)
    return number(stats.mean) + ("" if math.isnan(stats.deviation) else f" ± {number(stats.deviation)}")


def difference(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Mean paired difference, ± half of its 95 % t-interval where there are several pairs."""
    stats = report.interval([a - b for a, b in zip(values, baseline, strict=True)])
    half = "" if math.isnan(stats.half_width) else f" ± {number(stats.half_width)}"
    return number(stats.mean, sign=True) + half


def number(value: float, sign: bool = False) -> str:
    """Two decimals for small numbers, one for percentages."""
    digits = 1 if abs(value) >= 1 or value == 0 else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"
