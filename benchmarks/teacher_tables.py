"""Tables of what 8-bit products in the teacher cost and gain, from the rows of benchmarks/teacher_precision.py."""

from __future__ import annotations

import statistics

from tables import markdown, rows_of, times


def _place(row: dict) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"<sub>{row['device']}, {threads}; torch {row['torch']}, commit {row['commit']}, {row['date']}</sub>"


def _error(row: dict, key: str) -> str:
    return f"{100 * row[f'{key}_error_vs_float32']:.2g} % ({row[f'{key}_cosine_vs_float32']:.4f})"


def precision() -> str | None:
    """Errors against the float32 teacher, with cosines: tapped feature, gradient of either loss."""
    rows = rows_of("teacher_precision")
    if not rows:
        return None
    lines = []
    for row in rows:
        if row["teacher"] != "float32":
            student = f"after {row['student_steps']} steps" if row["student_steps"] else "untrained"
            cells = [_error(row, key) for key in ("feature", "align_gradient", "gradient")]
            lines.append([row["model"], student, row["teacher"], *cells])
    columns = ["teacher", "student", "products", "tapped feature", "gradient, alignment loss", "gradient, whole loss"]
    return f"{markdown(columns, lines, 3)}\n\n{_place(rows[0])}"


def learning() -> str | None:
    """Held-out accuracy of the demo's students, mean over seeds, and the largest difference within a seed."""
    rows = rows_of("teacher_learning")
    if not rows:
        return None
    lines = []
    for name in dict.fromkeys(row["teacher"] for row in rows):
        cells = []
        for key in ("knn", "linear"):
            mine, exact = (
                {row["seed"]: 100 * row[key] for row in rows if row["teacher"] == who} for who in (name, "bfloat16")
            )
            off = [mine[seed] - exact[seed] for seed in mine]
            span = f" ({min(off):+.2f} to {max(off):+.2f})" if name != "bfloat16" else ""
            cells.append(f"{statistics.mean(mine.values()):.1f}{span}")
        lines.append([name, *cells, str(len(mine))])
    columns = ["products of the teacher", "kNN, % (against bfloat16, same seed)", "linear probe, %", "seeds"]
    return f"{markdown(columns, lines)}\n\n{_place(rows[0])}"


def speed() -> str | None:
    """Exact bfloat16 over int8 on a CPU, per product and for the whole teacher."""
    rows = rows_of("teacher_speed_cpu")
    if not rows:
        return None
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        found = [next(row for row in rows if (row["part"], row["tokens"]) == (part, count)) for count in tokens]
        cells = (f"{times(row['ratio'])} ({' - '.join(map(times, row['ratio_quartiles']))})" for row in found)
        lines.append([part, *cells])
    first = rows[0]
    note = f"<sub>bfloat16 time over int8 time, {first['clock']} time, {first['rounds']} rounds, quartiles</sub><br>"
    columns = ["ViT-L", *(f"{first['images']} images x {count} tokens" for count in tokens)]
    return f"{markdown(columns, lines)}\n\n{note}\n{_place(first)}"
