"""What a demo shows: tables on the terminal and in Markdown, statistics over seeds, and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Interval(NamedTuple):
    """Mean of n values, their standard deviation (n - 1) and the half width of the 95 % t-interval of the mean."""

    mean: float
    deviation: float
    half_width: float


def interval(values: Sequence[float]) -> Interval:
    """Statistics of some values; with one value the deviation and the half width are NaN."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t

    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, deviation, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))


def spread(values: Sequence[float]) -> str:
    """``mean ± deviation`` in percent; the mean alone of one value."""
    stats = interval(values)
    return f"{100 * stats.mean:.1f}" + ("" if math.isnan(stats.deviation) else f" ± {100 * stats.deviation:.1f}")


def difference(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Mean of the paired differences in percentage points, ± half of its 95 % t-interval of several pairs."""
    stats = interval([a - b for a, b in zip(values, baseline, strict=True)])
    return f"{100 * stats.mean:+.1f}" + ("" if math.isnan(stats.half_width) else f" ± {100 * stats.half_width:.1f}")


class Table(NamedTuple):
    """A table of strings.

    Attributes:
        title: one line above it.
        columns: headings; the first two columns are text, the others numbers.
        rows: cells; an empty row is a rule.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self):
        """The table for a rich console."""
        from rich import box
        from rich.table import Table as RichTable

        # Without padding, so that seven columns fit 80 characters; names may wrap, numbers may not.
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index > 1 else "left", no_wrap=index != 1)
        for row in self.rows:
            if row:
                table.add_row(*row)
            else:
                table.add_section()
        return table

    def markdown(self) -> str:
        """The table as GitHub Markdown, its title as bold text above."""
        lines = [f"| {' | '.join(self.columns)} |", "|---|---" + "|---:" * (len(self.columns) - 2) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows if row]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


MARKERS = "<!-- results: begin -->", "<!-- results: end -->"
COLORS = {"DMAE": "#1b6ca8", "MAE": "#d1782c"}
LINES = {"untrained": dict(color="#8a8a8a", linestyle="--"), "teacher": dict(color="#303030", linestyle=":")}


def around_markers(path: Path) -> tuple[str, str] | None:
    """What stands before and after the marker lines of a Markdown file; None without such a file or such lines."""
    begin, end = MARKERS
    text = Path(path).read_text() if Path(path).is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        return None
    return text.split(begin)[0], text.split(end)[1]


def write_between_markers(path: Path, text: str) -> None:
    """Replaces what stands between the marker lines of a Markdown file that has them."""
    begin, end = MARKERS
    before, after = around_markers(path)
    Path(path).write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def scores_figure(
    scores: dict[str, dict[str, dict[str, list[float]]]], levels: dict[str, dict[str, list[float]]], path: Path
) -> None:
    """Bars per mask ratio and method with reference lines, one panel per probe, as a PNG.

    Args:
        scores: {probe: {mask ratio: {method: values in [0, 1] over seeds}}}.
        levels: {probe: {"untrained" or "teacher": values}}, drawn as lines.
        path: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(scores), 3.9), layout="constrained")
    for axis, (probe, ratios) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        methods = list(next(iter(ratios.values())))
        width = 0.76 / len(methods)
        for m, method in enumerate(methods):
            stats = [interval(by_method[method]) for by_method in ratios.values()]
            places = [x + (m - (len(methods) - 1) / 2) * width for x in range(len(ratios))]
            errors = [100 * s.deviation for s in stats] if not math.isnan(stats[0].deviation) else None
            bars = axis.bar(places, [100 * s.mean for s in stats], 0.93 * width, color=COLORS[method], label=method,
                            yerr=errors, capsize=3)  # fmt: skip
            axis.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize=9)
        for name, values in levels[probe].items():
            level = 100 * interval(values).mean
            axis.axhline(level, linewidth=1.4, zorder=0.5, label=f"{name} {level:.1f}", **LINES[name])
        axis.set_xticks(range(len(ratios)), list(ratios))
        axis.set_ylim(0, 100)
        axis.set(title=probe, xlabel="masked", ylabel="held-out accuracy, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False,
                    columnspacing=1.2, handlelength=1.8)  # fmt: skip
    figure.savefig(path, dpi=130)


def curves_figure(curves: dict[tuple[str, float], list[tuple[int, float]]], teacher: float, path: Path) -> None:
    """Held-out kNN accuracy over the training steps, one panel per mask ratio, as a PNG.

    Args:
        curves: {(method, mask ratio): [(steps, accuracy in [0, 1])]}.
        teacher: the teacher's accuracy, a line.
        path: file to write.
    """
    from matplotlib.figure import Figure

    ratios = list(dict.fromkeys(ratio for _, ratio in curves))
    figure = Figure(figsize=(4.4 * len(ratios), 3.6), layout="constrained")
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axis, ratio in zip(axes, ratios):
        for (method, own), points in curves.items():
            if own == ratio:
                steps, values = zip(*points)
                axis.plot(steps, [100 * v for v in values], "o-", markersize=4, color=COLORS[method], label=method)
        axis.axhline(100 * teacher, linewidth=1.4, label="teacher", **LINES["teacher"])
        axis.set(title=f"{100 * ratio:g} % masked", xlabel="training steps")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out kNN accuracy, %")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
