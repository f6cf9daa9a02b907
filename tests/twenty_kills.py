"""Kills a run of the command line twenty times and lets it end; `test_run_checkpoints` compares it with a whole one.

A script: what it imports is imported once, and each run is a process forked from it, which starts in no time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch imports it, slowly, when a model is made
from tiny_run import tiny_config

import fastkd.cli
import fastkd.train.loop
from fastkd.train import checkpoint
from fastkd.train.held_out import HeldOut
from fastkd.train.track import Reporter

STEPS, SAVE_EVERY, KEEP = 100, 2, 2
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.scandir"}
KILLS = ["in a file operation"] * 7 + [signal.SIGKILL] * 8
KILLS += [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR1]


class Run:
    """``fastkd distill`` in a process that reports each step; it kills itself at a file operation of checkpoints."""

    def __init__(self, folder: Path, out: str, die_at: int = 0) -> None:
        config = tiny_config(folder, out)
        options = {name: getattr(config, name) for name in "student teacher data out batch_size lr amp device".split()}
        options |= dict(steps=STEPS, save_every=SAVE_EVERY, keep_checkpoints=KEEP, log_every=3, workers=1)
        options |= dict(val_data=folder / "pictures", val_every=7, val_images=4)
        named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
        arguments = ["distill", *(word for pair in named for word in pair)]
        self._steps, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.Process(target=_run, args=(arguments, theirs, die_at))
        self.process.start()
        theirs.close()

    def steps(self, count: int | None = None) -> int:
        """Waits for so many more steps, or for the end; how many there were."""
        seen = 0
        while seen != count:
            if self._steps.poll(0.01):
                try:
                    self._steps.recv_bytes()
                except EOFError:
                    break
                seen += 1
            elif not self.process.is_alive() and not self._steps.poll():
                break
        return seen

    def exit_code(self) -> int:
        """Waits for the end; -N where signal N killed it."""
        self.process.join()
        return self.process.exitcode


def _run(arguments: list[str], steps: multiprocessing.connection.Connection, die_at: int) -> None:
    original, operations = Reporter.step, []

    def step(self) -> None:
        original(self)
        steps.send_bytes(b".")

    def count(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and "checkpoints" in str(arguments[0]):
            operations.append(event)
            if len(operations) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    Reporter.step = step
    HeldOut.draw = lambda self, run: None  # takes longer than all the rest
    if die_at:
        sys.addaudithook(count)
    fastkd.cli.main(arguments)


def newest(run: Path) -> int:
    """Step of the newest good checkpoint; 0 without one."""
    good = checkpoint.find(run)
    return 0 if good is None else checkpoint.step_of(good)


def kill(folder: Path, how: str | signal.Signals, chance: random.Random, a_step: float) -> None:
    """Starts the run where it was, kills it somewhere and checks that nothing beyond the last checkpoint is lost."""
    before = newest(folder / "killed")
    if how == "in a file operation":
        run = Run(folder, "killed", die_at=chance.randint(1, 80))
        done, expected = run.steps(), -signal.SIGKILL
    else:
        asked = how != signal.SIGKILL
        run = Run(folder, "killed")
        done = run.steps(chance.randint(int(asked), 4))
        time.sleep(chance.uniform(0, 2) * a_step)
        os.kill(run.process.pid, how)
        done += run.steps()
        expected = 128 + how if asked else -how
    code = run.exit_code()
    after = newest(folder / "killed")
    print(f"{how!s}: exit code {code}, step {before} + {done}, checkpoint of step {after}", flush=True)
    assert code == expected
    assert after == before + done if expected > 0 else before + done - SAVE_EVERY <= after <= before + done
    assert len(list((folder / "killed/checkpoints").glob("step_*"))) <= KEEP + 1


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    chance = random.Random(5)
    start = time.perf_counter()
    whole = Run(folder, "whole")
    assert whole.steps() == STEPS and whole.exit_code() == 0
    a_step = (time.perf_counter() - start) / STEPS
    for how in chance.sample(KILLS, len(KILLS)):
        kill(folder, how, chance, a_step)
    last = Run(folder, "killed")
    assert last.steps() > 0 and last.exit_code() == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
