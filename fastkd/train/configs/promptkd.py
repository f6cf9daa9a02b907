"""``fastkd distill --method promptkd``: prompts of a large CLIP with a few labels, then of a small one without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastkd.train.config import ConfigError, RunConfig, problem

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(kw_only=True)
class PromptKDConfig(RunConfig):
    """Tune the prompts of a CLIP with labels (stage 1), or distil it into another one without labels (stage 2)."""

    method: Literal["promptkd"] = "promptkd"
    """What trains the student; fastkd distill --method NAME --help shows the options of another one."""
    student: str
    """Whose prompts learn: a folder of a transformers CLIPModel with its tokenizer."""
    teacher: str = "none"
    """none: stage 1, the class folders of --data are the classes; the run of stage 1: stage 2, its classes are used and
    --data needs no labels."""
    template: str = "a photo of a {}."
    """Text of a class in stage 1; its first words are the initial text prompts."""
    length: int = 4
    """Prompts at each layer; the template must begin with so many words."""
    depth: int = 9
    """Layers of the image encoder (and of the text encoder in stage 1) that get prompts, from the first on."""
    temperature: float = 1.0
    """Temperature of stage 2."""
    weight: float = 1000.0
    """Weight of the loss of stage 2, which is a mean over images and classes."""

    batch_size: int = 8
    """Images per process and forward pass."""
    lr: float | None = 2e-3
    """Peak learning rate."""
    weight_decay: float = 5e-4
    """AdamW weight decay of prompts and matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    epochs: float = 20.0
    """Passes over the images."""
    warmup_epochs: float | None = 1.0
    """Epochs of linear warm-up."""
    cuda_graph: bool = False
    """Run the training step as one CUDA graph where one process trains on a GPU."""

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("student", "teacher"):
            value = getattr(self, name)
            exists = (name == "teacher" and value == "none") or Path(value).expanduser().is_dir()
            expected = "a folder of a transformers CLIPModel" if name == "student" else "none, or a run of stage 1"
            self._need(found, name, exists, expected)
        self._need(found, "template", "{}" in self.template, "a text with {} for the name of the class")
        for name in ("length", "depth"):
            self._need(found, name, getattr(self, name) >= 1, "at least 1")
        self._need(found, "temperature", self.temperature > 0, "a positive number")
        self._need(found, "weight", self.weight > 0, "a positive number")
        return found

    def build(self, device: torch.device) -> tuple[nn.Module, PromptKDConfig]:
        import torch

        from fastkd.train.build import EXPECTED, choose_amp

        torch.manual_seed(self.seed)
        try:
            method, side = self._tuning() if self.teacher == "none" else self._distillation()
        except EXPECTED as error:
            raise ConfigError([f"--student: {error}"]) from error
        if self.img_size not in (None, side, (side, side)):
            raise ConfigError([problem("img_size", self.img_size, f"{side}, which this CLIP was made for")])
        changes = dict(img_size=(side, side), in_chans=3, amp=choose_amp(self.amp, device))
        return method.to(device).train(), dataclasses.replace(self, **changes)

    def _tuning(self) -> tuple[nn.Module, int]:
        from fastkd.data import open_images
        from fastkd.methods import PromptTuning

        classes = open_images(self.data).classes
        if len(classes) < 2:
            raise ConfigError([problem("data", f"{len(classes)} class folders", "two or more in stage 1")])
        model, side = prompted(self.student, self.template, classes, self.length, self.depth)
        method = PromptTuning(model)
        method.classes = classes
        return method, side

    def _distillation(self) -> tuple[nn.Module, int]:
        from safetensors.torch import load_file

        from fastkd.methods import PromptKD, PromptStudent
        from fastkd.models.class_vectors import FeatureProjector
        from fastkd.models.prompts import PromptedEncoder
        from fastkd.train.build import weights_of
        from fastkd.train.track import RunFolder

        run = Path(self.teacher).expanduser()
        try:
            given, classes = RunFolder(run).config(), RunFolder(run).facts()["classes"]
            teacher, _ = prompted(given["student"], given["template"], classes, given["length"], given["depth"])
            teacher.load_state_dict(load_file(weights_of(run)))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError([f"--teacher: {run}: got no finished run of stage 1 ({error})"]) from error
        clip, _ = _clip(self.student)
        vision = clip.config.vision_config
        encoder = PromptedEncoder.of_clip(clip, self.length, min(self.depth, vision.num_hidden_layers))
        bank = teacher.eval().bank(classes)
        projector = FeatureProjector(clip.config.projection_dim, bank.text_features.shape[1])
        student = PromptStudent(encoder, projector, bank, clip.logit_scale.detach().exp().item())
        method = PromptKD(
            student, teacher.image, temperature=self.temperature, weight=self.weight,
            teacher_logit_scale=teacher.logit_scale,
        )  # fmt: skip
        method.classes = classes
        return method, vision.image_size

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from fastkd.train.held_out import HeldOutClasses

        return HeldOutClasses(self, method, device, amp)

    def summary(self, method: nn.Module) -> str:
        stage = "stage 1" if self.teacher == "none" else f"stage 2, teacher {self.teacher}"
        return f"promptkd: {self.student}, {stage}, {len(method.classes)} classes"


def prompted(folder: str, template: str, classes: list[str], length: int, depth: int) -> tuple[Any, int]:
    """A CLIP with prompts for these classes, and the side of its images."""
    from fastkd.methods import PromptedCLIP

    clip, tokenizer = _clip(folder)
    texts = [template.format(name.replace("_", " ")) for name in classes]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    vision, text = clip.config.vision_config, clip.config.text_config
    model = PromptedCLIP(
        clip, inputs["input_ids"], inputs["attention_mask"], length=length,
        vision_depth=min(depth, vision.num_hidden_layers), text_depth=min(depth, text.num_hidden_layers),
    )  # fmt: skip
    return model, vision.image_size


def _clip(folder: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ImportError(f"transformers does not import ({error}); pip install transformers") from error
    path = Path(folder).expanduser()
    return CLIPModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
