"""The plot of the step benchmark, from its rows alone."""

from __future__ import annotations

import textwrap
from pathlib import Path


def plot(rows: list[dict], path: Path, description: str = "") -> None:
    """Images per second over the mask ratio, one line a mode, one panel a dtype; `description` goes into the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 3.8), squeeze=False)
    for panel, dtype in zip(panels[0], dtypes):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = sorted((r for r in rows if r["mode"] == mode and r["dtype"] == dtype), key=lambda r: r["mask_ratio"])
            if not mine:
                continue
            ratios = [100 * r["mask_ratio"] for r in mine]
            middle = [r["images_per_second"] for r in mine]
            quartile = list(zip(*(r["images_per_second_quartiles"] for r in mine)))
            style = dict(
                marker="o", linewidth=2.5 if mode == "exact" else 1.3, linestyle="-" if mine[0]["exact"] else "--"
            )
            (line,) = panel.plot(ratios, middle, label=mode if mine[0]["exact"] else f"{mode} (not exact)", **style)
            panel.fill_between(ratios, *quartile, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(title=dtype, xlabel="masked patches, %", ylabel="images/s, whole training step", ylim=(0, None))
        panel.grid(alpha=0.3)
    first = rows[0]
    title = f"{first['teacher']} -> {first['student']}, batch {first['batch']}, {first['device']}"
    figure.suptitle(textwrap.fill(title, 75 * len(dtypes)), fontsize=9)
    # Below the panels, where it hides no line; the first panel has every mode.
    handles, labels = panels[0][0].get_legend_handles_labels()
    columns = min(len(labels), 3 * len(dtypes))
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07 * -(-len(labels) // columns), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Description": description})
    plt.close(figure)
