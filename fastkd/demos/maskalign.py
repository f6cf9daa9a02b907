"""Demo of MaskAlign: a student that sees 4 of 16 patches learns from a teacher that sees the whole picture.

A teacher is trained with labels on the 6,000 pictures of the Fashion-MNIST subset. Students never see a label: they
start from the same weights and see the same batches, and differ in what they learn from. Their features on whole,
held-out pictures are then judged by a linear probe and by nearest neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.evaluation.pictures import evaluate
from fastkd.methods import DMAE, MaskAlign
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.vit import VisionTransformer
from fastkd.train.optimizer import adamw, set_lr
from fastkd.train.schedule import lr_at

from . import pictures
from .compare import Arm, Claim, CompareConfig, Metric, compare, tune
from .training import masked_autoencoder, seeded, statistics

UNTRAINED, MAE, LABELS, DISTILLED, RANDOM, ATTENTION = (
    "untrained", "MAE", "CE on the teacher's labels", "DMAE", "MaskAlign, random masks", "MaskAlign, attention masks",
)  # fmt: skip
TEACHER = dict(embed_dim=64, depth=4, num_heads=4)
STUDENT = dict(embed_dim=32, depth=4, num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
PATCH, RATIO = 7, 0.7  # 16 patches, int(16 * 0.3) = 4 of them visible
PAIR = (2,)  # blocks that DMAE aligns: three quarters of both depths
# Chosen by --tune; MaskAlign's rate with random masks serves attention masks, too.
CHOSEN: dict[str, dict[str, float]] = {
    UNTRAINED: {},
    MAE: dict(lr=3e-3),
    LABELS: dict(lr=1.2e-2),
    DISTILLED: dict(lr=6e-3, alpha=100.0),
    RANDOM: dict(lr=1.2e-2),
    ATTENTION: dict(lr=1.2e-2),
}
RATES = [dict(lr=lr) for lr in (3e-3, 6e-3, 1.2e-2)]
CANDIDATES: dict[str, list[dict[str, float]]] = {
    MAE: RATES,
    LABELS: RATES,
    DISTILLED: [dict(rate, alpha=30.0) for rate in RATES[1:]] + [dict(lr=6e-3, alpha=100.0)],
    RANDOM: RATES,
}
METRICS = (Metric("linear", "linear probe, %"), Metric("knn", "kNN, %"))


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """Pre-train a small student without labels by MaskAlign, DMAE and plain MAE; compare features on whole pictures."""

    out: Path = Path("runs/demo_maskalign")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    steps: int = 250
    """Training steps of each student."""
    batch_size: int = 128
    """Pictures per step."""
    teacher_steps: int = 600
    """Training steps of the teacher; it is kept in the folder and trained once."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and MaskAlign is ahead of MAE as it must be."""
    if config.quick:
        config.steps, config.teacher_steps = 3, 2
    study = Study(config)
    if config.tune:
        return tune("maskalign", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["linear"], config)
    arms = [Arm(name, functools.partial(study.run, name, setting)) for name, setting in CHOSEN.items()]
    arms.append(Arm("teacher", lambda seed: study.teacher_scores, "one for all seeds, trained with labels"))
    settings = {name: getattr(config, name) for name in ("steps", "batch_size", "teacher_steps")}
    return compare(
        "maskalign", arms, config, baseline=MAE, settings={**settings, "chosen": CHOSEN}, metrics=METRICS,
        claims=[Claim(RANDOM, MAE, 0.08, "linear")], title="Fashion-MNIST, 4 of 16 patches visible in training",
    )  # fmt: skip


class Classifier(nn.Module):
    """A ViT with a linear head on the sum of its CLS token and the mean of its patches."""

    def __init__(self, vit: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.embed_dim, classes)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of uint8 images, or of their patches `ids_keep` alone."""
        tokens = self.vit(images, ids_keep).tokens
        return self.head(tokens[:, 0] + tokens[:, 1:].mean(1))


class Study:
    """The arms. All share the teacher and, by seed, initial weights, batches, and the noise behind the masks."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train, self.test = pictures.embedded()
        self.judged = (self.train, self.test)
        if config.quick:
            self.judged = self.train.balanced(20, seed=0), self.test.balanced(10, seed=0)
        self.shape = dict(img_size=28, patch_size=PATCH, in_chans=1, **statistics(self.train.images))
        self.teacher = self._teacher(Path(config.out) / f"teacher_{config.teacher_steps}.pt")

    @functools.cached_property
    def teacher_scores(self) -> dict[str, float]:
        return evaluate(self.teacher.vit, *self.judged)._asdict()

    @functools.cached_property
    @torch.no_grad()
    def teacher_labels(self) -> Tensor:
        """The teacher's class of every training picture."""
        return torch.cat([self.teacher(part).argmax(1) for part in self.train.images.split(500)])

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Held-out accuracy of both probes after one training."""
        student = masked_autoencoder({**self.shape, **STUDENT}, seed)
        with seeded(seed):  # heads and projectors
            model, loss = self._method(arm, setting, student)
        if arm != UNTRAINED:
            self._fit(model, setting["lr"], self.config.steps, seed, loss)
        trained = getattr(model, "student", student)
        return evaluate(trained, *self.judged)._asdict()

    def _method(
        self, arm: str, setting: Mapping[str, Any], student: MaskedAutoencoderViT
    ) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        """What is trained, and its loss for pictures by index and noise [B, 16]."""
        images, teacher = self.train.images, self.teacher.vit
        if arm == LABELS:
            model = Classifier(student, len(self.train.classes))
            return model, lambda index, _: F.cross_entropy(model(images[index]), self.teacher_labels[index])
        if arm in (RANDOM, ATTENTION):
            mask = "random" if arm == RANDOM else "attention"
            model = MaskAlign(student, teacher, RATIO, mask, layer_weights="top2")
            return model, lambda index, noise: model(images[index], noise=noise)["loss"]
        options = dict(teacher=None) if arm != DISTILLED else dict(teacher=teacher, alpha=setting["alpha"])
        model = DMAE(student, **options, student_blocks=PAIR, teacher_blocks=PAIR)
        return model, lambda index, noise: model(images[index], RATIO, noise)["loss"]

    def _fit(
        self, model: nn.Module, lr: float, steps: int, seed: int, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """AdamW, linear warm-up over a tenth of the steps, half a cosine to zero; batches and noise by the seed."""
        random = torch.Generator().manual_seed(seed)
        optimizer = adamw(model.train(), lr, weight_decay=0.05)
        for step in range(steps):
            set_lr(optimizer, lr_at(step + 0.5, lr=lr, warmup_epochs=steps / 10, epochs=steps))
            index = torch.randint(len(self.train.images), (self.config.batch_size,), generator=random)
            loss = loss_of(index, torch.rand(self.config.batch_size, 16, generator=random))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()

    def _teacher(self, path: Path) -> Classifier:
        """From the file, or trained: every second step shows it 8 random patches, as DMAE's teacher sees few, too."""
        with seeded(1000):
            model = Classifier(VisionTransformer(**self.shape, **TEACHER), len(self.train.classes))
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        images, labels, whole = self.train.images, self.train.labels, True

        def loss_of(index: Tensor, noise: Tensor) -> Tensor:
            nonlocal whole
            whole = not whole
            logits = model(images[index], None if whole else noise.argsort(1)[:, :8])
            return F.cross_entropy(logits, labels[index])

        self._fit(model, 2e-3, self.config.teacher_steps, 1000, loss_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model
