"""From the words of a command line, and a YAML file of the same keys, to a dataclass of options.

tyro turns words into values. What it stops at, one mistake at a time, is looked into here option by option, so that all
of them are reported at once, unknown names with the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import re
import typing
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro
import yaml

from fastkd.help import documented, metavar
from fastkd.train.config import FACTS, ConfigError, problem

Options = TypeVar("Options")
RECIPES = resources.files("fastkd") / "recipes"
_PLACEHOLDERS = {Path: Path("."), str: "?"}  # for required options that are missing, so that others can be checked


class Given(NamedTuple):
    """An option as it was given: its words, and the file that it comes from (None: the command line)."""

    words: tuple[str, ...]
    file: str | None = None


def parse(target: type[Options], arguments: list[str]) -> Options:
    """The options that the arguments stand for; ``--config FILE`` is read first, other options win over it.

    Raises:
        ConfigError: every mistake, one line each. Where the class has `problems()`, those are among them.
    """
    file, words = split_config(arguments)
    given = {name: Given(_words(value), file) for name, value in read_config(file).items()} if file else {}
    positional, named, stray = _split(target, words)
    given |= named
    wrong = [f"{word}: belongs to no option; options begin with --" for word in stray]
    values: dict[str, Any] = {}
    for name, (found, source) in given.items():
        field = name.replace("-", "_")
        if field not in _fields(target):
            wrong.append(_unknown(name, target, source))
            continue
        try:
            values[field] = _value(target, field, found)
        except ValueError as error:
            place = f" (in {source})" if source else ""
            wrong.append(f"--{name.replace('_', '-')}{place}: got {' '.join(found) or 'nothing'}, expected {error}")
    for name, word in positional.items():
        try:
            values[name] = _value(target, name, (word,))
        except ValueError as error:
            wrong.append(f"{name.upper()}: got {word}, expected {error}")
    missing = [field for name, field in _fields(target).items() if _required(field) and name not in values]
    bad = {line.split(":")[0].split(" ")[0] for line in wrong}
    for field in missing:
        name = field.name.upper() if _is_positional(target, field.name) else f"--{field.name.replace('_', '-')}"
        if name not in bad:
            what = re.split(r"[.:,;]", documented(target).get(field.name, ""))[0]
            wrong.append(f"{name}: missing, expected {metavar(_hints(target)[field.name])}: {what}")
    stand_ins = {field.name: _PLACEHOLDERS.get(_hints(target)[field.name]) for field in missing}
    options = target(**stand_ins, **values)
    if hasattr(options, "problems"):
        unsaid = [f"--{name.replace('_', '-')}:" for name in stand_ins]
        wrong += [line for line in options.problems() if not line.startswith(tuple(unsaid))]
    if wrong:
        raise ConfigError(wrong)
    return options


def split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """What ``--config`` names, None without it, and the other arguments. ConfigError where it is given twice."""
    files, rest = [], []
    words = iter(arguments)
    for word in words:
        name, given, value = word.partition("=")
        if name == "--config":
            files.append(value if given else next(words, ""))
        else:
            rest.append(word)
    if len(files) > 1:
        raise ConfigError([f"--config: got {' and '.join(files)}, expected one file"])
    return (files[0] if files else None), rest


def read_config(source: str) -> dict[str, Any]:
    """The options in a YAML file, or in a recipe of that name that comes with fastkd.

    The section `run` of a run's own config.yaml is left out. ConfigError where it cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            text = path.read_text()
        elif source in recipe_names():
            text = (RECIPES / f"{source}.yaml").read_text()
        else:
            near = difflib.get_close_matches(source, recipe_names(), 1, 0.4)
            fix = f"did you mean {near[0]}?" if near else "fastkd recipes lists the recipes"
            raise ConfigError([problem("config", source or "nothing", "a YAML file or the name of a recipe", fix)])
        content = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"--config: {source} cannot be read: {' '.join(str(error).split())}"]) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError([problem("config", source, "lines of the form 'option: value'")])
    return {name.replace("-", "_"): value for name, value in content.items() if name != FACTS}


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with fastkd."""
    return tuple(sorted(Path(file.name).stem for file in RECIPES.iterdir() if file.name.endswith(".yaml")))


def _words(value: Any) -> tuple[str, ...]:
    """A value of a YAML file as the words that a command line would have."""
    if isinstance(value, dict):
        return tuple(word for pair in value.items() for word in map(str, pair))
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return (str(value),)


def _split(target: type, words: Iterable[str]) -> tuple[dict[str, str], dict[str, Given], list[str]]:
    """(positional arguments, options, words that belong to neither)."""
    places = [name for name in _fields(target) if _is_positional(target, name)]
    positional: dict[str, str] = {}
    named: dict[str, Given] = {}
    stray: list[str] = []
    current = None
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            field = name.replace("-", "_")
            if field.startswith("no_") and field not in _fields(target) and field[3:] in _fields(target):
                current, first = field[3:], ("False",)
            else:
                current, first = field, (value,) if given else ()
            named[current] = Given(first)
        elif current is not None and _takes_more(target, current, named[current].words):
            named[current] = Given((*named[current].words, word))
        elif len(positional) < len(places):
            positional[places[len(positional)]] = word
        else:
            stray.append(word)
    flags = (n for n, (found, _) in named.items() if not found and _hints(target).get(n) is bool)
    return positional, named | {name: Given(("True",)) for name in flags}, stray


def _takes_more(target: type, name: str, words: tuple[str, ...]) -> bool:
    hint = _hints(target).get(name)
    if hint is bool:
        return False
    many = hint is None or any(typing.get_origin(part) in (tuple, dict) for part in (hint, *typing.get_args(hint)))
    return many or not words


def _value(target: type, name: str, words: tuple[str, ...]) -> Any:
    """The value that tyro makes of the words of one option; ValueError that says what was expected."""
    hint = _hints(target)[name]
    if hint is bool:
        if words[:1] in (("True",), ("true",)) and len(words) == 1:
            return True
        if words[:1] in (("False",), ("false",)) and len(words) == 1:
            return False
        raise ValueError("true or false")
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    one = dataclasses.make_dataclass("One", [("value", hint)], kw_only=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the caller says it, with all other mistakes
            return tyro.cli(one, args=["--value", *words]).value
    except SystemExit as error:
        raise ValueError(metavar(hint)) from error


def _unknown(name: str, target: type, source: str | None) -> str:
    shown = f"--{name.replace('_', '-')}"
    near = difflib.get_close_matches(name.replace("-", "_"), _fields(target), 1)
    place = f" (in {source})" if source else ""
    fix = f"did you mean --{near[0].replace('_', '-')}?" if near else "--help lists the options"
    return f"{shown}{place}: unknown option; {fix}"


@functools.cache
def _fields(target: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(target)}


@functools.cache
def _hints(target: type) -> dict[str, Any]:
    return typing.get_type_hints(target, include_extras=True)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_positional(target: type, name: str) -> bool:
    hint = _hints(target)[name]
    return typing.get_origin(hint) is typing.Annotated and tyro.conf.Positional in hint.__metadata__
