"""Demo of DMAE: a small student learns from a masked-autoencoder teacher, beside the same student without one.

Both get the same initial weights, batches, masks and number of steps; no labels. Their features, and those of the
untrained student and of the teacher, are then judged on held-out pictures by nearest neighbours and a linear probe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkd.evaluation.pictures import evaluate, features, knn_accuracy, pixel_scores
from fastkd.methods.dmae import DMAE
from fastkd.models.checkpoints import load_vit
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.vit import VisionTransformer
from fastkd.train.config import ConfigError, problem

from . import dmae_report, pictures
from .pictures import ASSETS, Pictures
from .report import MARKERS, around_markers
from .results import Results
from .training import Recipe, fit, masked_autoencoder, one_thread, seeded, statistics

TEACHER = ASSETS / "fashion_mnist_mae.safetensors"
# What is compared: arguments of the student and of DMAE that differ from the plain distillation.
METHODS: dict[str, dict[str, Any]] = {"MAE": dict(teacher=False), "DMAE": {}}
OPTIONS: dict[str, dict[str, Any]] = {
    "decode_fraction=0.25": dict(method=dict(decode_fraction=0.25)),
    'decoder="cross"': dict(student=dict(decoder="cross")),
    "decoder_depth=1": dict(student=dict(decoder_depth=1)),
    # Aligned at the last block: a block behind the aligned one would never be trained.
    "reconstruct=False": dict(method=dict(reconstruct=False), last_block=True),
}
CURVE_POINTS = 4


@dataclasses.dataclass(kw_only=True)
class Config:
    """Distil a small student from a masked-autoencoder teacher and compare it with plain MAE on held-out pictures."""

    out: Path = Path("runs/demo_dmae")
    """Folder for tables, figures and the exported students."""
    full: bool = False
    """75, 90, 95 and 98 % masking with 5 seeds on all 60,000 pictures (needs --fashion), and the inexact options at 75
    and 95 %; finished runs in --out are kept, so it can be continued."""
    fashion: Path | None = None
    """Folder with the four *-ubyte.gz files of Fashion-MNIST (Debian: /usr/share/datasets/fashion-mnist from the
    package dataset-fashion-mnist) instead of the embedded 8,000 pictures."""
    data: Path | None = None
    """Any image folder instead, one folder per class (its first level)."""
    size: int = 28
    """Side in pixels to which the pictures of --data are resized; a multiple of the teacher's patch."""
    teacher: str | None = None
    """Another teacher: a checkpoint or anything else that fastkd.models.load_vit takes; it decides between grey and
    colour. Default: the embedded one, grey, patch 4, pre-trained on Fashion-MNIST."""
    ratios: tuple[float, ...] | None = None
    """Mask ratios; default 0.75 0.95."""
    seeds: tuple[int, ...] | None = None
    """Seeds of initial weights, batches and masks; default 0."""
    steps: int = 400
    """Training steps of each run."""
    batch_size: int = 64
    """Pictures per step."""
    lr: float = 8e-3
    """Peak learning rate with a teacher."""
    mae_lr: float = 1e-3
    """Peak learning rate of plain MAE, which does best with a smaller one."""
    alpha: float = 30.0
    """Weight of the alignment loss."""
    width: int = 64
    """Width of the student."""
    depth: int = 4
    """Blocks of the student."""
    heads: int = 4
    """Attention heads of the student."""
    device: str = "cpu"
    """cpu or cuda."""
    markdown: Path | None = None
    """File between whose marker lines the results are written as Markdown."""

    def validate(self) -> None:
        """Raises `ConfigError` with everything that is wrong."""
        wrong = []
        if self.full and not self.fashion and not self.data:
            wrong.append(
                problem("full", "no --fashion", "--fashion FOLDER with all of Fashion-MNIST", pictures.HOW_TO_GET)
            )
        if self.fashion and self.data:
            wrong.append(problem("data", self.data, "either --data or --fashion"))
        for name in ("steps", "batch_size", "lr", "mae_lr", "alpha", "width", "depth", "heads", "size"):
            if not getattr(self, name) > 0:
                wrong.append(problem(name, getattr(self, name), "a positive number"))
        for ratio in self.ratios or ():
            if not 0 < ratio < 1:
                wrong.append(problem("ratios", ratio, "numbers between 0 and 1", "for 95 % write 0.95"))
        if self.heads > 0 and self.width % (8 * self.heads):
            wrong.append(problem("width", self.width, f"a multiple of 8 x --heads {self.heads}"))
        if self.device != "cpu" and not torch.cuda.is_available():
            wrong.append(problem("device", self.device, "cpu", "torch finds no GPU"))
        if self.markdown and around_markers(self.markdown) is None:
            wrong.append(problem("markdown", self.markdown, f"a file with the lines {' and '.join(MARKERS)}"))
        if wrong:
            raise ConfigError(wrong)


def main(config: Config) -> int:
    """Runs the demo; 0 when done."""
    config.validate()
    _require("sklearn", "matplotlib", "timm")
    Demo(config).run()
    return 0


class Demo:
    """One run of the demo.

    Attributes:
        ratios, seeds, option_ratios: what is run; options are tried at `option_ratios` only.
        train, test, probe: all pictures, and those of them that the probes are fitted and tested on.
        teacher: the whole teacher; aligned: the pair of blocks (student, teacher).
        results: scores so far.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(width=None if sys.stdout.isatty() else 100)
        self.ratios = config.ratios or ((0.75, 0.90, 0.95, 0.98) if config.full else (0.75, 0.95))
        self.seeds = config.seeds or (tuple(range(5)) if config.full else (0,))
        self.option_ratios = tuple(r for r in (0.75, 0.95) if config.full and r in self.ratios)
        self.device = torch.device(config.device)
        self.out = Path(config.out).expanduser()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            full_set = pictures.fashion(config.fashion) if config.fashion else None
            self.teacher = load_vit(config.teacher or TEACHER, img_size=config.size if config.data else None)
            self.train, self.test = full_set or self._pictures()
        except (OSError, ValueError) as error:
            raise ConfigError([str(error)]) from error
        self.teacher = self.teacher.to(self.device)
        self.probe = self.train, self.test
        if not config.data:
            self.probe = self.train.balanced(600, seed=0), self.test.balanced(500 if config.full else 200, seed=0)
        self.curve_probe = self.probe[0].subset(slice(1000)), self.probe[1].subset(slice(1000))
        self.images = self.train.images.to(self.device)
        self.statistics = statistics(self.train.images)
        self.aligned = three_quarters(config.depth), three_quarters(self.teacher.depth)
        self.options = OPTIONS
        self.results = Results(self.out / "results.jsonl", self._settings(), keep=config.full)
        self._stop = threading.Event()

    def _pictures(self) -> tuple[Pictures, Pictures]:
        if self.config.data:
            return pictures.folder(self.config.data, self.config.size, self.teacher.in_chans)
        return pictures.embedded()

    def _settings(self) -> dict[str, Any]:
        """What decides a run's numbers, besides its mask ratio and seed."""
        fields = dataclasses.asdict(self.config)
        for name in ("out", "markdown", "ratios", "seeds", "device"):
            del fields[name]
        return json.loads(json.dumps(fields, default=str))

    def run(self) -> None:
        source = Path(self.config.data).name if self.config.data else "Fashion-MNIST"
        sizes = f"{len(self.train.labels):,} pictures to learn from without labels, {len(self.test.labels):,} held out"
        self.console.print(f"[bold]DMAE on {source}[/]: {sizes}")
        jobs = [(name, ratio, seed) for ratio in self.ratios for seed in self.seeds for name in METHODS]
        if self.option_ratios:
            jobs += [(name, r, seed) for r in self.option_ratios for seed in self.seeds for name in OPTIONS]
        results = self.results
        with one_thread(), self._progress() as progress:
            if self.config.full and ("raw pixels", None, 0) not in results:
                results.add("raw pixels", None, 0, pixel_scores(*self.probe))
            if ("teacher", None, 0) not in results:
                results.add("teacher", None, 0, evaluate(self.teacher, *self.probe))
            for seed in self.seeds:
                if ("untrained", None, seed) not in results:
                    results.add("untrained", None, seed, evaluate(self.student(seed), *self.probe))
            self._train_all([job for job in jobs if job not in results], progress)
            dmae_report.write(self)

    def _train_all(self, jobs: list[tuple[str, float, int]], progress: Progress) -> None:
        """Trains side by side, one run per CPU core; on a GPU one after the other."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = ThreadPoolExecutor(min(cores, 8) if self.device.type == "cpu" else 1)
        try:
            for future in [pool.submit(self._train, *job, progress) for job in jobs]:
                future.result()
        finally:  # also after an error or Ctrl-C: the other runs end at their next step
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def student(self, seed: int, **changes: Any) -> MaskedAutoencoderViT:
        """A new student; its initial weights depend on the seed alone."""
        config, teacher = self.config, self.teacher
        shape = dict(
            img_size=teacher.img_size, patch_size=teacher.patch_size, in_chans=teacher.in_chans,
            embed_dim=config.width, depth=config.depth, num_heads=config.heads,
            decoder_embed_dim=config.width // 2, decoder_depth=2, decoder_num_heads=config.heads,
            **self.statistics,
        )  # fmt: skip
        return masked_autoencoder({**shape, **changes}, seed).to(self.device)

    def _method(self, name: str, seed: int) -> DMAE:
        change = {**METHODS, **OPTIONS}[name]
        student = self.student(seed, **change.get("student", {}))
        if not change.get("teacher", True):
            return DMAE(student, None)
        ours, theirs = student.depth - 1 if change.get("last_block") else self.aligned[0], self.aligned[1]
        with seeded(seed):  # the projector
            method = DMAE(
                student, self.teacher, (ours,), (theirs,), alpha=self.config.alpha, **change.get("method", {})
            )
        return method.to(self.device)

    def _train(self, name: str, ratio: float, seed: int, progress: Progress) -> None:
        method = self._method(name, seed)
        task = progress.add_task(f"{name} {100 * ratio:g} % seed {seed}", total=self.config.steps, status="")
        curve: list[tuple[int, float]] = []
        losses: dict[str, float] = {}

        def after_step(step: int, now: dict[str, float]) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            for key, value in now.items():
                losses[key] = 0.95 * losses.get(key, value) + 0.05 * value
            status = " ".join(f"{key.removesuffix('_loss')} {value:.4f}" for key, value in losses.items() if value)
            progress.update(task, completed=step, status=status)
            if seed == self.seeds[0] and step % max(1, self.config.steps // CURVE_POINTS) == 0:
                curve.append((step, self.knn(method.student)))

        lr = self.config.mae_lr if method.teacher is None else self.config.lr
        recipe = Recipe(self.config.steps, self.config.batch_size, lr)
        seconds = fit(method, self.images, ratio, recipe, seed, after_step)
        scores = evaluate(method.student, *self.probe)
        self.results.add(name, ratio, seed, scores, seconds=seconds, curve=curve, **losses)
        progress.update(task, status=f"kNN {scores.knn:.1%} linear {scores.linear:.1%}")
        if not self.console.is_terminal:
            found = f"kNN {scores.knn:.1%}, linear {scores.linear:.1%}"
            self.console.print(f"{name} at {100 * ratio:g} %, seed {seed}: {found}, {seconds:.0f} s of training")
        if len(self.seeds) > 1:
            progress.remove_task(task)
        if name == "DMAE" and seed == self.seeds[0]:
            dmae_report.keep_student(self, method.student.eval(), ratio)

    def knn(self, model: VisionTransformer) -> float:
        """kNN accuracy on 1,000 and 1,000 pictures, for the curves."""
        train, test = self.curve_probe
        return knn_accuracy(features(model, train.images), train.labels, features(model, test.images), test.labels)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip


def three_quarters(depth: int) -> int:
    """Index of the block that ends three quarters of the depth, rounded up: 2 of 4, 4 of 6, 8 of 12, 17 of 24."""
    return math.ceil(0.75 * depth) - 1


def _require(*modules: str) -> None:
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"fastkd demo: {', '.join(missing)} not found; pip install 'fastkd[demos]' brings what the demos need")
