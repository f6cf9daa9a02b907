"""A run in progress: all that a config stands for, built anew or restored, and what the training loop does with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch

from fastkd.data import Batch
from fastkd.models.ema import EMATeacher

from . import checkpoint, trackers
from .build import AMP, build_loader, build_optimizer, recompute_activations
from .config import ConfigError, DistillConfig, RunConfig, problem
from .distributed import Processes
from .history import History, TrainingError, not_finite
from .optimizer import set_lr
from .reseed import reseed
from .resume import check_same_run, checkpoint_to_resume, how_to_go_on, restore, warn_of_damage
from .schedule import lr_at
from .step import TrainingStep, choose_graphs
from .track import Reporter, RunFolder, Stopwatch

logger = logging.getLogger("fastkd")


class Session:
    """One run in this process.

    Args:
        config: as given; the attribute of that name is resolved.
        group: the processes that train together.

    Attributes:
        run: the run folder; the main process writes it.
        method, loader, optimizer, train_step: what trains.
        history: losses since the last report.
        average: of the student's weights (--ema), in the processes that look at pictures; None without.
        held_out: what judges and draws, in the same processes; None elsewhere.
        reporter: log and progress bar.
        step: optimiser steps done.

    Raises:
        ConfigError: names, paths or sizes that do not fit, a folder that cannot be written, another run in it.
    """

    def __init__(self, config: RunConfig, group: Processes) -> None:
        self.group, self.run = group, RunFolder(config.out, writes=group.is_main)
        self._found, given = checkpoint_to_resume(config, self.run), config.as_dict()
        self.method, config = config.build(group.device)
        recompute_activations(config, self.method)
        self.loader, config = build_loader(config, group)
        self.config = config
        if self._found.good is not None and config.resume == "auto":
            check_same_run(config, given, self.run)
        graphs, amp = choose_graphs(config, group), AMP[config.amp]
        self.optimizer = build_optimizer(config, self.method, capturable=graphs is not None)
        scaler = torch.amp.GradScaler(group.device.type, enabled=amp == torch.float16)
        state = {}
        if self._found.good is not None:
            state = restore(self._found.good, self.method, self.optimizer, scaler, self.loader)
        self.step, self._seconds = state.get("step", 0), state.get("seconds", 0.0)
        group.same({"out": f"a run at step {self.step}"}, "let all machines see one --out, on storage that they share")
        group.same({"data": self.loader.state_dict()}, "give all machines the same files")
        if config.shard_teacher:
            self.method.teacher.shard(group.mesh())
        self.train_step = TrainingStep(
            group.wrap(self.method, find_unused=config.find_unused), self.optimizer,
            config.mask_ratio if isinstance(config, DistillConfig) else None, names=self.method.losses,
            reads=self.method.reads, amp=amp, accumulate=config.accumulate, scaler=scaler, clip_grad=config.clip_grad,
            guard=config.skip_nonfinite > 0, group=group, graphs=graphs,
        )  # fmt: skip
        self.history = History(
            self.train_step.names, len(self.method.losses), scaler.is_enabled(), config.log_every,
            config.skip_nonfinite, group, self.run, self.loader.folder,
        )  # fmt: skip
        # All must look at a picture together where each holds a part of the teacher.
        looks = group.is_main or config.shard_teacher
        self.held_out = config.held_out(self.method, group.device, amp) if looks else None
        self.average = None
        if config.ema is not None and looks:
            self.average = EMATeacher(self.method.student, config.ema, buffers="ema", mode="eval")
        if state:
            self.history.load(state["history"], state.get("nonfinite", 0))
            if self.average is not None and "ema" in state:
                self.average.load_state_dict(state["ema"])
        if group.is_main:
            self._open_folder(given)
        group.barrier()
        self.reporter = Reporter(
            self.run.root / "train.log", config.steps, self.step, quiet=not group.is_main, losses=self.method.losses
        )

    def _open_folder(self, given: dict) -> None:
        config, run = self.config, self.run
        try:
            run.begin(config.as_dict(), dict(given=given, classes=getattr(self.method, "classes", None)))
            checkpoint.clean(run.checkpoints)
            if config.resume == "auto":
                checkpoint.set_aside(folder for folder, _ in self._found.damaged)
            run.rewind(-1 if self._found.good is None else self.step)
            run.trackers = trackers.start(config.trackers, run.root, config.as_dict(), self.step)
        except OSError as error:
            raise ConfigError([problem("out", run.root, "a folder that can be written", str(error))]) from error

    def begin(self) -> None:
        """Says what will be done, judges the untrained student and starts the clock."""
        config, loader = self.config, self.loader
        logger.info("%s", config.summary(self.method))
        logger.info(
            "%d images at %d x %d; %d x %s, precision %s",
            len(loader.folder), *config.img_size, self.group.world_size, self.group.device, config.amp,
        )  # fmt: skip
        images = loader.global_batch * config.accumulate
        logger.info("%d steps of %d images (%.4g epochs), peak lr %.3g", config.steps, images, config.epochs, config.lr)
        if self._found.good is not None:
            logger.info("continuing after step %d from %s", self.step, self._found.good)
        warn_of_damage(self._found, self.step)
        self.watch = Stopwatch(self._seconds)
        if self._found.good is None:
            self.evaluate()
        self._last_save = time.monotonic()
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval = self.watch.seconds(), self.loader.wait_seconds

    def advance(self, batches: Iterator[Batch]) -> None:
        """One optimiser step."""
        config, step = self.config, self.step
        self.lr = lr_at(
            self.loader.epoch, lr=config.lr, min_lr=config.min_lr, warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
        )  # fmt: skip
        set_lr(self.optimizer, self.lr)
        reseed(self.group.device, config.seed, step, self.group.rank)
        self.history.add(self.train_step(batches), self.train_step.indices)
        self.step += 1
        self.method.after_step(self.step)
        if self.average is not None:
            left_out = self.train_step.left_out if self.train_step.guard else None
            self.average.update(self.method.student, step, left_out)
        self.reporter.step()

    def report(self) -> None:
        """A line of metrics over the steps since the last one. TrainingError where too many were not finite."""
        steps, found = self.history.filled, self.history.report(self.step)
        (start, waited), loader = self._interval, self.loader
        elapsed = self.watch.seconds() - start
        row = dict(
            step=self.step, epoch=loader.epoch, lr=self.lr, **found,
            images_per_second=steps * self.config.accumulate * loader.global_batch / elapsed,
            data_wait=(loader.wait_seconds - waited) / elapsed,
            skipped=self.group.total(loader.skipped), seconds=self.watch.seconds(),
        )  # fmt: skip
        self._begin_interval()
        if self.group.is_main:
            self.run.add(row)
            self.reporter.report(row)

    def evaluate(self) -> None:
        """Judges the student, and the average of its weights, on held-out images; the clock stands still."""
        if self.held_out is None:
            return
        with self.watch.pause():
            self.held_out.evaluate(self.run, self.step, self.loader.epoch)
            if self.average is not None and self.step > 0:
                with self.average.swapped(self.method.student):
                    self.held_out.evaluate(self.run, self.step, self.loader.epoch, prefix="val_ema")

    def save_is_due(self) -> bool:
        """Whether this process is to write a checkpoint now."""
        timed = time.monotonic() - self._last_save > 60 * self.config.save_minutes
        counted = self.config.save_every and self.step % self.config.save_every == 0
        return self.group.is_main and bool(timed or counted)

    def save(self) -> bool:
        """Writes a checkpoint and the pictures; the clock stands still. False where there was no room for it."""
        with self.watch.pause():
            saved = self._written("the metrics", self.run.sync) and self._written("the checkpoint", self._save)
            self._written("the pictures", self._draw)
        self._last_save = time.monotonic()
        return saved

    def _save(self) -> None:
        losses = self.history.read(self.step)
        if not all(norm.isfinite() for norm in torch._foreach_norm([p.detach() for p in self.method.parameters()])):
            raise TrainingError(not_finite(self.step, "weights are not finite", self.run))
        state = dict(
            step=self.step, history=losses, nonfinite=self.history.nonfinite, seconds=self.watch.seconds(),
            optimizer=self.optimizer.state_dict(), kind=type(self.optimizer).__name__,
            heads=self.method.training_state(), scaler=self.train_step.scaler.state_dict(),
            loader=self.loader.state_dict(),
        )  # fmt: skip
        if self.average is not None:
            state["ema"] = self.average.state_dict()
        checkpoint.save(self.run.checkpoints, self.method.student, state, self.config.keep_checkpoints)

    def _draw(self) -> None:
        self.held_out.draw(self.run)
        self.run.show(self.step)

    def _export(self) -> None:
        line = checkpoint.export(self.method.student, self.run.exported)
        logger.info("finished after %d steps; the student as a timm checkpoint:\n  %s", self.step, line)
        if self.average is not None:
            line = checkpoint.export(self.average.model, self.run.exported_ema)
            logger.info("the average of its weights:\n  %s", line)

    def _written(self, what: str, write: Callable[[], object]) -> bool:
        """Whether it could be written: a full disk does not end a run, whose older checkpoints are still good."""
        try:
            write()
        except OSError as error:
            logger.error("step %d: %s not written: %s", self.step, what, error)
            return False
        return True

    def end(self) -> None:
        """Saves, exports a finished student, and waits for the other processes.

        Raises:
            TrainingError: something could not be written.
        """
        complete = True
        if self.group.is_main:
            complete = self.save()
            if self.step >= self.config.steps:
                complete &= self._written("the exported student", self._export)
            elif complete:
                logger.info(
                    "stopped after step %d of %d; the same command continues from there", self.step, self.config.steps
                )
        self.group.barrier()  # a launcher ends all processes when the first one ends
        if not complete:
            fix = f"Make room where --out is: {how_to_go_on(self.run.root)}"
            raise TrainingError(f"step {self.step}: the end of the run is not written. {fix}")
