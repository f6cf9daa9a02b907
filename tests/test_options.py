"""Options: words and YAML become one dataclass, all mistakes are told at once, help shows every field."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Literal

import pytest
import tyro
import yaml
from safetensors.torch import load_file
from test_cli import as_arguments, fastkd
from tiny_run import tiny_config

from fastkd.evaluation.config import EvalConfig
from fastkd.help import grouped, show
from fastkd.options import RECIPES, parse, read_config, recipe_names
from fastkd.train import ConfigError, DistillConfig
from fastkd.train.config import PretrainConfig, RunConfig
from fastkd.train.configs import METHODS, config_of
from fastkd.train.configs.finetune import FinetuneConfig


@dataclasses.dataclass(kw_only=True)
class Options:
    """Of a command that does nothing."""

    source: tyro.conf.Positional[str]
    """Where from. And more."""
    out: Path
    """Where to."""
    size: int | tuple[int, int] | None = None
    blocks: tuple[int, ...] = (1, 2)
    rate: float = 1e-3
    kind: Literal["plain", "fancy"] = "plain"
    flag: bool = True
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


def mistakes(*words: str, target: type = Options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(target, list(words))
    return error.value.problems


def test_words_become_values():
    found = parse(Options, "here --size 3 4 --blocks 5 --rate=2e-4 --no-flag --extra a 1 b -2 --out there".split())
    assert found == Options(
        source="here", out=Path("there"), size=(3, 4), blocks=(5,), rate=2e-4, flag=False, extra=dict(a=1.0, b=-2.0)
    )
    assert parse(Options, "--out there --flag here".split()).source == "here"
    assert parse(Options, "here --out a --out b --blocks".split()) == Options(source="here", out=Path("b"), blocks=())


def test_a_file_has_the_same_keys_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "out: there\nsize: [3, 4]\nblocks: []\nrate: 2e-4\nflag: false\nextra: {a: 1}\nkind: fancy\nrun: {x: 1}\n"
    )
    found = parse(Options, ["here", "--config", str(file), "--kind", "plain", "--flag"])
    assert found == Options(source="here", out=Path("there"), size=(3, 4), blocks=(), rate=2e-4, extra=dict(a=1.0))
    file.write_text("out: there\nsize: null\nno-such: 3\nrat: 4\nkind: [fancy, plain]\nflag: perhaps\n")
    said = mistakes("here", f"--config={file}", "--blocks", "x")
    assert said == [
        f"--no-such (in {file}): unknown option; --help lists the options",
        f"--rat (in {file}): unknown option; did you mean --rate?",
        f"--kind (in {file}): got fancy plain, expected {{plain,fancy}}",
        f"--flag (in {file}): got perhaps, expected true or false",
        "--blocks: got x, expected INT ...",
    ]


def test_all_mistakes_at_once():
    assert mistakes("--siz", "3", "--rate", "fast", "--flag=5", "--blocks", "1", "y") == [
        "--siz: unknown option; did you mean --size?",
        "--rate: got fast, expected NUMBER",
        "--flag: got 5, expected true or false",
        "--blocks: got 1 y, expected INT ...",
        "SOURCE: missing, expected TEXT: Where from",
        "--out: missing, expected PATH: Where to",
    ]
    assert mistakes("a", "b", "--out", "c") == ["b: belongs to no option; options begin with --"]
    assert mistakes("a", "--out") == ["--out: got nothing, expected PATH"]


def test_values_are_checked_beside_missing_and_misspelt_options():
    words = "--student s --teacher t --mask-ratio 95 --epoch 3 --batch-size 0".split()
    said = [line.split(":")[0] for line in mistakes(*words, target=DistillConfig)]
    assert said == ["--epoch", "--data", "--out", "--batch-size", "--mask-ratio"]


@pytest.mark.parametrize(
    "content, said",
    [("[1, 2]", "expected lines of the form"), ("a: [", "cannot be read"), ("3: 4", "expected lines of the form")],
)
def test_a_file_that_is_none(tmp_path, content, said):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert said in mistakes("a", "--out", "b", "--config", str(file))[0]


def test_a_file_that_is_not_there():
    assert "expected a YAML file or the name of a recipe" in mistakes("--config", "nowhere.yaml")[0]
    near = recipe_names()[0]
    assert mistakes("--config", near[:-1]) == [
        f"--config: got {near[:-1]}, expected a YAML file or the name of a recipe; did you mean {near}?"
    ]
    assert "expected one file" in mistakes("--config", "a", "--config", "b")[0]


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_configs(name, tmp_path, capsys):
    options = read_config(name)
    (tmp_path / "pictures").mkdir()
    arguments = ["--config", name, "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run")]
    target = FinetuneConfig if options["method"] == "finetune" else config_of(options["method"])
    config = parse(target, arguments if "student" in options else ["runs/student", *arguments])
    assert all(getattr(config, key) is not None for key in options)
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    assert fastkd(capsys, "recipes", name)[1] == (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    "target",
    [PretrainConfig, FinetuneConfig, EvalConfig, *(config_of(name) for name in METHODS)],
    ids=lambda t: t.__name__,
)
def test_help_shows_every_option_once_and_says_what_it_is(target):
    shown = io.StringIO()
    show(target, "fastkd command", shown)
    text, groups = shown.getvalue(), grouped(target)
    names = [name for group in groups.values() for name in group]
    hidden = getattr(target, "HIDDEN", "").split()
    assert sorted(names + hidden) == sorted(field.name for field in dataclasses.fields(target))
    for name in names:
        (head,) = re.findall(rf"^  (?:--{name.replace('_', '-')}|{name.upper()})(?: .*)?$", text, re.MULTILINE)
        line, explained = text[text.index(f"  {head.strip()}\n") :].split("\n", 2)[:2]
        assert explained.startswith(" " * 8) and explained.strip(), line
    own = {field.name for field in dataclasses.fields(RunConfig)} - {"data", "out"}
    assert own == {name for names in RunConfig.GROUPS.values() for name in names.split()}  # nothing without a group


def test_the_config_of_a_run_does_it_again(capsys, tmp_path):
    config = tiny_config(tmp_path, steps=3, student_blocks=(0, 1), teacher_blocks=(1, 2), accumulate=2, val_every=2)
    assert fastkd(capsys, "distill", *as_arguments(config))[0] == 0
    file = tmp_path / "run/config.yaml"
    assert fastkd(capsys, "distill", "--config", file, "--out", tmp_path / "again")[0] == 0
    first, again = (load_file(tmp_path / name / "exported/student_timm.safetensors") for name in ("run", "again"))
    assert all(first[name].equal(again[name]) for name in first | again)
    ours, theirs = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "again"))
    for written in (ours, theirs):
        del written["run"], written["out"]
    assert ours == theirs
    assert fastkd(capsys, "distill", "--config", file)[0] == 0  # finished: nothing is left to do


def test_pretraining_is_distillation_without_a_teacher(capsys, tmp_path):
    config = tiny_config(tmp_path, steps=2, teacher="none", workers=0)
    words = [word for word in as_arguments(dataclasses.replace(config, out=tmp_path / "mae"))]
    at = words.index("--teacher")
    assert fastkd(capsys, "pretrain", *words[:at], *words[at + 2 :])[0] == 0
    assert fastkd(capsys, "distill", *as_arguments(config))[0] == 0
    runs = (load_file(tmp_path / name / "exported/student_timm.safetensors") for name in ("run", "mae"))
    first, again = runs
    assert all(first[name].equal(again[name]) for name in first | again)
    assert fastkd(capsys, "pretrain", *as_arguments(tiny_config(tmp_path)))[0] == 2
