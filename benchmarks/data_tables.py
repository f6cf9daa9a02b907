"""Tables on the data path: loaders side by side, and several masks per decoded picture."""

from __future__ import annotations

from tables import markdown, number, rows_of, times

NAMES = {
    "pil": "image files, Pillow",
    "tar": ".tar archive, Pillow",
    "packed": "`fastkd pack`",
    "dali": "image files, DALI",
}


def loader_table() -> str | None:
    """Images per second of each loader, CPU and GPU."""
    rows = rows_of("loaders_cpu") + rows_of("loaders_cuda")
    if not rows:
        return None
    lines = []
    for row in rows:
        low, high = row["images_per_second_quartiles"]
        lines.append([
            NAMES[row["loader"]], row["device_type"], str(row["workers"]), number(row["images_per_second"]),
            f"{number(low)} - {number(high)}", times(row["speedup_vs_pil"]),
        ])  # fmt: skip
    row = rows[0]
    place = ", ".join(dict.fromkeys(r["device"] for r in rows))
    note = (
        f"<sub>random-resized crops of {row['side']}, batch {row['batch']}; pictures: {row['pictures']}; packed with "
        f"short side {row['short_side']}; {place}; Pillow {row['pillow']}, DALI {row['dali'] or 'not installed'}, "
        f"commit {row['commit']}, {row['date']}</sub>"
    )
    return f"{markdown(['loader', 'batches on', 'workers', 'img/s', 'quartiles', 'Pillow'], lines, 2)}\n\n{note}"


def masks_table() -> str | None:
    """Held-out accuracy by masks per picture, mean over seeds, with the paired difference to one mask."""
    rows = rows_of("masks_per_image")
    if not rows:
        return None
    from fastkd.demos.report import difference, spread

    lines = []
    for ratio in sorted({r["mask_ratio"] for r in rows}):
        at = {}
        for row in sorted(
            (r for r in rows if r["mask_ratio"] == ratio), key=lambda r: (r["masks_per_image"], r["seed"])
        ):
            at.setdefault(row["masks_per_image"], []).append(row)
        for masks, mine in at.items():
            cells = [f"{ratio:.0%}", str(masks), f"{mine[0]['pictures_decoded']:,}"]
            for key in ("knn", "linear"):
                values, base = ([r[key] for r in some] for some in (mine, at[min(at)]))
                cells += [spread(values), difference(values, base) if masks != min(at) else ""]
            lines.append(cells)
    row, seeds = rows[0], len({r["seed"] for r in rows})
    note = (
        f"<sub>DMAE demo (`docs/demo_dmae.md`), {row['steps']} steps of {row['batch']} views, {seeds} seeds: "
        "mean ± deviation, differences paired by seed ± half of the 95 % t-interval; "
        f"commit {row['commit']}, {row['date']}</sub>"
    )
    columns = ["masked", "masks a view", "decoded", "kNN, %", "- 1 mask", "linear, %", "- 1 mask"]
    return f"{markdown(columns, lines, 1)}\n\n{note}"
