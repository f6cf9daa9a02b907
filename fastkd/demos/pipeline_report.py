"""Table and notes of the pipeline demo, from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.evaluation.scores import wilson

from .compare import difference, values_of
from .report import Table

UNTRAINED, MAE, SCRATCH, BOTH = "untrained", "MAE alone", "distilled from scratch", "MAE, then distilled"
TEACHER, TAPPED = "teacher", "teacher up to the block"
ARMS = (UNTRAINED, MAE, SCRATCH, BOTH, TEACHER, TAPPED)
METRICS = {"knn": "kNN, %", "linear": "linear probe, %", "finetuned": "fine-tuned, %"}

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> Table:
    """Per arm and score: the mean with its interval, and the paired difference to MAE alone."""
    lines = []
    for arm in ARMS:
        cells = []
        for metric in METRICS:
            mine, theirs = ([100 * value for value in values_of(rows, who, metric)] for who in (arm, MAE))
            paired = arm != MAE and len(mine) == len(theirs) > 0
            cells += [_mean(mine, rows), difference(mine, theirs) if paired else ""]
        seconds = values_of(rows, arm, "seconds")
        lines.append((arm, str(len(seconds)), *cells, f"{sum(seconds) / max(1, len(seconds)):.0f}"))
    headings = [text for heading in METRICS.values() for text in (heading, f"− {MAE}")]
    return Table("Held-out stamps", ("student", "seeds", *headings, "s"), lines)


def _mean(values: Sequence[float], rows: Sequence[Row]) -> str:
    """The mean of percentages and the 95 % interval that so many pictures of one split leave open."""
    if not values:
        return ""
    mean, pictures = sum(values) / len(values), rows[0]["val"]
    low, high = wilson(round(mean / 100 * pictures), pictures)
    return f"{mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the table."""
    first = rows[0]
    gaps = [gap for row in rows for gap in row.get("export_gaps", {}).values()]
    said = [
        f"{first['unlabelled']} unlabelled pictures; {first['train']} of them are stamps, whose labels probes and "
        f"fine-tuning learn from; {first['val']} stamps are held out, drawn anew by every seed. In brackets: the 95 % "
        "interval (Wilson) of that many pictures. Differences: paired by seed, mean ± half of the 95 % t-interval. "
        "s: processor seconds.",
    ]
    if gaps:
        largest = max(gaps)
        said.append(f"Features of the exports in timm and transformers differ by at most {largest:.0e} of the largest.")
    return said
