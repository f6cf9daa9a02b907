"""The API reference is up to date, and docstrings say what a caller needs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing

import pytest
from pages import ROOT

spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in reference.packages()
    for name in module.__all__
    if callable(getattr(module, name))
}
BY_NAME = {name.rpartition(".")[2]: thing for name, thing in PUBLIC.items()}


def docstring(thing: object) -> str:
    return reference.own_doc(thing) if inspect.isclass(thing) else inspect.getdoc(thing) or ""


def told(thing: object, seen: frozenset[str] = frozenset()) -> str:
    """A docstring with those of the public names that it refers to in backticks."""
    text = docstring(thing)
    names = set(re.findall(r"`(?:fastkd\.\w+\.)?(\w+)`", text)) & BY_NAME.keys() - seen
    return text + "".join(told(BY_NAME[name], seen | names) for name in sorted(names))


def test_the_reference_is_up_to_date():
    assert not reference.stale(), "run: python docs/reference.py"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_every_argument(name):
    thing = PUBLIC[name]
    text = told(thing)
    assert docstring(thing), f"{name} has no docstring"
    if typing.is_typeddict(thing) or inspect.isclass(thing) and issubclass(thing, Exception):
        return
    if hasattr(thing, "problems"):
        return  # options of a run have texts of their own, which --help shows
    parameters = inspect.signature(thing).parameters.values()
    wanted = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [argument for argument in wanted if not re.search(rf"\b{argument}\b", text)]
    assert not missing, f"{name} does not say what {', '.join(missing)} is"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("fastkd.ops.")])
def test_ops_say_what_comes_out(name):
    thing = PUBLIC[name]
    if not inspect.isclass(thing) and "Tensor" in str(inspect.signature(thing).return_annotation):
        assert re.search(r"^Returns:$|\[[\w, ]*\]|0-d|scalar|result like", told(thing), re.MULTILINE), name
