"""Turns committed rows (benchmarks/results/*.jsonl) into the tables and plots of README.md and docs/.

    python benchmarks/report.py            # rewrites what is out of date
    python benchmarks/report.py --check    # fails where something is out of date, changes nothing

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; `TABLES` lists the names. docs/ops.md is written
whole, from the OpSpecs; fastkd/ops/device_record.json from what ran on a GPU. No number there is typed by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import changes
import common
import data_tables
import device_record
import floors
import method_tables
import ops_page
import reproduce_table
import teacher_tables
from common import ROOT, read_rows
from tables import markdown, number, rows_of, short, times

PAGES = ("README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))))
MARKER = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def conditions(rows: list[dict]) -> str:
    """One line on what was measured, where and when."""
    row = rows[0]
    compiled = next((f"; compiled: {r['compile']}" for r in rows if "compile" in r), "")
    roofs = {short(r["dtype"]): f"{number(r['roof_tflops'])} TFLOP/s {short(r['dtype'])}" for r in rows}
    parts = [
        f"{row['teacher']} -> {row['student']}, decoder {row['decoder']}, batch {row['batch']}, {row['rounds']} rounds",
        f"{row['device']}, {row['threads']} threads" if row["device_type"] == "cpu" else row["device"],
        f"matmul roof {', '.join(roofs.values())}{compiled}",
        f"torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, {row['date']}",
    ]
    return f"<sub>{'; '.join(parts)}</sub>"


def find(rows: list[dict], mode: str, ratio: float, dtype: str) -> dict | None:
    return next((r for r in rows if (r["mode"], r["mask_ratio"], r["dtype"]) == (mode, ratio, dtype)), None)


def ratios_of(rows: list[dict]) -> list[float]:
    return sorted({r["mask_ratio"] for r in rows})


def headline(rows: list[dict]) -> str:
    """How many times faster the exact step is, per mask ratio."""
    dtype = "bfloat16" if any(r["dtype"] == "bfloat16" for r in rows) else rows[0]["dtype"]
    lines = []
    for text, mode, key in (
        (f"images/s, fastkd exact, {short(dtype)}", "exact", "images_per_second"),
        (f"against the published recipe in {short(dtype)}", "exact", "speedup_vs_released"),
        ("against the published recipe in fp32", "exact", "speedup_vs_released_float32"),
        ("against torch.compile of the same savings", "exact", "speedup_vs_compiled"),
        ("with a quarter of the masked patches decoded *", "decode_25", "speedup_vs_released"),
    ):
        if key == "speedup_vs_released_float32" and dtype == "float32":
            continue
        found = [find(rows, mode, ratio, dtype) for ratio in ratios_of(rows)]
        values = [row and row.get(key) for row in found]
        if any(values):
            show = number if key == "images_per_second" else times
            lines.append([text, *map(show, values)])
    table = markdown(["masked patches", *(f"{r:.0%}" for r in ratios_of(rows))], lines)
    note = f"<sub>\\* against the published recipe in {short(dtype)}; not the same loss, the other lines are.</sub>"
    return f"{table}\n\n{conditions(rows)}<br>\n{note}"


def step_table(rows: list[dict]) -> str:
    """Every mode: images/s and ratios, one line per mask ratio and mode."""
    lines = []
    for row in sorted(rows, key=lambda r: (r["mask_ratio"], list({r["dtype"]: 0 for r in rows}).index(r["dtype"]))):
        low, high = row["images_per_second_quartiles"]
        name = row["mode"] if row["exact"] else f"{row['mode']} *"
        lines.append([
            f"{row['mask_ratio']:.0%}", f"**{name}**" if row["mode"] == "exact" else name, short(row["dtype"]),
            number(row["images_per_second"]), f"{number(low)} - {number(high)}",
            *(times(row[f"speedup_vs_{other}"]) for other in ("released", "eager", "compiled", "released_float32")),
            f"{100 * row['roof_fraction']:.0f} %", number(row["peak_memory_bytes"] / 1e6, 4),
        ])  # fmt: skip
    columns = [
        "masked",
        "mode",
        "dtype",
        "img/s",
        "quartiles",
        "released",
        "eager",
        "compiled",
        "released fp32",
        "roof",
        "MB",
    ]
    return f"{markdown(columns, lines, 3)}\n\n{conditions(rows)}"


def stage_table(rows: list[dict]) -> str:
    """Milliseconds per stage and mode."""
    stages = ("data", "teacher", "student", "decoder", "loss", "optimiser")
    lines = []
    for row in sorted((r for r in rows if r["stage_seconds"]), key=lambda r: (r["mask_ratio"], r["dtype"])):
        seconds = [row["stage_seconds"][stage] for stage in stages]
        share = [f"{1e3 * s:.3g}" for s in seconds]
        lines.append(
            [f"{row['mask_ratio']:.0%}", row["mode"], short(row["dtype"]), *share, f"{1e3 * sum(seconds):.4g}"]
        )
    return markdown(["masked", "mode", "dtype", *(f"{s} ms" for s in stages), "step ms"], lines, 3)


def compact_table(rows: list[dict]) -> str:
    """Images/s of each mode side by side, one line per mask ratio and dtype."""
    lines, modes = [], ("released", "eager", "compiled", "exact", "decode_25", "cross")
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    for ratio in ratios_of(rows):
        for dtype in dtypes:
            found = {m: find(rows, m, ratio, dtype) for m in modes}
            exact = found["exact"]
            if exact is None:
                continue
            speed = [number(r["images_per_second"]) if r else "-" for r in found.values()]
            speed[3] = f"**{speed[3]}**"
            lines.append([
                f"{ratio:.0%}", short(dtype), *speed, times(exact["speedup_vs_released"]),
                times(exact["speedup_vs_compiled"]), times(exact["speedup_vs_released_float32"]),
                f"{100 * exact['roof_fraction']:.0f} %",
            ])  # fmt: skip
    columns = ["masked", "dtype", "released", "eager", "compiled", "**exact**", "decode_25 *", "cross *"]
    columns += ["exact / released", "exact / compiled", "exact / released fp32", "exact, of matmul roof"]
    note = "<sub>images/s; \\* not exact: a quarter of the masked patches decoded, or a cross-attention decoder</sub>"
    return f"{markdown(columns, lines, 2)}\n\n{note}<br>\n{conditions(rows)}"


def gpu_rows() -> list[dict]:
    """Rows of the runs on a GPU; where a ratio was also run with `compiled`, that run counts."""
    rows = rows_of("dmae_throughput_cuda")
    for path in sorted(common.RESULTS.glob("dmae_throughput_cuda_*.jsonl")):
        more = read_rows(path)
        replaced = {(r["mode"], r["mask_ratio"], r["dtype"]) for r in more}
        rows = [r for r in rows if (r["mode"], r["mask_ratio"], r["dtype"]) not in replaced] + more
    return rows


def gpu_table() -> str:
    rows = gpu_rows()
    return compact_table(rows) if rows else "Nothing has been measured on a GPU yet."


def demo_table() -> str | None:
    """Held-out accuracy in the demo's full run, mean over seeds."""
    shown = ("teacher", "untrained", "MAE", "DMAE")  # the options are in docs/demo_dmae.md
    rows = [r for r in rows_of("demo_dmae") if r.get("name") in shown]
    if not rows:
        return None
    lines = []
    for name, ratio in dict.fromkeys((r["name"], r["ratio"]) for r in rows):
        mine = [r for r in rows if (r["name"], r["ratio"]) == (name, ratio)]
        cells = []
        for key in ("knn", "linear"):
            values = [100 * r[key] for r in mine]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append([f"{ratio:.0%}" if ratio else "", name, *cells, str(len(mine))])
    return markdown(["masked", "", "kNN, %", "linear probe, %", "seeds"], lines, 2)


def if_measured(render: Callable[[list[dict]], str], name: str = "dmae_throughput_cpu") -> Callable[[], str | None]:
    return lambda: render(rows) if (rows := rows_of(name)) else None


TABLES: dict[str, Callable[[], str | None]] = {
    "headline": if_measured(headline),
    "dmae_cpu": if_measured(compact_table),
    "dmae_cpu_all": if_measured(step_table),
    "dmae_cpu_stages": if_measured(stage_table),
    "gpu": gpu_table,
    "demo": demo_table,
    "loaders": data_tables.loader_table,
    "masks_per_image": data_tables.masks_table,
    "changes": changes.table,
    "floors": floors.floor_table,
    "scale": floors.scale_table,
    "reproduce": reproduce_table.table,
    "teacher_precision": teacher_tables.precision,
    "teacher_learning": teacher_tables.learning,
    "teacher_speed": teacher_tables.speed,
    **method_tables.tables(),
}


def filled(text: str, page: str) -> str:
    """The page with every table up to date; a table without committed rows stays as it is."""

    def replace(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"{page}: unknown table {name!r}, expected one of {', '.join(TABLES)}")
        table = TABLES[name]()
        return match[0] if table is None else f"{match[1]}{table}\n{match[3]}"

    return MARKER.sub(replace, text)


def digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def plots() -> dict[Path, list[dict]]:
    found = {
        ROOT / "docs/dmae_throughput.png": rows_of("dmae_throughput_cpu"),
        ROOT / "docs/dmae_throughput_gpu.png": gpu_rows(),
    }
    return {path: rows for path, rows in found.items() if rows}


def drawn_from(path: Path) -> str | None:
    """The digest of the rows that a plot was drawn from."""
    if not path.exists():
        return None
    from PIL import Image

    return Image.open(path).info.get("Description")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where something is out of date")
    args = parser.parse_args(argv)
    stale = []
    pages = {ROOT / page: filled((ROOT / page).read_text(), page) for page in PAGES if (ROOT / page).exists()}
    pages[ROOT / "docs/ops.md"] = ops_page.page()  # replaces whatever the loop above made of it
    if (text := device_record.text()) is not None:
        pages[device_record.PATH] = text
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    for path, rows in plots().items():
        if drawn_from(path) != digest(rows):
            stale.append(path)
            if not args.check:
                from plots import plot

                plot(rows, path, digest(rows))
    for path in stale:
        print(f"{'out of date' if args.check else 'written'}: {path.relative_to(ROOT)}")
    if args.check and stale:
        print("run: python benchmarks/report.py", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
