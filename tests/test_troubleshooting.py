"""docs/troubleshooting.md: every message that it quotes is in the code."""

from __future__ import annotations

import ast
import re

import pytest
from pages import ROOT, text

PAGE = re.sub(r"\s+", " ", text("docs/troubleshooting.md"))
QUOTED = re.findall(r"\*\*`([^`]+)`\*\*", PAGE)
OF_TORCH = {"CUDA out of memory"}


def literals() -> str:
    """All strings of the package, values of f-strings and % formats as …, one a line."""
    found = []
    for path in (ROOT / "fastkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return "\n".join(found)


CODE = literals()


def pieces(message: str) -> list[str]:
    """The parts of a message that stand in the code as they are: no values, and none of `problem`'s own words."""
    message = re.sub(r"^--\S+: ", "", message)
    parts = re.split(r"…|\bgot 95\.0|, expected |; |: got |^got ", message)
    return [part.strip(" .") for part in parts if len(part.strip(" .")) > 3]


@pytest.mark.parametrize("message", [message for message in QUOTED if message not in OF_TORCH])
def test_a_quoted_message_is_in_the_code(message):
    assert pieces(message), message
    missing = [piece for piece in pieces(message) if piece not in CODE]
    assert not missing


def test_the_likely_messages_are_there():
    assert len(QUOTED) >= 30
