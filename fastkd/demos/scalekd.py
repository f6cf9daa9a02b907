"""Demo of ScaleKD: a small vision transformer teaches a small convolutional network with few labels.

The teacher learns from 1,197 of scikit-learn's handwritten digits, the student from 100 of them; the other 600 judge.
What ScaleKD adds stands beside what could explain its gain away: cross entropy with the teacher's hard labels, classic
distillation, ScaleKD's own loss on logits without its features, and ScaleKD without each of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.methods.kd import KD
from fastkd.methods.scalekd import ScaleKD
from fastkd.models.saving import write_safetensors
from fastkd.train.optimizer import adamw, set_lr
from fastkd.train.schedule import lr_at

from .compare import Arm, Claim, CompareConfig, compare, tune
from .pictures import Pictures
from .training import one_thread, seeded, statistics

CLASSES, SIZE, HELD_OUT = 10, 8, 600
TEACHER = dict(img_size=SIZE, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=64, depth=4, num_heads=4,
               class_token=False, global_pool="avg")  # fmt: skip
UNTRAINED, CE, HARD, KD_BEST, LOGITS, NO_TPP, NO_ALT, FULL = (
    "untrained", "CE", "CE with the teacher's hard labels", "CE + KL, best T", "ScaleKD's loss on logits alone",
    "ScaleKD without the teacher's tail", "ScaleKD without the alternative view", "ScaleKD",
)  # fmt: skip
# Chosen by --tune; `alpha` scales both factors of the feature losses, 1 is as released. The teacher's hard labels take
# the settings of CE, and what leaves a part of ScaleKD out those of ScaleKD.
_CE, _FULL = dict(lr=1e-2), dict(lr=1e-2, alpha=1.0)
CHOSEN: dict[str, dict[str, float]] = {
    UNTRAINED: {},
    CE: _CE,
    HARD: _CE,
    KD_BEST: dict(lr=3e-2, temperature=2.0),
    LOGITS: dict(lr=3e-2),
    NO_TPP: _FULL,
    NO_ALT: _FULL,
    FULL: _FULL,
}
_RATES = [dict(lr=lr) for lr in (3e-3, 1e-2, 3e-2)]
CANDIDATES: dict[str, list[dict[str, float]]] = {
    CE: _RATES,
    LOGITS: _RATES,
    KD_BEST: [dict(lr=lr, temperature=t) for lr in (1e-2, 3e-2) for t in (2.0, 4.0)],
    FULL: [dict(lr=lr, alpha=a) for lr, a in ((3e-3, 0.1), (1e-2, 0.1), (1e-2, 1.0), (3e-2, 0.1))],
}


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """Distil a small vision transformer into a small convolutional network with few labelled pictures."""

    out: Path = Path("runs/demo_scalekd")
    """Folder for rows, tables and the trained teacher; finished rows of the same settings are kept."""
    labels: int = 100
    """Labelled pictures of the student, of the teacher's 1,197."""
    steps: int = 100
    """Steps of the student, 32 pictures each."""
    teacher_steps: int = 400
    """Steps of the teacher, 64 pictures each."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done, with ScaleKD no more than a point behind cross entropy alone."""
    if config.quick:
        config.steps = config.teacher_steps = 3
    study = Study(config)
    if config.tune:
        return tune("scalekd", CANDIDATES, lambda *arguments: study.run(*arguments)["accuracy"], config)
    arms = [Arm(name, functools.partial(study.run, name, CHOSEN[name])) for name in CHOSEN]
    settings = {name: getattr(config, name) for name in ("labels", "steps", "teacher_steps")}
    return compare(
        "scalekd", arms, config, baseline=CE, settings={**settings, "chosen": CHOSEN},
        claims=[Claim(CE, UNTRAINED, 0.5), Claim(FULL, CE, -0.01)],
        title=f"digits, {config.labels} labels; the teacher: {study.accuracy():.1%}",
    )  # fmt: skip


class Student(nn.Module):
    """A convolutional network of 18,000 parameters: 8 x 8, 4 x 4 and 2 x 2 positions."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()

        def layer(before: int, after: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
            )

        self.mean, self.std = mean, std
        self.stem = layer(1, 8, 1)
        self.stage3 = nn.Sequential(layer(8, 16, 2), layer(16, 16, 1))
        self.stage4 = nn.Sequential(layer(16, 32, 2), layer(32, 32, 1))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stage4(self.stage3(self.stem(images))).mean((2, 3)))


class Study:
    """The arms. All share, by seed, the labelled pictures, initial weights and batches."""

    def __init__(self, config: Config) -> None:
        self.config = config
        everything = digits()
        self.train, self.test = everything.subset(slice(HELD_OUT, None)), everything.subset(slice(HELD_OUT))
        self.statistics = statistics(self.train.images)
        self.teacher = functools.cache(self._teacher)

    def accuracy(self) -> float:
        """Of the teacher, held out."""
        return self._judge(self.teacher())

    def run(self, arm: str, setting: Mapping[str, float], seed: int) -> dict[str, float]:
        """Held-out accuracy of the student of an arm, in [0, 1]."""
        self.teacher()  # made before anything is drawn
        pictures = self.train.balanced(self.config.labels // CLASSES, seed)
        with seeded(seed):
            student = Student(**self.statistics)
        with seeded(seed + 1000):  # projectors: the same student whatever is drawn here
            method = self._method(arm, setting, student)
            if arm == HARD:
                pictures = pictures._replace(labels=self._labels(pictures.images))
            if arm != UNTRAINED:
                fit(method, pictures, self.config.steps, 32, setting["lr"], seed)
        return {"accuracy": self._judge(student)}

    def _method(self, arm: str, setting: Mapping[str, float], student: Student) -> nn.Module:
        if arm in (UNTRAINED, CE, HARD):
            return KD(student, None)
        teacher = self.teacher()
        if arm == KD_BEST:
            return KD(student, teacher, "kd", ce_weight=0.5, weight=0.5, temperature=setting["temperature"])
        if arm == LOGITS:
            return KD(student, teacher, "kd", ce_weight=0.5, weight=0.5, temperature=1.0)
        alpha = (0.08 * setting["alpha"], 0.0 if arm == NO_ALT else 0.06 * setting["alpha"])
        taps = {"student": ("stage3", "stage4")}
        return ScaleKD(student, teacher, taps=taps, alpha=alpha, perception=arm != NO_TPP, in_chans=1)

    def _teacher(self) -> nn.Module:
        """The trained teacher, from `config.out` where it was made before with the same settings."""
        from timm.models.vision_transformer import VisionTransformer

        with seeded(0):
            model = VisionTransformer(**TEACHER)
            nn.init.normal_(model.pos_embed, std=0.3)  # timm's 0.02 takes thousands of steps to tell positions apart
            model.mean, model.std = self.statistics["mean"], self.statistics["std"]
            settings = json.dumps([TEACHER, self.config.teacher_steps])
            name = hashlib.sha256(settings.encode()).hexdigest()[:12]
            path = self.config.out / f"teacher_{name}.safetensors"
            if path.exists():
                from safetensors.torch import load_model

                load_model(model, path)
            else:
                with one_thread():
                    fit(KD(model, None), self.train, self.config.teacher_steps, 64, 1e-3, seed=0)
                self.config.out.mkdir(parents=True, exist_ok=True)
                write_safetensors(model.state_dict(), path, {}, {})
        return model.eval()

    @torch.no_grad()
    def _labels(self, images: Tensor) -> Tensor:
        """The teacher's classes."""
        teacher = self.teacher()
        return teacher(KD(teacher, None).prepare(images)).argmax(1)

    @torch.no_grad()
    def _judge(self, model: nn.Module) -> float:
        model = model.eval()
        prepare = KD(model, None).prepare
        right = [
            model(prepare(x)).argmax(1) == y for x, y in zip(self.test.images.split(500), self.test.labels.split(500))
        ]
        return torch.cat(right).float().mean().item()


def fit(method: nn.Module, pictures: Pictures, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Trains in place: AdamW, warm-up over a tenth of the steps, half a cosine; batches depend on the seed alone."""
    random = torch.Generator().manual_seed(seed)
    optimizer = adamw(method, lr, weight_decay=0.05)
    method.train()
    for step in range(steps):
        set_lr(optimizer, lr_at(step + 0.5, lr=lr, warmup_epochs=steps / 10, epochs=steps))
        index = torch.randint(len(pictures.labels), (batch_size,), generator=random)
        loss = method(pictures.images[index], pictures.labels[index])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def digits() -> Pictures:
    """scikit-learn's 1,797 digits, 8 x 8, in an order of their own."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / data.images.max())).round().to(torch.uint8)[..., None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Pictures(images[order], torch.from_numpy(data.target)[order], tuple(map(str, range(CLASSES))))
