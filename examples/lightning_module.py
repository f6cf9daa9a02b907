"""DMAE as a LightningModule, on the pictures of Fashion-MNIST that come with fastkd.

    pip install 'fastkd[demos]' lightning
    python examples/lightning_module.py --steps 400

The student sees a quarter of each picture, no labels. How well it learned, its nearest neighbours say at the end.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
import tyro
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from fastkd.demos import pictures
from fastkd.demos.training import statistics
from fastkd.evaluation.pictures import features, knn_accuracy
from fastkd.methods import DMAE
from fastkd.models import MaskedAutoencoderViT, export_timm, load_vit
from fastkd.train import adamw, lr_at

TEACHER = pictures.ASSETS / "fashion_mnist_mae.safetensors"  # a masked autoencoder of 6 blocks


class Distillation(lightning.LightningModule):
    """`method` holds what trains, student and projectors; the teacher moves along and is in no checkpoint."""

    def __init__(self, student: MaskedAutoencoderViT, teacher: torch.nn.Module, mask_ratio: float, lr: float) -> None:
        super().__init__()
        self.method = DMAE(student, teacher, student_blocks=(2,), teacher_blocks=(4,), alpha=30)
        self.mask_ratio, self.lr = mask_ratio, lr

    def training_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (images,) = batch  # uint8 [B, H, W, C]: the ops normalise pixels themselves
        result = self.method(images, self.mask_ratio)
        self.log_dict({name: result[name] for name in self.method.losses}, prog_bar=True)
        return result["loss"]

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = adamw(self.method, self.lr)  # no decay of norms and biases
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_at(step, lr=1.0, warmup_epochs=steps / 10, epochs=steps)
        )
        return [optimizer], [dict(scheduler=rate, interval="step")]


def main(steps: int = 400, batch_size: int = 64, mask_ratio: float = 0.75, out: Path = Path("runs/lightning")) -> float:
    """Distils a student of 4 blocks; returns its kNN accuracy on held-out pictures."""
    lightning.seed_everything(0)
    train, test = pictures.embedded()
    student = MaskedAutoencoderViT(
        img_size=28, patch_size=4, in_chans=1, embed_dim=64, depth=4, num_heads=4,
        decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, **statistics(train.images),
    )  # fmt: skip

    def knn() -> float:
        sides = [(features(student, part.images), part.labels) for part in (train, test)]
        return knn_accuracy(*sides[0], *sides[1])

    before = knn()
    trainer = lightning.Trainer(max_steps=steps, logger=CSVLogger(out), log_every_n_steps=1)
    batches = DataLoader(TensorDataset(train.images), batch_size, shuffle=True, drop_last=True)
    trainer.fit(Distillation(student, load_vit(TEACHER), mask_ratio, lr=8e-3), batches)
    after = knn()
    print(f"kNN: {before:.1%} before, {after:.1%} after {steps} steps; the student for timm:")
    print(export_timm(student, out / "student_timm.safetensors"))
    return after


if __name__ == "__main__":
    tyro.cli(main)
