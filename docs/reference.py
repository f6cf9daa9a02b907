"""Writes the API reference, docs/reference/*.md, from `__all__`, signatures and docstrings.

    python docs/reference.py             # writes what changed
    python docs/reference.py --check     # exit code 1 where a page is not up to date

Plain Markdown that any forge shows, in 200 lines, instead of a site generator to install, configure and host.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastkd.help import documented

PACKAGES = ("fastkd", "fastkd.ops", "fastkd.nn", "fastkd.models", "fastkd.methods", "fastkd.data", "fastkd.train",
            "fastkd.evaluation")  # fmt: skip
FOLDER = Path(__file__).parent / "reference"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
ITEM = re.compile(r"^(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (.*)$")
WIDTH = 110
NAMELESS = re.compile(r"<function <lambda> at \w+>")  # a default that does nothing
OF_EVERY_MODULE = ("train", "extra_repr")  # what torch.nn.Module has, too


def pages() -> dict[Path, str]:
    """Every file of the reference with its text."""
    found = packages()
    listing = [f"- [`{m.__name__}`]({_file(m)}): {_first_line(m)}" for m in found]
    head = "# API reference\n\nMade from the docstrings by `python docs/reference.py`.\n\n"
    index = {FOLDER / "README.md": head + "\n".join(listing) + "\n"}
    return {**index, **{FOLDER / _file(m): page(m) for m in found}}


def packages() -> list[ModuleType]:
    """The packages that say what of them is public."""
    found = [importlib.import_module(name) for name in PACKAGES]
    return [module for module in found if hasattr(module, "__all__")]


def page(module: ModuleType) -> str:
    """One package: what it is for, and all its public names."""
    names = sorted(module.__all__, key=lambda name: (name.lower(), name))
    parts = [f"# {module.__name__}", inspect.getdoc(module), " · ".join(f"[{n}](#{n.lower()})" for n in names)]
    for name in names:
        parts += [f"## {name}", *entry(name, getattr(module, name))]
    return "\n\n".join(part for part in parts if part) + "\n"


def entry(name: str, thing: object) -> Iterator[str]:
    """The Markdown parts of one public name."""
    if not callable(thing):
        yield constant(thing)
    elif dataclasses.is_dataclass(thing) and hasattr(thing, "problems"):  # options: a table says more
        yield markdown(inspect.getdoc(thing))
        yield options(thing)
    else:
        yield signature(name, thing)
        yield markdown(inspect.getdoc(thing) if not inspect.isclass(thing) else own_doc(thing))
        if inspect.isclass(thing):
            yield from members(thing)


def own_doc(thing: type) -> str:
    """The docstring that a class has itself; NamedTuples and dataclasses make one up where there is none."""
    return inspect.cleandoc(thing.__dict__.get("__doc__") or "")


def members(thing: type) -> Iterator[str]:
    """Public methods and properties that a class defines itself and documents."""
    for name, member in thing.__dict__.items():
        if (name.startswith("_") and name != "__call__") or name in OF_EVERY_MODULE or not member.__doc__:
            continue
        if isinstance(member, property):
            yield f"### {thing.__name__}.{name}"
            yield markdown(inspect.cleandoc(member.__doc__))
        elif isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
            yield f"### {thing.__name__}.{name}"
            yield signature(name, getattr(thing, name), bound=inspect.isfunction(member))
            yield markdown(inspect.getdoc(member))


class _Bare(str):
    """An annotation as it is written in the source, without quotes."""

    __repr__ = str.__str__


def signature(name: str, thing: object, bound: bool = False) -> str:
    """The call, on one line or one line a parameter."""
    if typing.is_typeddict(thing) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return ""
    found = inspect.signature(thing)
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in list(found.parameters.values())[int(bound) :]]
    result = found.return_annotation if not inspect.isclass(thing) else inspect.Signature.empty
    whole = inspect.Signature(parameters, return_annotation=_bare(result))
    line = NAMELESS.sub("...", f"{name}{whole}")
    if len(line) > WIDTH:
        end = str(whole).rpartition(") -> ")[2] if whole.return_annotation is not inspect.Signature.empty else ""
        line = f"{name}(\n{''.join(f'    {word},{chr(10)}' for word in _words(parameters))})"
        line += f" -> {end}" if end else ""
    return f"```text\n{line}\n```"


def _bare(annotation):
    annotation = getattr(annotation, "__forward_arg__", annotation)  # of a NamedTuple
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _words(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """Parameters as in a signature, with the marks / and * between them."""
    before = None
    for parameter in parameters:
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if keyword and before not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL):
            yield "*"
        yield NAMELESS.sub("...", str(parameter))
        before = parameter.kind


def markdown(text: str | None) -> str:
    """A docstring in Google style as Markdown: sections get bold heads, their items become lists."""
    lines, done = (text or "").splitlines(), []
    while lines:
        line = lines.pop(0)
        if not SECTION.match(line):
            done.append(line)
            continue
        body = []
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        done += [f"**{line[:-1]}**", "", *_items(textwrap.dedent("\n".join(body)).strip().splitlines()), ""]
    return "\n".join(done).strip()


def _items(lines: list[str]) -> Iterator[str]:
    for line in lines:
        match = ITEM.match(line)
        if match:
            yield f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: {match[2]}"
        else:
            yield f"  {line}" if line.startswith(" ") else line


def options(config: type) -> str:
    """The fields of a config: names, defaults and the texts below them, which are also those of ``--help``."""
    rows = ["| field | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "required" if required else f"`{field.default!r}`"
        text = documented(config)[field.name].replace("|", "\\|")
        rows.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(rows)


def constant(thing: object) -> str:
    """A value that is no function or class: what it holds."""
    if isinstance(thing, dict):
        kinds = {type(value).__name__ for value in thing.values()}
        return f"A dict of {len(thing)} `{'`, `'.join(sorted(kinds))}` by name."
    values = sorted(thing) if isinstance(thing, (set, frozenset)) else thing
    return ", ".join(f"`{value}`" for value in ([values] if isinstance(values, str) else values))


def _file(module: ModuleType) -> str:
    return f"{module.__name__.removeprefix('fastkd.')}.md"


def _first_line(module: ModuleType) -> str:
    return inspect.getdoc(module).split("\n\n")[0].replace("\n", " ")


def stale() -> list[Path]:
    """Pages that are not what they should be, or should not be."""
    wanted = pages()
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return wrong + [path for path in FOLDER.glob("*.md") if path not in wanted]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        for path in (wrong := stale()):
            print(f"{path}: not up to date; run: python docs/reference.py")
        return int(bool(wrong))
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for path in stale():
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
