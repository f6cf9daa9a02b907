"""What ``--help`` shows: the options of a dataclass in groups, with types, defaults and their docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

WIDTH = 110  # lines that are longer are hard to read


def show(target: type, command: str, file=None) -> None:
    """Prints the help of a command whose options are the fields of a dataclass.

    `GROUPS` of a class, ``{title: names of its fields}``, orders and titles them; what a subclass adds comes first.
    Options without default lead.
    """
    console = Console(file=file or sys.stdout, highlight=False)
    fields = {field.name: field for field in dataclasses.fields(target)}
    hints, texts = typing.get_type_hints(target, include_extras=True), documented(target)
    positional = [name for name in fields if typing.get_origin(hints[name]) is typing.Annotated]
    words = " ".join(name.upper() for name in positional)
    _print(console, f"usage: {' '.join(part for part in (command, words) if part)} [--config FILE] [OPTIONS]\n")
    _print(console, inspect.cleandoc(target.__doc__ or "") + "\n")
    for title, names in grouped(target).items():
        console.print(Text(title, style="bold"))
        for name in names:
            _option(console, name, fields[name], hints[name], texts.get(name, ""))
        console.print()
    _print(
        console,
        "--config FILE reads options from a YAML file with the same names, or a recipe (fastkd recipes lists them); "
        "what stands on the command line wins.",
    )


def grouped(target: type) -> dict[str, list[str]]:
    """Titles and the names of their options, in the order in which they are shown."""
    hidden = getattr(target, "HIDDEN", "").split()  # what a command has no use for, though its class has it
    fields = {field.name: field for field in dataclasses.fields(target) if field.name not in hidden}
    required = [name for name in fields if _default(fields[name]) is dataclasses.MISSING]
    groups, left = {"Required": required} if required else {}, [name for name in fields if name not in required]
    titled = {title: names.split() for base in target.__mro__ for title, names in vars(base).get("GROUPS", {}).items()}
    in_a_group = {name for names in titled.values() for name in names}
    own = [name for name in left if name not in in_a_group]
    if own:
        groups["Options" if not titled else "What learns from what"] = own
    for title, names in titled.items():
        groups[title] = [name for name in names if name in left]
    return {title: names for title, names in groups.items() if names}


def documented(target: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, its bases included."""
    found: dict[str, str] = {}
    for base in reversed(target.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError):  # made at run time
            continue
        for line, after in zip(body, body[1:]):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                    found[line.target.id] = " ".join(after.value.value.split())
    return found


def metavar(hint: Any) -> str:
    """A type as the help shows it: INT, PATH, {a,b}, INT INT, ..."""
    if typing.get_origin(hint) is typing.Annotated:
        return metavar(typing.get_args(hint)[0])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(metavar(part) for part in inner if part is not type(None))
    if origin is tuple:
        return f"{metavar(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(metavar, inner))
    if origin is dict:
        return "NAME VALUE ..."
    names = {int: "INT", float: "NUMBER", Path: "PATH", bool: "true or false", str: "TEXT"}
    return names.get(hint, "TEXT")


def _option(console: Console, name: str, field: dataclasses.Field, hint: Any, text: str) -> None:
    default, flag = _default(field), f"--{name.replace('_', '-')}"
    if typing.get_origin(hint) is typing.Annotated:
        head = name.upper()
    elif hint is bool:
        head = flag if default is False else f"{flag} / --no-{flag[2:]}"
    else:
        head = f"{flag} {metavar(hint)}"
    shown = _shown(default)
    console.print(Text(f"  {head}", style="cyan"), soft_wrap=True)
    body = textwrap.fill(text + (f" [{shown}]" if shown else ""), min(console.width, WIDTH) - 8)
    _print(console, textwrap.indent(body, " " * 8))


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING or default is None or default in ((), {}, False):
        return ""
    if default is True:
        return "on"
    return " ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)


def _print(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
