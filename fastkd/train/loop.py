"""The training loop of ``fastkd distill``: read `_train` from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastkd.data import ImageLoader
from fastkd.models.ema import EMATeacher

from . import checkpoint, trackers
from .build import AMP, build_loader, build_optimizer, recompute_activations
from .config import ConfigError, DistillConfig, RunConfig, problem
from .distributed import Processes, processes
from .history import History, TrainingError, not_finite
from .host import keep_memory, same_bits
from .interrupt import Interrupt
from .optimizer import set_lr
from .reseed import reseed
from .resume import check_same_run, checkpoint_to_resume, how_to_go_on, restore, warn_of_damage
from .schedule import lr_at
from .step import TrainingStep, choose_graphs
from .track import Reporter, RunFolder, Stopwatch

logger = logging.getLogger("fastkd")


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        run: the run folder.
        step: optimiser steps done.
        finished: False where it was interrupted; the same call resumes it.
        exported: the student as a timm checkpoint (None while unfinished).
        signal: number of the signal that stopped it, 0 for none.
    """

    run: Path
    step: int
    finished: bool
    exported: Path | None
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """Of a command: 0 finished, 128 + signal stopped (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1)."""
        return 128 + self.signal if self.signal and not self.finished else 0


def distill(config: RunConfig) -> Result:
    """Trains a student; continues where the run folder holds an unfinished run.

    Under torchrun every process calls this with the same config.

    Raises:
        ConfigError: wrong arguments, all at once.
        TrainingError: the loss is not finite any more, or the end of the run could not be written.
    """
    problems = config.problems()
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(problem("device", config.device, "cpu or auto: torch sees no CUDA device here"))
    keep_memory()
    meeting = ("cpu",) if problems else (config.device, config.timeout_minutes, lambda: how_to_go_on(config.out))
    with processes(*meeting) as group:
        group.check(problems, config.as_dict())
        with same_bits(group.device):
            return _train(config, group)


def _train(config: RunConfig, group: Processes) -> Result:
    run, device = RunFolder(config.out, writes=group.is_main), group.device
    found, given = checkpoint_to_resume(config, run), config.as_dict()
    source = found.good
    method, config = config.build(device)
    recompute_activations(config, method)
    names = method.losses
    loader, config = build_loader(config, group)
    if source is not None and config.resume == "auto":
        check_same_run(config, given, run)
    graphs = choose_graphs(config, group)
    optimizer = build_optimizer(config, method, capturable=graphs is not None)
    amp = AMP[config.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    schedule = {name: getattr(config, name) for name in ("lr", "min_lr", "warmup_epochs", "epochs")}
    state = {} if source is None else restore(source, method, optimizer, scaler, loader)
    step, seconds = state.get("step", 0), state.get("seconds", 0.0)
    group.same({"out": f"a run at step {step}"}, "let all machines see one --out, on storage that they share")
    group.same({"data": loader.state_dict()}, "give all machines the same files")
    if config.shard_teacher:
        method.teacher.shard(group.mesh())
    model = group.wrap(method, find_unused=config.find_unused)
    train_step = TrainingStep(
        model, optimizer, config.mask_ratio if isinstance(config, DistillConfig) else None, names=names,
        reads=method.reads, amp=amp, accumulate=config.accumulate, scaler=scaler, clip_grad=config.clip_grad,
        guard=config.skip_nonfinite > 0, group=group, graphs=graphs,
    )  # fmt: skip
    history = History(
        train_step.names, len(names), scaler.is_enabled(), config.log_every, config.skip_nonfinite, group, run,
        loader.folder,
    )  # fmt: skip
    # All must look at a picture together where each holds a part of the teacher.
    looks = group.is_main or config.shard_teacher
    held_out = config.held_out(method, device, amp) if looks else None
    average = None
    if config.ema is not None and looks:
        average = EMATeacher(method.student, config.ema, buffers="ema", mode="eval")
    if state:
        history.load(state["history"], state.get("nonfinite", 0))
        if average is not None and "ema" in state:
            average.load_state_dict(state["ema"])
    del state  # copies of what was restored
    if group.is_main:
        try:
            run.begin(config.as_dict(), dict(given=given, classes=getattr(method, "classes", None)))
            checkpoint.clean(run.checkpoints)
            if config.resume == "auto":
                checkpoint.set_aside(folder for folder, _ in found.damaged)
            run.rewind(-1 if source is None else step)
            run.trackers = trackers.start(config.trackers, run.root, config.as_dict(), step)
        except OSError as error:
            raise ConfigError([problem("out", run.root, "a folder that can be written", str(error))]) from error
    group.barrier()

    def written(what: str, write: Callable[[], object]) -> bool:
        """Whether it could be written: a full disk does not end a run, whose older checkpoints are still good."""
        try:
            write()
        except OSError as error:
            logger.error("step %d: %s not written: %s", step, what, error)
            return False
        return True

    def save() -> bool:
        losses = history.read(step)
        if not all(norm.isfinite() for norm in torch._foreach_norm([p.detach() for p in method.parameters()])):
            raise TrainingError(not_finite(step, "weights are not finite", run))
        state = dict(
            step=step, history=losses, seconds=watch.seconds(), optimizer=optimizer.state_dict(),
            kind=type(optimizer).__name__, heads=method.training_state(), scaler=train_step.scaler.state_dict(),
            loader=loader.state_dict(), nonfinite=history.nonfinite,
        )  # fmt: skip
        if average is not None:
            state["ema"] = average.state_dict()
        saved = written("the metrics", run.sync) and written(
            "the checkpoint", lambda: checkpoint.save(run.checkpoints, method.student, state, config.keep_checkpoints)
        )
        written("the pictures", draw)
        return saved

    def export() -> None:
        line = checkpoint.export(method.student, run.exported)
        logger.info("finished after %d steps; the student as a timm checkpoint:\n  %s", step, line)
        if average is not None:
            line = checkpoint.export(average.model, run.exported_ema)
            logger.info("the average of its weights:\n  %s", line)

    def draw() -> None:
        held_out.draw(run)
        run.show(step)

    def evaluate() -> None:
        held_out.evaluate(run, step, loader.epoch)
        if average is not None and step > 0:
            with average.swapped(method.student):
                held_out.evaluate(run, step, loader.epoch, prefix="val_ema")

    reporter = Reporter(run.root / "train.log", config.steps, step, quiet=not group.is_main, losses=names)
    with (
        reporter,
        Interrupt(echo=10.0 if group.world_size > 1 else 0.0) as interrupt,
        contextlib.closing(iter(loader)) as batches,
        contextlib.closing(run),
        group.guard(),
    ):
        _announce(config, method, loader, group, step, source)
        warn_of_damage(found, step)
        if source is None and held_out is not None:
            evaluate()
        watch, last_save = Stopwatch(seconds), time.monotonic()
        interval_start, interval_wait = watch.seconds(), loader.wait_seconds
        stop = group.agreed(interrupt.pressed)
        while step < config.steps and not stop:
            lr = lr_at(loader.epoch, **schedule)
            set_lr(optimizer, lr)
            reseed(device, config.seed, step, group.rank)
            history.add(train_step(batches), train_step.indices)
            step += 1
            method.after_step(step)
            if average is not None:
                average.update(method.student, step - 1, train_step.left_out if train_step.guard else None)
            reporter.step()

            # Every log_every steps, and here alone, the host waits for the device.
            if history.filled >= config.log_every or step == config.steps:
                filled, found = history.filled, history.report(step)
                elapsed = watch.seconds() - interval_start
                row = dict(
                    step=step, epoch=loader.epoch, lr=lr, **found,
                    images_per_second=filled * config.accumulate * loader.global_batch / elapsed,
                    data_wait=(loader.wait_seconds - interval_wait) / elapsed,
                    skipped=group.total(loader.skipped), seconds=watch.seconds(),
                )  # fmt: skip
                interval_start, interval_wait = watch.seconds(), loader.wait_seconds
                if group.is_main:
                    run.add(row)
                    reporter.report(row)
            if held_out is not None and (step % config.val_every == 0 or step == config.steps):
                with watch.pause():
                    evaluate()
            if group.is_main:
                timed = time.monotonic() - last_save > 60 * config.save_minutes
                if timed or (config.save_every and step % config.save_every == 0):
                    with watch.pause():
                        save()
                    last_save = time.monotonic()
            stop = group.agreed(interrupt.pressed)

        finished, complete = step >= config.steps, True
        if group.is_main:
            complete = save()
            if finished:
                complete &= written("the exported student", export)
            elif complete:
                logger.info("stopped after step %d of %d; the same command continues from there", step, config.steps)
        group.barrier()  # a launcher ends all processes when the first one ends
        if not complete:
            fix = f"Make room where --out is: {how_to_go_on(run.root)}"
            raise TrainingError(f"step {step}: the end of the run is not written. {fix}")
    return Result(run.root, step, finished, run.exported if finished else None, stop)


def _announce(
    config: RunConfig, method: nn.Module, loader: ImageLoader, group: Processes, step: int, source: Path | None
) -> None:
    logger.info("%s", config.summary(method))
    logger.info(
        "%d images at %d x %d; %d x %s, precision %s",
        len(loader.folder), *config.img_size, group.world_size, group.device, config.amp,
    )  # fmt: skip
    effective = loader.global_batch * config.accumulate
    logger.info("%d steps of %d images (%.4g epochs), peak lr %.3g", config.steps, effective, config.epochs, config.lr)
    if source is not None:
        logger.info("continuing after step %d from %s", step, source)
