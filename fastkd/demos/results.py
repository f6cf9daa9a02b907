"""Results of many runs, kept as lines of a file so that a long experiment can be continued."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from fastkd.evaluation.pictures import Scores

from . import report

Key = tuple[str, "float | None", int]  # name, mask ratio, seed


class Results:
    """One row per run: name, mask ratio, seed, both scores, and whatever else is told.

    Args:
        path: JSON lines; the first says with which settings the others were made.
        settings: JSON-ready.
        keep: whether rows that are there are kept, given that their settings are the same; else the file starts anew.
    """

    def __init__(self, path: Path, settings: dict[str, Any], keep: bool) -> None:
        self.path, self._lock = path, threading.Lock()
        lines = [json.loads(line) for line in path.read_text().splitlines()] if keep and path.exists() else []
        self.rows: list[dict[str, Any]] = lines[1:] if lines[:1] == [settings] else []
        if not self.rows:
            path.write_text(json.dumps(settings) + "\n")

    def __contains__(self, key: Key) -> bool:
        return any((row["name"], row["ratio"], row["seed"]) == key for row in self.rows)

    def add(self, name: str, ratio: float | None, seed: int, scores: Scores, **more: Any) -> None:
        """Adds a row and writes it at once."""
        row = dict(name=name, ratio=ratio, seed=seed, knn=scores.knn, linear=scores.linear, **more)
        with self._lock, self.path.open("a") as file:
            self.rows.append(row)
            file.write(json.dumps(row) + "\n")

    def values(
        self, column: str, name: str, ratio: float | None = None, seeds: tuple[int, ...] | None = None
    ) -> list[float]:
        """One column of one method at one ratio, in the order of the seeds (default: all, ascending)."""
        found = {row["seed"]: row[column] for row in self.rows if row["name"] == name and row["ratio"] == ratio}
        return [found[seed] for seed in (seeds or sorted(found)) if seed in found]

    def cells(
        self, name: str, ratio: float | None = None, baseline: str | None = None, seeds: tuple[int, ...] | None = None
    ) -> list[str]:
        """kNN, its difference to the baseline, linear, its difference, and training seconds, ready for a table."""
        cells = []
        for column in ("knn", "linear"):
            values = self.values(column, name, ratio, seeds)
            cells.append(report.spread(values))
            cells.append(report.difference(values, self.values(column, baseline, ratio, seeds)) if baseline else "")
        seconds = self.values("seconds", name, ratio, seeds) if ratio else []
        return [*cells, f"{report.interval(seconds).mean:.1f}" if seconds else ""]
