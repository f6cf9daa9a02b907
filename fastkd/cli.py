"""The command line: ``fastkd distill | pack | demo | bench | info | export``. Heavy imports wait for the command."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import tyro

from fastkd.train.config import ConfigError, problem
from fastkd.train.recipes import METHODS, config_of

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
    """Folder of images, at any depth; the first folder level is the class."""
    out: tyro.conf.Positional[Path]
    """Folder to write; --data of fastkd distill takes it. The same command goes on where it was stopped."""
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
    """Train a student on a folder of images, by DMAE or another method (--method NAME)."""
    name = _method(arguments)
    if name not in METHODS:
        listing = "\n".join(f"  {known:10} {line}" for known, (_, line) in METHODS.items())
        return _say(f"fastkd distill: --method: got {name!r}, expected one of\n{listing}", WRONG_ARGUMENTS)
    config = _parse(config_of(name), f"distill --method {name}", arguments)
    config.validate()  # before torch is imported: wrong arguments answer at once
    from fastkd.data import UnreadableError
    from fastkd.train.loop import TrainingError
    from fastkd.train.loop import distill as run

    try:
        result = run(config)
    except (TrainingError, UnreadableError) as error:
        return _say(f"fastkd distill: {error}", 1)
    return result.exit_code


def pack(arguments: list[str]) -> int:
    """Decode a folder of images once, for training that does not wait for decoding."""
    options = _parse(Pack, "pack", arguments)
    from fastkd.data.pack_command import run

    return run(options)


def export(arguments: list[str]) -> int:
    """Write a student for timm, transformers or fastkd."""
    options = _parse(Export, "export", arguments)
    if options.format != "transformers" and options.out.suffix != ".safetensors":
        expected = f"a name that ends in .safetensors for --format {options.format}"
        raise ConfigError([problem("out", options.out, expected)])
    from fastkd.models import MaskedAutoencoderViT, export_timm, load_vit, save, to_transformers
    from fastkd.train.build import EXPECTED, weights_of

    try:
        model = load_vit(weights_of(options.source), img_size=options.img_size)
    except EXPECTED as error:
        raise ConfigError([f"SOURCE: {error}"]) from error
    if options.format == "transformers" and not isinstance(model, MaskedAutoencoderViT):
        got = f"transformers with {options.source}, an encoder without decoder"
        raise ConfigError([problem("format", got, "timm or safetensors")])
    try:
        if options.format == "timm":
            print(f"{options.out} loads with\n  {export_timm(model, options.out)}")
        elif options.format == "safetensors":
            print(f"{save(model, options.out)} loads with fastkd.models.load_vit")
        else:
            to_transformers(model).save_pretrained(options.out)
            print(f"{options.out} loads with transformers.ViTMAEForPreTraining.from_pretrained({str(options.out)!r})")
    except (ValueError, ImportError) as error:
        raise ConfigError([f"--format {options.format}: {error}"]) from error
    return 0


def info(arguments: list[str]) -> int:
    """Show versions, hardware, native libraries and the backend of each op."""
    options = _parse(Info, "info", arguments)
    from fastkd import info as report

    return report.main(as_json=options.json)


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
    "pack": pack,
    "demo": demo,
    "bench": bench,
    "info": info,
    "export": export,
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


def _method(arguments: list[str]) -> str:
    """What --method names; the options of a run depend on it."""
    for index, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name == "--method":
            return value if given else (arguments[index + 1 : index + 2] or [""])[0]
    return "dmae"


def _parse(target, command: str, arguments: list[str]):
    """A dataclass filled from arguments; wrong ones end the process with code 2 and a message."""
    return tyro.cli(target, prog=f"fastkd {command}", args=arguments)


def _usage(command: str, listing: str) -> int:
    return _say(f"usage: {command} [OPTIONS]   ({command} --help lists the options)\n\n{listing}", 0, sys.stdout)


def _say(text: str, code: int, file=None) -> int:
    print(text, file=file or sys.stderr)
    return code
