"""Figures of the pipeline demo: scores of all students, and which patches each of them holds to be alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: a caller's own plotting back-end stays as it is
from torch import Tensor

from fastkd.train.plots import likeness

from .compare import values_of
from .pipeline_report import ARMS, METRICS, Row, held_out_interval

COLORS = ("#8a8a8a", "#d1782c", "#1b6ca8", "#12507f", "#303030", "#606060")  # in the order of the arms


def scores(rows: Sequence[Row], path: Path) -> None:
    """A panel per judge: the mean of each arm with the interval that the number of pictures leaves open, and a dot per
    seed; as a PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, (metric, heading) in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS.items()):
        for place, (arm, color) in enumerate(zip(ARMS, COLORS)):
            values = values_of(rows, arm, metric)
            if not values:
                continue
            mean, (low, high) = sum(values) / len(values), held_out_interval(values, rows)
            reach = [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]
            axis.barh(place, 100 * mean, color=color, xerr=reach, capsize=3, alpha=0.85)
            axis.plot([100 * value for value in values], [place] * len(values), "o", color="white", markersize=3,
                      markeredgecolor="black", markeredgewidth=0.6)  # fmt: skip
        axis.set(title=heading, xlim=(0, 100))
        axis.set_yticks(range(len(ARMS)), ARMS)
        axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def similarity(features: Mapping[str, Tensor], grid: tuple[int, int], names: Sequence[str], path: Path) -> None:
    """Per picture and model the likeness of each patch to the central one, as a PNG.

    Args:
        features: of each model, [N, L, D] of the patches in raster order.
        grid: (rows, columns) of patches, L in all.
        names: of the N pictures; the pictures themselves do not appear, so the figure can be passed on without them.
    """
    figure = Figure(figsize=(1.5 * len(features) + 1.2, 1.4 * len(names) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)  # else the names' edges are cut off
    axes = figure.subplots(len(names), len(features), squeeze=False)
    marked = (grid[0] // 2) * grid[1] + grid[1] // 2
    for column, (model, tokens) in enumerate(features.items()):
        for row, values in enumerate(likeness(tokens, marked)):
            axis = axes[row, column]
            shown = axis.imshow(values.view(grid).cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(model, fontsize=9)
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.7, aspect=30, label="cosine to the central patch")
    figure.savefig(path, dpi=110)
