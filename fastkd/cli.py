"""The command line, ``fastkd COMMAND``. Heavy imports wait for the command."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import tyro

from fastkd.help import show
from fastkd.options import RECIPES, parse, read_config, recipe_names, split_config
from fastkd.train.config import ConfigError, PretrainConfig, RunConfig, problem
from fastkd.train.configs import METHODS, config_of
from fastkd.train.launch import launch

WRONG_ARGUMENTS = 2
STOPPED = 130  # what a shell reports for Ctrl-C


@dataclasses.dataclass(kw_only=True)
class Export:
    """Write the student of a run, or any checkpoint that fastkd reads, for timm, transformers or fastkd."""

    source: tyro.conf.Positional[str]
    """A run folder, a checkpoint, or anything else that --teacher takes."""
    format: Literal["timm", "transformers", "safetensors"] = "timm"
    """timm: encoder as .safetensors; transformers: a ViTMAEForPreTraining folder; safetensors: fastkd's own file."""
    out: Path
    """File to write (folder for transformers)."""
    img_size: int | tuple[int, int] | None = None
    """Resize the position tables for images of this side, or height and width."""


@dataclasses.dataclass(kw_only=True)
class Pack:
    """Decode the images of a folder once and keep their pixels: training then reads them without decoding."""

    folder: tyro.conf.Positional[Path]
    """Folder of images, at any depth, the first folder level being the class; or .tar archives; with --verify a packed
    folder."""
    out: tyro.conf.Positional[Path | None] = None
    """Folder to write; --data of fastkd distill takes it. The same command goes on where it was stopped."""
    verify: bool = False
    """Only check a packed folder against its checksums, and name the images that are damaged."""
    short_side: int = 256
    """Shrink images until their shorter side has so many pixels; smaller ones stay as they are."""
    channels: Literal[1, 3] = 3
    """Colour (3) or grey (1)."""
    shard_mb: int = 512
    """Size of a file of pixels in megabytes, roughly."""
    workers: int = -1
    """Decoding processes; -1: one per core, 0 decodes in this process."""


@dataclasses.dataclass
class Info:
    """Versions, CPU, native libraries, and which backend each op takes here and why."""

    json: bool = False
    """Print JSON instead of tables."""


def distill(arguments: list[str]) -> int:
    """Train a small model from a large one on a folder of images, by DMAE or another --method."""
    name = _method(arguments)
    if name not in METHODS:
        listing = "\n".join(f"  {known:10} {line}" for known, (_, line) in METHODS.items())
        return _say(f"fastkd distill: --method: got {name!r}, expected one of\n{listing}", WRONG_ARGUMENTS)
    command = "distill" if name == "dmae" else f"distill --method {name}"
    return _train("distill", config_of(name), command, arguments)


def pretrain(arguments: list[str]) -> int:
    """Train a masked autoencoder without a teacher; it can become one."""
    return _train("pretrain", PretrainConfig, "pretrain", arguments)


def finetune(arguments: list[str]) -> int:
    """Make a classifier of any encoder on class folders."""
    from fastkd.train.configs.finetune import FinetuneConfig

    return _train("finetune", FinetuneConfig, "finetune", arguments)


def _train(command: str, target: type[RunConfig], usage: str, arguments: list[str]) -> int:
    try:
        config = _parse(target, usage, arguments)
    except ConfigError as error:
        if launch().world_size > 1:  # the others may have no mistake to report, and wait for this process
            from fastkd.train.distributed import fail_together

            fail_together(error.problems)
        raise
    from fastkd.data import UnreadableError
    from fastkd.train.loop import TrainingError
    from fastkd.train.loop import distill as run

    try:
        result = run(config)
    except (TrainingError, UnreadableError) as error:
        return _say(f"fastkd {command}: {error}", 1)
    return result.exit_code


def recipes(arguments: list[str]) -> int:
    """List the recipes that --config knows by name, or show one: fastkd recipes NAME."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = {name: (RECIPES / f"{name}.yaml").read_text().splitlines()[0] for name in recipe_names()}
        listing = "\n".join(f"  {name:24} {line.lstrip('# ')}" for name, line in lines.items())
        shown = "usage: fastkd recipes NAME shows one; fastkd distill --config NAME --data FOLDER --out RUN follows it"
        return _say(f"{shown}\n\n{listing}", 0, sys.stdout)
    if arguments[0] not in recipe_names():
        read_config(arguments[0] if not Path(arguments[0]).exists() else "")
    return _say((RECIPES / f"{arguments[0]}.yaml").read_text().rstrip(), 0, sys.stdout)


def pack(arguments: list[str]) -> int:
    """Decode a folder of images once, for training that does not wait for decoding."""
    given = _parse(Pack, "pack", arguments)
    from fastkd.data.pack_command import run

    return run(given)


def evaluate(arguments: list[str]) -> int:
    """Judge features on class folders: nearest neighbours, linear probe, and the source's own head."""
    from fastkd.evaluation.config import EvalConfig

    config = _parse(EvalConfig, "eval", arguments)
    from fastkd.evaluation.command import evaluate as run

    run(config)
    return 0


def export(arguments: list[str]) -> int:
    """Write a student for timm, transformers or fastkd."""
    given = _parse(Export, "export", arguments)
    if given.format != "transformers" and given.out.suffix != ".safetensors":
        expected = f"a name that ends in .safetensors for --format {given.format}"
        raise ConfigError([problem("out", given.out, expected)])
    from fastkd.models import MaskedAutoencoderViT, export_timm, load_vit, save, to_transformers
    from fastkd.train.build import EXPECTED, weights_of

    try:
        model = load_vit(weights_of(given.source), img_size=given.img_size)
    except EXPECTED as error:
        raise ConfigError([f"SOURCE: {error}"]) from error
    if given.format == "transformers" and not isinstance(model, MaskedAutoencoderViT):
        got = f"transformers with {given.source}, an encoder without decoder"
        raise ConfigError([problem("format", got, "timm or safetensors")])
    try:
        if given.format == "timm":
            print(f"{given.out} loads with\n  {export_timm(model, given.out)}")
        elif given.format == "safetensors":
            print(f"{save(model, given.out)} loads with fastkd.models.load_vit")
        else:
            to_transformers(model).save_pretrained(given.out)
            print(f"{given.out} loads with transformers.ViTMAEForPreTraining.from_pretrained({str(given.out)!r})")
    except (ValueError, ImportError) as error:
        raise ConfigError([f"--format {given.format}: {error}"]) from error
    return 0


def info(arguments: list[str]) -> int:
    """Show versions, hardware, native libraries and the backend of each op."""
    given = _parse(Info, "info", arguments)
    from fastkd import info as report

    return report.main(as_json=given.json)


def demo(arguments: list[str]) -> int:
    """Run a small experiment on real data; --list tells which there are."""
    from fastkd.demos import DEMOS

    listing = "\n".join(f"  {name:10} {d.line}\n{'':13}{d.time}; needs {d.packages}" for name, d in DEMOS.items())
    if arguments[:1] == ["--list"]:
        return _say(listing, 0, sys.stdout)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _usage("fastkd demo NAME", listing)
    if arguments[0] not in DEMOS:
        return _say(f"fastkd demo: NAME: got {arguments[0]!r}, expected one of\n{listing}", WRONG_ARGUMENTS)
    import importlib

    module = importlib.import_module(f"fastkd.demos.{arguments[0]}")
    return module.main(_parse(module.Config, f"demo {arguments[0]}", arguments[1:]))


def bench(arguments: list[str]) -> int:
    """Run a benchmark of the source tree."""
    folders = [Path(__file__).resolve().parent.parent / "benchmarks", Path.cwd() / "benchmarks"]
    folder = next((f for f in folders if (f / "dmae_throughput.py").exists()), None)
    if folder is None:
        return _say(
            "fastkd bench: the benchmarks are part of the source tree, which is not here: change into the cloned "
            "repository and run it again", WRONG_ARGUMENTS,
        )  # fmt: skip
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0].replace("-", "_") if named else "dmae_throughput"
    if name not in names:
        return _say(f"fastkd bench: NAME: got {arguments[0]!r}, expected one of {', '.join(names)}", WRONG_ARGUMENTS)
    sys.argv = [f"fastkd bench {name}", *arguments[int(named) :]]
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "distill": distill,
    "pretrain": pretrain,
    "finetune": finetune,
    "eval": evaluate,
    "export": export,
    "pack": pack,
    "recipes": recipes,
    "demo": demo,
    "bench": bench,
    "info": info,
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 1 failed, 2 wrong arguments, 128 + N stopped by signal N (Ctrl-C: 130)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        return _usage("fastkd COMMAND", listing)
    if arguments[0] in ("-V", "--version"):
        import fastkd

        return _say(fastkd.__version__, 0, sys.stdout)
    name, *rest = arguments
    if name not in COMMANDS:
        return _say(f"fastkd: COMMAND: got {name!r}, expected one of\n{listing}", WRONG_ARGUMENTS)
    try:
        return COMMANDS[name](rest)
    except ConfigError as error:
        return _say("\n".join(f"fastkd {name}: {line}" for line in error.problems), WRONG_ARGUMENTS)
    except KeyboardInterrupt:
        return _say(f"fastkd {name}: stopped", STOPPED)
    except BrokenPipeError:  # whoever read along has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor must the interpreter's last flush fail
        return 1


def _method(arguments: list[str]) -> str:
    """What --method names, here or in the --config file; the options of a run depend on it."""
    file, words = split_config(arguments)
    for index, word in enumerate(words):
        name, given, value = word.partition("=")
        if name == "--method":
            return value if given else (words[index + 1 : index + 2] or [""])[0]
    return str(read_config(file).get("method", "dmae")) if file else "dmae"


def _parse(target, command: str, arguments: list[str]):
    """A dataclass filled from arguments; with --help prints what there is and exits."""
    if {"-h", "--help"} & set(arguments):
        show(target, f"fastkd {command}")
        raise SystemExit(0)
    return parse(target, arguments)


def _usage(command: str, listing: str) -> int:
    return _say(f"usage: {command} [OPTIONS]   ({command} --help explains one)\n\n{listing}", 0, sys.stdout)


def _say(text: str, code: int, file=None) -> int:
    if text:
        print(text, file=file or sys.stderr)
    return code
