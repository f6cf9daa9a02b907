"""The pages of the documentation, read: blocks of code, commands, links and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
SHELLS = ("bash", "console")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        place: page and line, for messages.
        not_run: why it cannot run in the suite, as ``<!-- not run: WHY -->`` above it says; else None.
    """

    place: str
    language: str
    code: str
    not_run: str | None


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in some languages, default all."""
    whole, found = text(page), []
    for match in FENCE.finditer(whole):
        line = whole.count("\n", 0, match.start("code"))
        block = Block(f"{page}:{line}", match["language"], match["code"], match["why"])
        if not languages or block.language in languages:
            found.append(block)
    return found


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S)


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block in words; comments and line continuations are gone, ``&&`` separates."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    found: list[list[str]] = []
    for line in words:
        found.append([])
        for word in line:
            if word == "&&":
                found.append([])
            else:
                found[-1].append(word)
    return [command for command in found if command]


def fastkd_arguments(command: list[str]) -> list[str] | None:
    """What fastkd gets of a command, also behind torchrun or srun; None where another program runs."""
    for index, word in enumerate(command):
        if word == "fastkd" and (index == 0 or command[0] not in ("pip", "python") or command[index - 1] == "-m"):
            return command[index + 1 :]
    return None


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as the forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def links(page: str) -> list[str]:
    """Targets of a page's links that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"\w+:", target)]


def options_of(page: str) -> set[str]:
    """Everything on a page that looks like a command-line option, but for comments and SLURM's."""
    return set(OPTION.findall(re.sub(r"<!--.*?-->|^#SBATCH .*?$", "", text(page), flags=re.S | re.M)))
