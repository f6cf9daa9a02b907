"""Tables of what the methods do on small data, from the rows of their demos (benchmarks/results/demo_NAME.jsonl)."""

from __future__ import annotations

import json
from typing import NamedTuple

import common
from tables import markdown

from fastkd.demos import pipeline_report
from fastkd.demos.compare import Metric, difference, spread, table_of, values_of


class Method(NamedTuple):
    """A line of the overview.

    Attributes:
        title: name in its paper.
        needs: data and models.
        arm: of the demo, the method itself; control: the strongest arm that has the same data without it.
        paper: what its authors report.
        metric: key of the one that is shown; default the demo's first.
    """

    title: str
    needs: str
    arm: str
    control: str
    paper: str
    metric: str = ""


METHODS = {
    "nkd": Method(
        "NKD", "labels; a classifier of the same classes", "NKD", "CE, teacher's answers",
        "ImageNet, R34 -> R18: 69.90 -> 71.96",
    ),
    "uskd": Method("USKD", "labels; no teacher", "USKD", "CE, smoothed labels", "ImageNet, R18: 69.90 -> 70.79"),
    "scalekd": Method(
        "ScaleKD", "labels; a Swin, ViT or BEiT of the same classes", "ScaleKD", "CE + KL, best T",
        "ImageNet, Swin-L -> R50: 82.03 (+3.39)",
    ),
    "maskalign": Method(
        "MaskAlign", "images; a ViT that was trained with labels or texts", "MaskAlign, attention masks",
        "CE on the teacher's labels",
        "ImageNet fine-tuning, CLIP-B -> ViT-B: 85.4",
    ),
    "mic": Method(
        "MIC", "labels in one domain, images of another", "MIC", "pseudo-labels",
        "GTA -> Cityscapes: 75.9 mIoU (+2.1)",
    ),
    "selfdist": Method(
        "self-distillation", "images; a masked autoencoder", "phase 2", "phase 1, twice as long",
        "better than all its baselines on six data sets (tables not at hand)",
    ),
    "promptkd": Method(
        "PromptKD", "images; two CLIPs, the larger one tuned on a few labels", "PromptKD, all pictures",
        "CE, teacher's, all pictures",
        "base / novel of 11 data sets: 86.96 / 80.73 (from memory)", "mean",
    ),
}  # fmt: skip


def demo(name: str) -> tuple[dict, list[dict]]:
    """Settings and rows of a demo's committed run; both empty where it was not run."""
    path = common.RESULTS / f"demo_{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [{}]
    return lines[0], lines[1:]


def results(name: str) -> str | None:
    """Every arm of a demo: mean, spread, and paired difference to its baseline."""
    settings, rows = demo(name)
    if not rows:
        return None
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    metrics = [Metric(*metric) for metric in settings["metrics"]]
    table = table_of(rows, arms, settings["baseline"], metrics, name)
    plain = ("demo", "quick", "baseline", "metrics")
    said = "; ".join(f"{key}: {_plain(value)}" for key, value in settings.items() if key not in plain)
    note = "Mean ± standard deviation over seeds; paired difference ± half of its 95 % t-interval; processor seconds."
    return f"{markdown(table.columns, table.rows, 1)}\n\n<sub>{note}</sub><br>\n<sub>{said}</sub>"


def overview() -> str | None:
    """All methods: what each needs, its command, our number and its paper's."""
    lines = []
    for name, method in METHODS.items():
        settings, rows = demo(name)
        if not rows:
            continue
        metrics = [Metric(*metric) for metric in settings["metrics"]]
        metric = next(m for m in metrics if method.metric in ("", m.key))
        scale = 100 if metric.percent else 1
        mine, theirs = ([scale * v for v in values_of(rows, arm, metric.key)] for arm in (method.arm, method.control))
        ours = f"{metric.heading}: {spread(mine)}, {difference(mine, theirs)} against {method.control}"
        link = f"[{method.title}](methods/{name}.md)"
        lines.append([link, method.needs, f"`fastkd demo {name}`", ours, method.paper])
    columns = ["method", "needs", "shown by", "on our small data", "in its paper"]
    return markdown(columns, lines, len(columns)) if lines else None


def pipeline() -> str | None:
    """The demo of the whole way: every student, and how to read its scores."""
    _, rows = demo("pipeline")
    if not rows:
        return None
    table, notes = pipeline_report.table(rows), pipeline_report.notes(rows)
    return f"{markdown(table.columns, table.rows, 1)}\n\n<sub>{'<br>'.join(notes)}</sub>"


def tables() -> dict[str, object]:
    """Every table by the name that pages use."""
    return {"methods": overview, "demo_pipeline": pipeline} | {
        f"demo_{name}": (lambda name=name: results(name)) for name in METHODS
    }


def _plain(value: object) -> str:
    if isinstance(value, dict):
        around = "({})" if any(isinstance(item, dict) for item in value.values()) else "{}"
        return ", ".join(f"{key} {around.format(_plain(item))}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(_plain(item) for item in value)
    return str(value)
