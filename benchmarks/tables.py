"""Small pieces of the Markdown pages: committed rows in, cells and tables out."""

from __future__ import annotations

from collections.abc import Sequence

import common


def rows_of(name: str) -> list[dict]:
    """Committed rows of one run; none where it was not run yet."""
    path = common.RESULTS / f"{name}.jsonl"
    return common.read_rows(path) if path.exists() else []


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in [columns, rule, *rows])
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
