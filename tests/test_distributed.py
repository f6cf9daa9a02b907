"""Several processes: the trajectory of one, stops that all agree on, ends with a message, SLURM, a teacher in parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from process import PACKAGE_ROOT
from safetensors.torch import load_file
from tiny_run import tiny_config, write_models, write_pictures
from together import run_together, slurm

from fastkd import cli
from fastkd.models import Teacher
from fastkd.train import ConfigError, checkpoint, distill, loop, session
from fastkd.train.build import choose_workers
from fastkd.train.configs import config_of
from fastkd.train.distributed import own_cores, processes
from fastkd.train.held_out import HeldOut
from fastkd.train.launch import Launch, first_host, launch
from fastkd.train.track import Reporter

timm = pytest.importorskip("timm")


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> np.ndarray:
    """[steps, losses]: every number that the method reported while it trained."""
    found = [row for row in rows(run) if "loss" in row]
    names = [name for name in found[0] if name == "loss" or name.endswith("_loss")]
    return np.array([[row[name] for name in names] for row in found])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/last/student.safetensors")


# Methods, with what makes each picture's loss its own: no view drawn at random, no statistics of a batch.
SWEEP = {
    "dmae": dict(),
    "kd": dict(loss="dkd"),
    "maskalign": dict(fusion="sum", layer_weights="top2", drop_path=0.0),
    "mic": dict(jitter=0.0, blur=0.0, mask_ratio=0.0, block_size=8),
    "nkd": dict(),
    "selfdist": dict(),
}
# Those of a batch are made in each process: USKD's mean of the soft target, BatchNorm in ScaleKD's projectors.
OWN_STATISTICS = ("uskd", "scalekd")


def config_in(folder: Path, name: str, out: str, count: int, **changes):
    """A run of a method with the same global batch for any number of processes, accumulated twice."""
    shared = dict(
        data=folder / "pictures", out=folder / out, steps=3, log_every=1, lr=1e-3, amp="off", workers=0, device="cpu",
        batch_size=4 // count, accumulate=2,
    )  # fmt: skip
    if name in ("dmae", "maskalign", "selfdist"):
        teacher = "student" if name == "selfdist" else "teacher"
        models = dict(student=str(folder / "student.safetensors"), teacher=str(folder / f"{teacher}.safetensors"))
    else:
        models = dict(student="test_vit", img_size=32, scale=(0.9, 1.0))
        if name in ("kd", "nkd", "scalekd"):
            models |= dict(teacher="test_vit", teacher_checkpoint=folder / "teacher.pth")
        if name == "mic":
            models |= dict(target=folder / "target")
    return config_of(name)(**{**shared, **models, **SWEEP.get(name, {}), **changes})


def prepare(folder: Path) -> Path:
    write_pictures(folder / "pictures"), write_pictures(folder / "target", count=6)
    write_models(folder)
    torch.manual_seed(5)
    torch.save(timm.create_model("test_vit", num_classes=2, img_size=32).state_dict(), folder / "teacher.pth")
    return folder


def train_all(rank: int, folder: Path) -> None:
    """What two processes do in one go for the tests below."""
    facts = {}
    with processes("cpu") as group:
        for name in (*SWEEP, *OWN_STATISTICS):
            loop._train(config_in(folder, name, f"{name}-two", 2), group)
        for name in ("dmae", "kd"):
            options = dict(shard_teacher=True, val_data=folder / "pictures")
            loop._train(config_in(folder, name, f"{name}-sharded", 2, **options), group)
        teacher = Teacher(folder / "teacher.safetensors", (1, 3))
        images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        whole, facts["whole"] = teacher(images), sum(p.untyped_storage().nbytes() for p in teacher.vit.parameters())
        teacher.shard(group.mesh())
        facts["same"] = all(torch.equal(a, b) for _ in range(2) for a, b in zip(whole, teacher(images)))
        facts["part"] = sum(p.to_local().untyped_storage().nbytes() for p in teacher.vit.parameters())
        facts |= dict(cores=group.cores, total=group.total(rank + 1), names=group.names)
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two processes have trained everything."""
    folder = prepare(tmp_path_factory.mktemp("two"))
    ended = run_together(train_all, folder, seconds=200)
    assert [end.code for end in ended] == [0, 0], "".join(end.output for end in ended)[-3000:]
    return folder


@pytest.fixture(scope="module")
def facts(two) -> list[dict]:
    return [json.loads((two / f"facts{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SWEEP)
def test_two_processes_equal_one_with_the_double_batch(two, name):
    distill(config_in(two, name, f"{name}-one", 1))
    np.testing.assert_allclose(losses(two / f"{name}-two"), losses(two / f"{name}-one"), rtol=1e-5, atol=1e-7)
    got, want = weights(two / f"{name}-two"), weights(two / f"{name}-one")
    assert got.keys() == want.keys()
    for key, value in want.items():
        if key.endswith(
            "qkv.bias"
        ):  # keys have none: softmax does not see it, its gradient is rounding, AdamW moves it
            got[key], value = (torch.cat([x[: len(x) // 3], x[-len(x) // 3 :]]) for x in (got[key], value))
        assert torch.allclose(got[key], value, rtol=1e-5, atol=2e-6), key


@pytest.mark.parametrize("name", OWN_STATISTICS)
def test_statistics_of_a_batch_are_those_of_one_process(two, name):
    distill(config_in(two, name, f"{name}-one", 1))
    one, got = losses(two / f"{name}-one"), losses(two / f"{name}-two")
    assert got.shape == one.shape and np.isfinite(got).all()
    assert not np.allclose(got, one, rtol=1e-5)  # as docs/multi_gpu.md says


@pytest.mark.parametrize("name", ["dmae", "kd"])
def test_a_sharded_teacher_teaches_the_same_bits(two, name):
    assert np.array_equal(losses(two / f"{name}-sharded"), losses(two / f"{name}-two"))
    got, want = weights(two / f"{name}-sharded"), weights(two / f"{name}-two")
    assert all(torch.equal(got[key], want[key]) for key in want)
    held_out = [row["step"] for row in rows(two / f"{name}-sharded") if "val_loss" in row]
    assert held_out == [0, 1, 2, 3]  # by all processes together, written by one


def test_each_process_holds_a_part_of_the_teacher(facts):
    for rank in facts:
        assert rank["same"] and rank["part"] < 0.52 * rank["whole"]


def test_processes_share_a_machine(facts):
    for rank in facts:
        assert rank["cores"] == max(1, len(own_cores()) // 2) and rank["total"] == 3
        assert [name.split(" on ")[0] for name in rank["names"]] == ["rank 0", "rank 1"]
    assert choose_workers(-1, False, 8) == 2 and choose_workers(-1, True, 8) == 8 and choose_workers(3, True, 8) == 3


def command(folder: Path, *more: object) -> list[str]:
    """Arguments of a run that does not end by itself."""
    given = dict(
        student=folder / "student.safetensors", teacher=folder / "teacher.safetensors", data=folder / "pictures",
        out=folder / "run", batch_size=2, steps=10**6, lr=1e-3, amp="off", workers=0, device="cpu", save_every=20,
    )  # fmt: skip
    options = [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["distill", *options, *map(str, more)]


def at_step(number: int, action) -> None:
    """Calls action after a step of the run that follows in this process."""
    original, done = Reporter.step, []

    def step(self):
        original(self)
        done.append(1)
        if len(done) == number:
            action()

    Reporter.step = step


def train_and_signal(rank: int, folder: Path, victim: int, number: int) -> None:
    def twice():
        for _ in range(2):  # as srun and then torchrun do
            os.kill(os.getpid(), number)

    if rank == victim:
        at_step(3, twice)
    cli.main([*command(folder), "--save-every", "2"])


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "pictures"), write_models(tmp_path)
    return tmp_path


def test_a_signal_to_any_process_stops_all_after_the_same_step(folder):
    ended = run_together(train_and_signal, folder, 1, signal.SIGTERM)
    assert [end.code for end in ended] == [128 + signal.SIGTERM] * 2, ended
    assert checkpoint.load_state(checkpoint.find(folder / "run"))["step"] == 4  # asked in step 3, known in step 4
    assert "stopped after step 4 of 1000000; the same command continues" in (folder / "run/train.log").read_text()


@pytest.mark.parametrize("victim, count", [(0, 2), (1, 3)])
def test_when_a_process_is_killed_the_others_end_with_a_message(folder, victim, count):
    ended = run_together(train_and_signal, folder, victim, signal.SIGKILL, count=count)
    message = f"another process of this run is gone: rank {victim} on "
    advice = f"the last checkpoint is {checkpoint.find(folder / 'run')}; the same command continues from there"
    for rank, end in enumerate(ended):
        assert end.code == (-signal.SIGKILL if rank == victim else 1), ended
        assert rank == victim or (end.output.count(message) == 1 and advice in end.output)
    assert (message in (folder / "run/train.log").read_text()) == (victim != 0)


def train_and_wait(rank: int, folder: Path) -> None:
    if rank == 0:
        HeldOut.evaluate = lambda *_: time.sleep(30)
    cli.main(command(folder, "--timeout-minutes", 0.03))


def test_a_process_that_does_not_answer_ends_the_run(folder):
    ended = run_together(train_and_wait, folder)
    assert [end.code for end in ended] == [1, 1], ended
    assert "has not answered for --timeout-minutes" in ended[1].output


def train_with(rank: int, folder: Path, *changes: list[object]) -> None:
    cli.main(command(folder, *changes[rank]))


def test_processes_that_differ_do_not_start(folder):
    write_pictures(folder / "fewer", count=11)
    first, second = run_together(train_with, folder, [], ["--data", folder / "fewer"])
    assert first.code == second.code == 2 and "Traceback" not in first.output + second.output
    assert "--data: got {'images': 12, 'fingerprint': " in first.output and "in rank 0 on " in first.output
    assert "and {'images': 11, 'fingerprint': " in first.output and "in rank 1 on " in first.output
    assert not (folder / "run").exists() and second.output == ""
    first, second = run_together(train_with, folder, ["--lr", 0.1], ["--weight-decay", 0.2])
    assert first.code == second.code == 2
    assert "--lr: got 0.1 in rank 0" in first.output and "--weight-decay: got 0.05 in rank 0" in first.output


def test_a_mistake_on_one_machine_ends_all(folder):
    first, second = run_together(train_with, folder, [], ["--data", folder / "nowhere"])
    assert first.code == second.code == 2
    assert "nowhere, expected an existing folder of images, or .tar file; check the path (rank 1 on " in first.output


def fail_in_setup(rank: int, folder: Path) -> None:
    if rank == 1:

        def build_loader(*_):
            raise ConfigError(["--data: the disk is gone"])

        session.build_loader = build_loader
    cli.main(command(folder))


def test_a_process_that_fails_says_why_to_the_others(folder):
    first, second = run_together(fail_in_setup, folder)
    assert (first.code, second.code) == (1, 2)
    assert "gone: rank 1 on " in first.output and "has stopped: --data: the disk is gone. This one" in first.output
    assert "no checkpoint was written yet" in first.output and "Traceback" not in first.output


@pytest.fixture
def torchrun(folder):
    """The launcher with two processes that train; they have written a checkpoint."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastkd"]
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    patient = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "150"}  # a busy machine draws slowly
    environment = {**os.environ, **patient, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = dict(env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*launcher, *command(folder)], **options) as process:
        try:
            while checkpoint.find(folder / "run") is None and process.poll() is None:
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Process numbers of what it has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == launcher.pid:
                variables = dict(v.split("=", 1) for v in (path.parent / "environ").read_text().split("\0") if "=" in v)
                found[int(variables["RANK"])] = int(path.parent.name)
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def test_torchrun_ends_when_a_process_is_killed(torchrun, folder):
    os.kill(workers_of(torchrun)[1], signal.SIGKILL)
    output = torchrun.communicate(timeout=200)[1]
    assert torchrun.returncode not in (0, None)
    for text in (output, (folder / "run/train.log").read_text()):
        assert "another process of this run is gone: rank 1 on " in text and "the same command continues" in text


def test_torchrun_passes_a_signal_on(torchrun, folder):
    torchrun.send_signal(signal.SIGTERM)
    output = torchrun.communicate(timeout=200)[1]
    assert torchrun.returncode not in (0, None)
    assert "stopped after step" in output and "another process" not in output
    log = (folder / "run/train.log").read_text()
    assert f"stopped after step {checkpoint.load_state(checkpoint.find(folder / 'run'))['step']} of" in log


def test_what_srun_says():
    place = launch(slurm(1, 20_000))
    assert place == Launch(1, 2, 1, "tcp://localhost:20000")
    assert launch({**slurm(1, 20_000), "SLURM_STEP_ID": "1"}).meeting != place.meeting
    assert launch({**slurm(1, 20_000), "MASTER_ADDR": "ib0", "MASTER_PORT": "7"}).meeting == "tcp://ib0:7"
    torchrun = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    assert launch({**slurm(1, 20_000), **torchrun}) == Launch(5, 8, 1, "env://")  # one torchrun per node under srun
    alone = dict(SLURM_JOB_ID="3", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="a[1-4]")
    assert launch(alone) == Launch()  # a batch script, or the shell of salloc
    assert launch({**slurm(0, 3, count=1), "SLURM_NTASKS": "4"}) == Launch()  # a shell in a step of its own
    assert launch({**slurm(0, 3), "SLURM_PTY_PORT": "12"}) == launch({**slurm(1, 3), "WORLD_SIZE": "1"}) == Launch()
    assert launch({}) == Launch()


@pytest.mark.parametrize("nodes, first", [
    ("node[001-003,007],gpu5", "node001"), ("gpu5,node[1-3]", "gpu5"), ("a-b.c", "a-b.c"),
    ("rack[2-3]n[07,9]", "rack2n07"), ("n[5,7-9]-ib", "n5-ib"),
])  # fmt: skip
def test_host_lists(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("changes, message", [
    (dict(shard_teacher=True), "--shard-teacher: got one process, expected several processes; start several with"),
    (dict(shard_teacher=True, teacher="none"), "--shard-teacher: got True, expected --no-shard-teacher; dmae, kd"),
    (dict(shard_teacher=True, teacher_precision="int8"), "--teacher-precision: got int8, expected exact with --shard"),
    (dict(timeout_minutes=0), "--timeout-minutes: got 0, expected a positive number"),
])  # fmt: skip
def test_wrong_arguments(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        distill(tiny_config(tmp_path, **changes))
