"""The command line: help from the config, kind errors with code 2, and a run from pictures to an exported student."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from tiny_run import tiny_config

from fastkd import __version__
from fastkd.cli import COMMANDS, main
from fastkd.models import MaskedAutoencoderViT, load_vit
from fastkd.train import DistillConfig
from fastkd.train.track import RunFolder


def fastkd(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return stop.value.code or 0, shown.out, shown.err


def as_arguments(config: DistillConfig) -> list[str]:
    """The command line of a config's values that differ from the defaults."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            found += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return found


def test_help_lists_commands_and_every_field_with_its_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = fastkd(capsys, "--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    code, out, _ = fastkd(capsys, "distill", "--help")
    assert code == 0 and "Share of masked patches, 0.75 to 0.98 are usual" in out
    for field in dataclasses.fields(DistillConfig):
        assert f"--{field.name.replace('_', '-')}" in out
    assert fastkd(capsys, "--version")[1].strip() == __version__


def test_help_does_not_wait_for_torch():
    program = (
        "import sys\n"
        "from fastkd.cli import main\n"
        "try: main(['distill', '--teacher', 'a', '--student', 'b', '--data', '/nowhere', '--out', 'c'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--data: got /nowhere, expected an existing folder" in done.stderr


RUN = "distill --teacher none --student vit_tiny_patch16 --data . --out run".split()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["distil"], ["COMMAND: got 'distil', expected one of", "distill"]),
        (["distill", "--teacher", "x"], ["--student", "--data", "--out"]),
        ([*RUN, "--mask-ratio", "lots"], ["--mask-ratio", "lots"]),
        ([*RUN, "--mask-rato", "0.9"], ["--mask-rato", "--mask-ratio"]),
        ([*RUN, "--loss", "l3"], ["l3", "smooth_l1"]),
        ([*RUN, "--data", "/nowhere", "--mask-ratio", "95", "--no-reconstruct", "--steps", "0"],
         ["--data: got /nowhere, expected an existing folder", "--mask-ratio: got 95.0, expected a number between",
          "--reconstruct: got False", "--steps: got 0, expected at least 1"]),
        (["demo", "nothing"], ["NAME: got 'nothing', expected one of"]),
        (["export", "nowhere.pth", "--out", "x.bin"], ["--out: got x.bin, expected a name that ends in .safetensors"]),
        (["export", "nowhere.pth", "--out", "x.safetensors"], ["SOURCE: ", "nowhere.pth", "expected an existing file"]),
    ],
    ids=lambda value: value[0] if value[0] in (*COMMANDS, "distil") else "",
)  # fmt: skip
def test_wrong_arguments_are_named_without_traceback(capsys, arguments, said):
    code, out, err = fastkd(capsys, *arguments)
    assert code == 2
    assert all(part in err for part in said), err
    assert "Traceback" not in err and not out


def test_distill_and_export(capsys, tmp_path):
    config = tiny_config(tmp_path, steps=2, student_blocks=(0, 1), teacher_blocks=(1, 2))
    code, _, err = fastkd(capsys, "distill", *as_arguments(config))
    assert code == 0 and "finished after 2 steps" in err
    resolved = RunFolder(tmp_path / "run").config()
    assert resolved["teacher_blocks"] == [1, 2] and resolved["lr"] == 1e-2

    code, _, err = fastkd(capsys, "distill", *as_arguments(dataclasses.replace(config, alpha=2.0)))
    assert code == 2 and "--alpha: got 2.0, expected 1.0 as in the run" in err

    run = tmp_path / "run"
    code, out, _ = fastkd(capsys, "export", run, "--out", tmp_path / "timm.safetensors")
    assert code == 0 and "timm.create_model(" in out
    encoder = load_vit(tmp_path / "timm.safetensors")
    assert not isinstance(encoder, MaskedAutoencoderViT) and encoder.depth == 3
    own = tmp_path / "own.safetensors"
    arguments = ["--format", "safetensors", "--img-size", "24", "--out", own]
    code, out, _ = fastkd(capsys, "export", run / "checkpoints/last", *arguments)
    assert code == 0 and load_vit(own).img_size == (24, 24)
    code, _, err = fastkd(
        capsys, "export", tmp_path / "timm.safetensors", "--format", "transformers", "--out", tmp_path / "hf"
    )
    assert code == 2 and "an encoder without decoder" in err


def test_export_for_transformers(capsys, tmp_path):
    pytest.importorskip("transformers")
    tiny_config(tmp_path)
    source, out = tmp_path / "student.safetensors", tmp_path / "hf"
    assert fastkd(capsys, "export", source, "--format", "transformers", "--out", out)[0] == 0
    assert isinstance(load_vit(out), MaskedAutoencoderViT)


def test_a_stopped_run_says_so_by_its_exit_code(capsys, tmp_path, monkeypatch):
    from fastkd.train.track import Reporter

    def interrupt(self):
        import signal

        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reporter, "step", interrupt)
    assert fastkd(capsys, "distill", *as_arguments(tiny_config(tmp_path)))[0] == 130


def test_info_tells_backend_and_reason_of_each_op(capsys):
    code, out, _ = fastkd(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["versions"]["fastkd"] == __version__
    for op in facts["ops"]:
        cpu = op["devices"]["cpu"]
        assert set(cpu["backend"].values()) <= {"cpp", "reference", "triton"}
        assert set(cpu["backend"].values()) | set(cpu["why_not"]) == {"reference", "cpp", "triton", "cuda"}
        assert all(cpu["why_not"].values())
    code, out, _ = fastkd(capsys, "info")
    assert code == 0 and all(op["name"] in out for op in facts["ops"])
    if not any(op["gpu_record"] for op in facts["ops"]):
        assert out.count("never ran on a GPU") == len(facts["ops"])


def test_info_names_a_forced_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "cuda")
    facts = json.loads(fastkd(capsys, "info", "--json")[1])
    assert facts["forced_backend"] == "cuda"
    cpu = facts["ops"][0]["devices"]["cpu"]
    assert set(cpu["backend"].values()) == {"none"} and "it takes cuda tensors, got cpu" in cpu["why_not"]["cuda"]
