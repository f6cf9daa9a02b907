"""Runs that are killed, run out of disk or find their checkpoints damaged go on from the newest good one."""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from faults import FAULTS
from process import run_python
from safetensors.torch import load_file
from test_train import assert_same_run, metrics
from tiny_run import SHAPE, tiny_config

from fastkd import cli
from fastkd.models import MaskedAutoencoderViT
from fastkd.train import ConfigError, DistillConfig, TrainingError, checkpoint, distill
from fastkd.train.held_out import HeldOut
from fastkd.train.interrupt import Interrupt
from fastkd.train.track import Reporter, RunFolder

TIMES = ("seconds", "images_per_second", "data_wait")


def rows(run: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics(run)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_twenty_kills_do_not_change_a_bit(tmp_path):
    kills = run_python("twenty_kills.py", tmp_path, OMP_NUM_THREADS=1)
    assert kills.returncode == 0 and kills.stdout.count("exit code") == 20, kills.stdout + kills.stderr
    run, whole = tmp_path / "killed", tmp_path / "whole"
    assert_same_run(run, whole)
    assert rows(run) == rows(whole)
    ours, theirs = (load_file(folder / "exported/student_timm.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert names(run / "checkpoints") == ["last", "step_00000098", "step_00000100"]
    assert names(run / "exported") == ["student_timm.safetensors"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than these runs."""
    monkeypatch.setattr(HeldOut, "draw", lambda self, run: None)


@pytest.fixture
def faults():
    yield FAULTS
    FAULTS.stop()


def small_model() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(embed_dim=16, depth=1, num_heads=2, **SHAPE)


def save(root: Path, step: int, keep: int = 2, model: MaskedAutoencoderViT | None = None) -> Path:
    return checkpoint.save(root, model or small_model(), dict(step=step, more=torch.arange(4000)), keep)


def test_the_last_ones_are_kept(tmp_path):
    root = tmp_path / "checkpoints"
    for step in range(0, 60, 10):
        save(root, step, keep=3)
        assert (root / "last").resolve() == (root / f"step_{step:08}").resolve()
    assert names(root) == ["last", "step_00000030", "step_00000040", "step_00000050"]
    for place in (tmp_path, root, root / "last", root / "step_00000050", root / "last" / checkpoint.STATE):
        assert checkpoint.step_of(checkpoint.find(place)) == 50
        assert Path(checkpoint.weights_of(place)).name == checkpoint.STUDENT
    subprocess.run(["sha256sum", "--check", "--quiet", checkpoint.SUMS], cwd=root / "last", check=True)
    assert checkpoint.find(tmp_path / "nowhere") is None
    assert checkpoint.weights_of("vit_tiny_patch14") == "vit_tiny_patch14"
    save(root, 60, keep=1)
    assert names(root) == ["last", "step_00000060"]


def test_there_is_never_more_than_one_checkpoint_too_many(tmp_path, faults):
    root, most = tmp_path / "checkpoints", 0

    def count(number: int) -> bool:
        nonlocal most
        most = max(most, sum(not folder.is_symlink() for folder in root.glob("*")))
        return False

    faults.fail(tmp_path, count)
    for step in range(1, 6):
        save(root, step, keep=2)
    assert most == 2 + 1


def test_a_fault_at_any_operation_leaves_a_good_checkpoint(tmp_path, faults):
    root, model = tmp_path / "checkpoints", small_model()
    save(root, 1, model=model)
    step, failed = 1, 0
    for at in itertools.count(1):
        faults.fail(tmp_path, lambda number, at=at: number == at)
        try:
            save(root, step + 1, model=model)
            saved = True
        except OSError:
            saved, failed = False, failed + 1
        seen = faults.stop()
        found = checkpoint.look(tmp_path)
        assert checkpoint.step_of(found.good) in ((step + 1,) if saved else (step, step + 1)) and not found.damaged
        step = checkpoint.step_of(found.good)
        if seen < at:
            break
    assert failed > 15
    assert names(root) == ["last", f"step_{step - 1:08}", f"step_{step:08}"]


def test_a_disk_that_is_full_after_any_number_of_bytes(tmp_path):
    root, model = tmp_path / "checkpoints", small_model()
    sizes = [path.stat().st_size for path in save(root, 1, model=model).iterdir()]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, max(sizes), max(sizes) // 40):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # writing fails beyond so many bytes
        try:
            with pytest.raises(OSError, match="File too large"):
                save(root, 2, model=model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(root) == ["last", "step_00000001"] and checkpoint.check(root / "last") is None
    save(root, 2, model=model)
    assert checkpoint.step_of(checkpoint.find(tmp_path)) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [
    (cut, checkpoint.STATE, r"not the checksum in SHA256SUMS: train_state.pt of \d+ bytes"),
    (flip, checkpoint.STUDENT, r"not the checksum in SHA256SUMS: student.safetensors of \d+ bytes"),
    (Path.unlink, checkpoint.STATE, "train_state.pt: No such file"),
    (Path.unlink, checkpoint.SUMS, "SHA256SUMS: No such file"),
    (empty, checkpoint.SUMS, "student.safetensors of .*, train_state.pt of"),
    (lambda path: path.write_bytes(b"\xff\x00"), checkpoint.SUMS, "SHA256SUMS is no text"),
    (lambda path: shutil.rmtree(path.parent) or path.parent.mkdir(), checkpoint.STATE, "SHA256SUMS: No such file"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a whole run of 8 steps, `whole`, which has checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "draw", lambda self, run: None)
        distill(eight_steps(folder, "whole"))
    return folder


def eight_steps(folder: Path, out: str, **changes):
    options = dict(steps=8, save_every=2, val_data=folder / "pictures", val_every=3) | changes
    return tiny_config(folder, out, **options)


@pytest.mark.parametrize("damage, name, reason", DAMAGES)
def test_a_damaged_checkpoint_is_left_aside(finished, damage, name, reason):
    run = finished / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished / "whole", run, symlinks=True)
    damage(run / "checkpoints/step_00000008" / name)
    (run / "checkpoints/step_00000009.new").mkdir()  # what a crash leaves
    assert distill(eight_steps(finished, "run")).finished
    log = (run / "train.log").read_text()
    assert re.search(f"step_00000008 is damaged and left aside: .*{reason}.*; 2 steps are trained again", log)
    assert "continuing after step 6 from" in log
    assert names(run / "checkpoints") == ["last", "step_00000006", "step_00000008"]
    assert_same_run(run, finished / "whole")
    assert rows(run) == rows(finished / "whole")


def test_a_damaged_checkpoint_stays_until_training_has_passed_it(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (2, 4, 8):
        save(root, step)
    checkpoint.set_aside([root / "step_00000008"])
    save(root, 6)
    assert names(root) == ["last", "step_00000004", "step_00000006", "step_00000008.damaged"]
    save(root, 8)
    assert names(root) == ["last", "step_00000006", "step_00000008"]


def test_without_a_good_checkpoint_nothing_starts_again(finished):
    run = finished / "lost"
    shutil.copytree(finished / "whole", run, symlinks=True)
    for step in (6, 8):
        cut(run / f"checkpoints/step_{step:08}" / checkpoint.STATE)
    before = (run / "metrics.jsonl").read_bytes()
    both = "step_00000008 .*train_state.pt.*step_00000006 .*train_state.pt"
    with pytest.raises(ConfigError, match=f"--out: got .*lost, where all .* are damaged: .*{both}.*start anew"):
        distill(eight_steps(finished, "lost"))
    with pytest.raises(ConfigError, match=f"--resume: got .*{both}.*from a copy"):
        distill(eight_steps(finished, "other", resume=str(run)))
    with pytest.raises(ConfigError, match="--out: got .* expected a folder without a run"):
        distill(eight_steps(finished, "lost", resume="never"))
    with pytest.raises(ValueError, match=f"has no good checkpoint: .*{both}"):
        checkpoint.weights_of(run)
    assert (run / "metrics.jsonl").read_bytes() == before and not (finished / "other").exists()
    student = run / "checkpoints/step_00000008" / checkpoint.STUDENT  # by its own name it can still be read
    assert checkpoint.weights_of(student) == student


def test_a_run_that_was_copied_without_links_goes_on(finished):
    run = finished / "copied"
    shutil.copytree(finished / "whole", run)
    assert (run / "checkpoints/last").is_dir() and not (run / "checkpoints/last").is_symlink()
    shutil.rmtree(run / "checkpoints/step_00000008")
    distill(eight_steps(finished, "copied"))
    assert (run / "checkpoints/last").resolve() == (run / "checkpoints/step_00000008").resolve()
    assert_same_run(run, finished / "whole")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda marker: dict(step=8, heads=Payload(marker)), r"does not fit: .*asks for (posix|nt)\.system"),
        (lambda marker: dict(step=8), "train_state.pt is not what fastkd writes .*heads"),
        (lambda marker: [1, 2], "train_state.pt is not what fastkd writes"),
        (lambda marker: None, "does not fit: .*cannot be read"),
    ],
    ids=["code", "keys", "list", "text"],
)
def test_foreign_files_with_the_right_checksums_are_refused(finished, tmp_path, content, message):
    run, marker = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(finished / "whole", run, symlinks=True)
    folder = run / "checkpoints/step_00000008"
    state = content(marker)
    (folder / checkpoint.STATE).write_text("no zip") if state is None else torch.save(state, folder / checkpoint.STATE)
    sums = ["sha256sum", checkpoint.STUDENT, checkpoint.STATE]
    (folder / checkpoint.SUMS).write_bytes(subprocess.run(sums, cwd=folder, check=True, capture_output=True).stdout)
    with pytest.raises(ConfigError, match=message):
        distill(eight_steps(finished, "next", steps=10, resume=str(run)))
    assert not marker.exists()


@pytest.mark.parametrize("from_then_on", [False, True], ids=["once", "from then on"])
def test_a_run_on_a_failing_disk_can_be_resumed(finished, tmp_path, faults, from_then_on):
    """The n-th file operation of a run fails, or all from it on; then the disk is well again."""
    faults.fail(finished / "counted", lambda number: False, reads=not from_then_on)
    distill(eight_steps(finished, "counted"))
    total, ends = faults.stop(), set()
    shutil.rmtree(finished / "counted")
    for at in range(1, total + 1, total // 5):
        run = finished / "failing"
        shutil.rmtree(run, ignore_errors=True)
        fails = (lambda number, at=at: number >= at) if from_then_on else (lambda number, at=at: number == at)
        faults.fail(run, fails, reads=not from_then_on)
        try:
            ends.add(distill(eight_steps(finished, "failing")).finished)
        except (ConfigError, TrainingError, OSError) as error:
            ends.add(type(error))
        faults.stop()
        assert distill(eight_steps(finished, "failing")).finished
        assert_same_run(run, finished / "whole")
        assert rows(run) == rows(finished / "whole")
    assert {ConfigError, TrainingError if from_then_on else True} <= ends


def test_a_full_disk_at_the_end_is_exit_code_1(finished, faults, capsys, monkeypatch):
    config = eight_steps(finished, "full")
    options = "student teacher data out batch_size lr amp device steps save_every val_data val_every log_every workers"
    command = [word for n in options.split() for word in (f"--{n.replace('_', '-')}", str(getattr(config, n)))]
    original, run = checkpoint.save, finished / "full"

    def full_from_step_4_on(root, student, state, keep):
        if state["step"] == 4:
            faults.fail(run, lambda number: True, reads=False)
        return original(root, student, state, keep)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(checkpoint, "save", full_from_step_4_on)
        cli.main(["distill", *command])
    faults.stop()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "step 4: the checkpoint not written: [Errno 28] No space left on device" in said
    assert re.search(
        "step 8: the end of the run is not written. Make room .*step_00000002; the same", said.replace("\n", " ")
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["distill", *command])
    assert end.value.code == 0
    assert_same_run(run, finished / "whole")
    assert rows(run) == rows(finished / "whole")


def test_metrics_wait_for_room(tmp_path, faults):
    run = RunFolder(tmp_path)
    run.begin({}, {})
    run.add(dict(step=1))
    for operation in (faults.fail, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (20, -1))):
        operation(tmp_path, lambda number: True)
        run.add(dict(step=2))
        with pytest.raises(OSError):
            run.sync()
        faults.stop()
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert [row["step"] for row in run.metrics()] == [1]
    run.sync()
    assert [row["step"] for row in run.metrics()] == [1, 2, 2]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillConfig, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(ConfigError, match="--out: got /proc/run, expected a folder that can be written; /proc: "):
        distill(tiny_config(tmp_path, out="/proc/run"))  # for root as well


def test_a_second_signal_stops_at_once():
    for number, expected in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        with Interrupt() as interrupt:
            signal.raise_signal(number)
            assert interrupt.pressed == number
            with pytest.raises(expected) as end:
                signal.raise_signal(number)
        assert number == signal.SIGINT or end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_died_before_its_first_checkpoint_starts_its_metrics_anew(finished, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(Reporter, "step", lambda self: (_ for _ in ()).throw(RuntimeError("died")))
        distill(eight_steps(finished, "early"))
    assert [row["step"] for row in metrics(finished / "early")] == [0]
    distill(eight_steps(finished, "early"))
    assert rows(finished / "early") == rows(finished / "whole")
