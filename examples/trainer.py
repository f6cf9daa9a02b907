"""Knowledge distillation in a Trainer of transformers, on the pictures of Fashion-MNIST that come with fastkd.

    pip install 'fastkd[models]' accelerate
    python examples/trainer.py --steps 400

A ViT learns the ten classes by the plain Trainer; then a smaller one learns from it and from the labels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
import tyro
from torch.utils.data import Dataset

from fastkd.demos import pictures
from fastkd.nn import KDLoss


class DistillationTrainer(transformers.Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.criterion = KDLoss(temperature=2, ce_weight=0.5, kd_weight=0.5)
        self.model_accepts_loss_kwargs = False  # the loss is a mean per batch: accumulation divides it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        loss = self.criterion(outputs.logits, teacher_logits, labels)
        return (loss, outputs) if return_outputs else loss


class Garments(Dataset):
    """Pictures as the models take them, in [-1, 1]."""

    def __init__(self, part: pictures.Pictures) -> None:
        self.pixels, self.labels = part.images.permute(0, 3, 1, 2) / 127.5 - 1, part.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(pixel_values=self.pixels[index], labels=self.labels[index])


def vit(width: int, depth: int) -> transformers.ViTForImageClassification:
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=28, patch_size=7, num_channels=1, num_labels=10, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=depth, num_attention_heads=width // 16,
    ))  # fmt: skip


@torch.no_grad()
def accuracy(model: transformers.PreTrainedModel, test: Garments) -> float:
    logits = model.eval()(test.pixels.to(model.device)).logits.cpu()
    return (logits.argmax(1) == test.labels).float().mean().item()


def main(steps: int = 400, batch_size: int = 64, out: Path = Path("runs/trainer")) -> tuple[float, float]:
    """Trains teacher and student; returns their accuracy on held-out pictures."""
    transformers.set_seed(0)
    train, test = map(Garments, pictures.embedded())
    options = transformers.TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=2e-3, warmup_steps=20,
        lr_scheduler_type="cosine", logging_steps=max(1, steps // 20), save_strategy="no", report_to=[],
    )  # fmt: skip
    teacher, student = vit(96, 4), vit(32, 2)
    transformers.Trainer(teacher, options, train_dataset=train).train()
    trainer = DistillationTrainer(student, options, train_dataset=train, teacher=teacher)
    trainer.train()
    trainer.save_model(out / "student")
    trainer.save_state()
    found = accuracy(teacher, test), accuracy(student, test)
    print("held-out accuracy: teacher {:.1%}, student {:.1%}".format(*found))
    return found


if __name__ == "__main__":
    tyro.cli(main)
