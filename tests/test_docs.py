"""The documentation is true: its code runs, its commands parse, its links, files and options exist."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from page_setup import prepare
from pages import OPTION, PAGES, ROOT, SHELLS, anchors, blocks, commands, fastkd_arguments, links, options_of, text

from fastkd import cli, options
from fastkd.train import ConfigError

# Blocks that cannot run here, by page. A new one is a decision: the number is changed by hand.
NOT_RUN: dict[str, int] = {}
# Pages whose blocks another test runs, against what they replace.
ELSEWHERE = {"docs/losses.md": "test_losses_page.py"}
# Commands that run between the blocks of a page, as `page_setup` makes them: small and short.
RUN = {"README.md": ("distill", "export"), "docs/quickstart.md": ("distill", "export")}
WITH_PYTHON = [page for page in PAGES if page not in ELSEWHERE and any(b.language == "python" for b in blocks(page))]
NOT_HERE = re.compile("existing|a checkpoint or run")  # what is said of files of the pages, which are not here


def fastkd(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code or 0


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    names = prepare(page, tmp_path, monkeypatch)
    ran = 0
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "python":
            exec(compile("\n" * int(block.place.split(":")[1]) + block.code, page, "exec"), names)
            ran += 1
        elif block.language in SHELLS:
            for arguments in filter(None, map(fastkd_arguments, commands(block))):
                if arguments[0] in RUN.get(page, ()):
                    assert fastkd(arguments) == 0, (block.place, arguments)
    assert ran or all(block.not_run for block in blocks(page, "python"))


def test_what_does_not_run_is_counted():
    found = {page: sum(block.not_run is not None for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


class Parsed(Exception):
    """Ends a command where its options are known."""


@pytest.fixture
def problems(monkeypatch):
    """What the command line has against some arguments."""
    found: list[str] = []

    def stop(target, arguments):
        try:
            options.parse(target, arguments)
        except ConfigError as error:
            found.extend(error.problems)
        raise Parsed

    def problems(arguments: list[str]) -> list[str]:
        with pytest.raises((Parsed, ConfigError)) as stopped:
            cli.COMMANDS[arguments[0]](arguments[1:])
        return found + getattr(stopped.value, "problems", [])

    monkeypatch.setattr(cli, "parse", stop)
    return problems


ARGUMENTS = [
    (block.place, arguments)
    for page in PAGES
    for block in blocks(page, *SHELLS)
    for arguments in map(fastkd_arguments, commands(block))
    if arguments
]


@pytest.mark.parametrize("place, arguments", ARGUMENTS, ids=[f"{place} {a[0]}" for place, a in ARGUMENTS])
def test_commands_are_understood(place, arguments, problems):
    if arguments[0] in ("bench", "recipes") or arguments == ["demo", "--list"]:
        return
    silent = NOT_HERE if "..." not in arguments else re.compile(f"{NOT_HERE.pattern}|: missing, expected")
    wrong = problems([word for word in arguments if word != "..."])
    assert not [line for line in wrong if not silent.search(line)], place


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(there.resolve().relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Paths that begin with a folder of this repository, in sentences and in commands."""
    folders = "fastkd|tests|docs|benchmarks|examples|csrc"
    for path in re.findall(rf"(?<=[`\s(])((?:{folders})/[\w./*-]*\w)", text(page)):
        assert any(ROOT.glob(path)), f"{page}: {path}"


# Options of other programs that the pages name.
FOREIGN = dict(
    pytest="--dist",
    torchrun="--nnodes --nproc-per-node --rdzv-id --rdzv-backend --rdzv-endpoint --no-python --max-restarts "
    "--shutdown-timeout",
    srun="--kill-on-bad-exit --signal",
)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every option in the help of every command, method, demo and benchmark."""
    from fastkd.demos import DEMOS
    from fastkd.train.configs import METHODS

    asked = [[name] for name in cli.COMMANDS if name not in ("demo", "bench")]
    asked += [["distill", "--method", name] for name in METHODS] + [["demo", name] for name in DEMOS]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for arguments in asked:
            assert fastkd([*arguments, "--help"]) == 0
    scripts = "".join(path.read_text() for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("fastkd/demos/*.py")])
    return set(OPTION.findall(" ".join([shown.getvalue(), scripts, *FOREIGN.values()])))


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page, known):
    unknown = options_of(page) - known
    assert not unknown
