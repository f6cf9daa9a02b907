"""Demo of self-distillation for further pre-training: from clothes to handwritten digits with few pictures.

A masked autoencoder that was pre-trained on the 60,000 pictures of Fashion-MNIST is pre-trained further on 200 digits
of scikit-learn without their labels, then fine-tuned on 100 labels and judged on the 1,597 other digits. Does
self-distillation (phase 1, then phase 2) make more of the 200 pictures than plain further pre-training (phase 1)?
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.methods.self_distillation import ClassTokenClassifier, FurtherPretrainer, fine_tuning_groups
from fastkd.methods.teacher_vectors import precompute_teacher
from fastkd.models.checkpoints import load_vit
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.train.optimizer import adamw, set_lr

from .compare import ACCURACY, Arm, Claim, CompareConfig, Metric, compare, tune
from .pictures import ASSETS
from .training import seeded

THETA_0 = ASSETS / "fashion_mnist_mae.safetensors"
SIZE = 16  # pixels to which the 8 x 8 digits are enlarged: 16 patches of the model's 4 x 4
NONE, PLAIN, LONGER, SELF, SCRATCH = (
    "no further pre-training", "phase 1", "phase 1, twice as long", "phase 2", "no pre-training",
)  # fmt: skip
# Chosen by --tune.
CHOSEN: dict[str, dict[str, float]] = {
    SCRATCH: dict(fine_tuning_lr=1e-3),
    PLAIN: dict(lr=2.5e-4),
    NONE: dict(fine_tuning_lr=1e-3),
    LONGER: dict(lr=2.5e-4),
    SELF: dict(lr=2.5e-4, weight=1.0),
}
CANDIDATES: dict[str, list[dict[str, float]]] = {
    SCRATCH: [dict(fine_tuning_lr=1e-3), dict(fine_tuning_lr=3e-3)],
    NONE: [dict(fine_tuning_lr=3e-4), dict(fine_tuning_lr=1e-3), dict(fine_tuning_lr=3e-3)],
    PLAIN: [dict(lr=2.5e-4), dict(lr=5e-4), dict(lr=1e-3), dict(lr=1e-4)],
    LONGER: [dict(lr=2.5e-4), dict(lr=5e-4), dict(lr=1e-3), dict(lr=1e-4)],
    SELF: [dict(lr=2.5e-4, weight=1.0), dict(lr=5e-4, weight=1.0)],  # the published weight
}
DISTANCE = Metric("log2_distance", "log2 of the squared distance", percent=False)


@dataclasses.dataclass(kw_only=True)
class Config(CompareConfig):
    """Pre-train a model of clothes further on a few unlabelled digits, by itself and with self-distillation."""

    out: Path = Path("runs/demo_selfdist")
    """Folder for rows and tables; finished rows of the same settings are kept, so that a run can be continued."""
    pictures: int = 200
    """Unlabelled digits for further pre-training."""
    labels: int = 100
    """How many of them have a label in fine-tuning."""
    steps: int = 150
    """Steps of 32 pictures in each phase."""
    fine_tuning_steps: int = 80
    """Steps of 32 pictures on the labels."""


def main(config: Config) -> int:
    """Runs the demo; 0 when done and the distance to the teacher fell as it must."""
    if config.quick:
        config.steps = config.fine_tuning_steps = 3
    study = Study(config)
    if config.tune:
        return tune(
            "selfdist", CANDIDATES, lambda arm, setting, seed: study.run(arm, setting, seed)["accuracy"], config
        )
    arms = [Arm(name, functools.partial(study.run, name, CHOSEN[name])) for name in CHOSEN]
    claims = [Claim(NONE, SELF, math.log2(5), DISTANCE.key)]
    settings = {name: getattr(config, name) for name in ("pictures", "labels", "steps", "fine_tuning_steps")}
    return compare(
        "selfdist", arms, config, baseline=PLAIN, settings={**settings, "chosen": CHOSEN}, metrics=(ACCURACY, DISTANCE),
        claims=claims, title="Fashion-MNIST -> digits",
    )  # fmt: skip


class Study:
    """The arms. All share, by seed, the split of the digits, batches, masks, and the head's initial weights."""

    batch_size = 32

    def __init__(self, config: Config) -> None:
        self.config = config
        self.images, self.labels = digits()
        self.theta_0 = load_vit(THETA_0, img_size=SIZE)
        self.judged = slice(200 if config.quick else None)
        self.phase_1 = functools.lru_cache(maxsize=4)(self._phase_1)

    def run(self, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
        """Held-out accuracy after fine-tuning, and the distance of the class tokens to those of phase 1."""
        pictures = self._split(seed)[0]
        teacher = None if arm == SCRATCH else self.phase_1(seed, setting["lr"] if arm == PLAIN else CHOSEN[PLAIN]["lr"])
        if arm == SCRATCH:
            with seeded(seed):
                model = copy.deepcopy(self.theta_0)
                model.init_weights()
        elif arm == NONE:
            model = copy.deepcopy(self.theta_0)
        elif arm == PLAIN:
            model = teacher
        elif arm == LONGER:
            model = self._pretrain(seed, 2 * self.config.steps, setting["lr"])
        else:
            vectors = precompute_teacher(teacher, [self.images[pictures]])
            model = self._pretrain(seed, self.config.steps, setting["lr"], vectors, setting["weight"])
        found = {}
        if arm in (NONE, LONGER, SELF):
            ours, theirs = (precompute_teacher(m, [self.images[pictures]]) for m in (model, teacher))
            found[DISTANCE.key] = math.log2((ours - theirs).square().sum(1).mean())
        lr = setting.get("fine_tuning_lr", CHOSEN[NONE]["fine_tuning_lr"])
        return {"accuracy": self._fine_tune(seed, copy.deepcopy(model), lr), **found}

    def _split(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices: unlabelled pictures, the labelled ones among them (balanced), held out."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        pictures, held_out = order[: self.config.pictures], order[self.config.pictures :][self.judged]
        each = self.config.labels // 10
        labelled = torch.cat([pictures[self.labels[pictures] == digit][:each] for digit in range(10)])
        return pictures, labelled, held_out

    def _phase_1(self, seed: int, lr: float) -> MaskedAutoencoderViT:
        return self._pretrain(seed, self.config.steps, lr)

    def _pretrain(
        self, seed: int, steps: int, lr: float, vectors: Tensor | None = None, weight: float = 1.0
    ) -> MaskedAutoencoderViT:
        """One phase from theta_0; phase 2 with the teacher's vectors. AdamW, linear decay to 0, no warm-up."""
        random = torch.Generator().manual_seed(seed)
        pictures = self._split(seed)[0]
        method = FurtherPretrainer(
            copy.deepcopy(self.theta_0), "teacher" if vectors is None else "student", teacher_cache=vectors,
            weight=weight, norm_pix_loss=self.theta_0.norm_pix_loss,
        ).train()  # fmt: skip
        optimizer = adamw(method, lr, weight_decay=0.01)
        for step in range(steps):
            set_lr(optimizer, lr * (1 - step / steps))
            index = torch.randint(len(pictures), (self.batch_size,), generator=random)
            noise = torch.rand(self.batch_size, self.theta_0.num_patches, generator=random)
            result = method(self.images[pictures[index]], noise=noise, index=index)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
        return method.student.eval()

    def _fine_tune(self, seed: int, encoder: MaskedAutoencoderViT, lr: float) -> float:
        """Phase 3; held-out accuracy in [0, 1]."""
        _, labelled, held_out = self._split(seed)
        random, steps = torch.Generator().manual_seed(seed), self.config.fine_tuning_steps
        with seeded(seed):  # the head, and dropout
            model = ClassTokenClassifier(encoder, 10).train()
            optimizer = torch.optim.AdamW(fine_tuning_groups(model), lr, fused=True)
            for step in range(steps):
                set_lr(optimizer, lr * min((step + 1) / (0.05 * steps), 1 - step / steps))
                index = labelled[torch.randint(len(labelled), (self.batch_size,), generator=random)]
                loss = F.cross_entropy(model(self.images[index]), self.labels[index])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        model.eval()
        with torch.no_grad():
            right = [model(self.images[part]).argmax(1) == self.labels[part] for part in held_out.split(400)]
        return torch.cat(right).float().mean().item()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, enlarged: uint8 [N, 16, 16, 1], int64 [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images / data.images.max()).float()[:, None]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=False)
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), torch.from_numpy(data.target)
