"""What is judged: a frozen ViT whose tokens are pooled, or a classifier whose head says what it reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.models import MaskedAutoencoderViT, load_vit
from fastkd.models.checkpoints import UNTRAINED
from fastkd.models.classifiers import TIMM, is_classifier, load_classifier
from fastkd.models.pixels import normalize, statistics_of
from fastkd.models.saving import encoder
from fastkd.models.vit import VisionTransformer


class TokenEncoder(nn.Module):
    """Pools the tokens of a ViT after its final norm.

    Args:
        vit: not truncated; the decoder of a masked autoencoder is left out.
        features: ``"mean"`` of the patch tokens, ``"cls"``, or ``"cls+mean"`` one behind the other.
    """

    classes: list[str] | None = None
    num_classes = 0

    def __init__(self, vit: VisionTransformer, features: str = "mean") -> None:
        super().__init__()
        if "cls" in features and vit.cls_token is None:
            raise ValueError(f"features: got {features!r} of a ViT without class token, expected 'mean'")
        self.vit = encoder(vit) if isinstance(vit, MaskedAutoencoderViT) else vit
        self.features, self.img_size, self.in_chans = features, vit.img_size, vit.in_chans

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, H, W, C] -> features [B, D] or [B, 2 D] float32, and no logits."""
        tokens = self.vit(images).tokens.float()
        mean = tokens[:, self.vit.num_prefix_tokens :].mean(1)
        return {"mean": mean, "cls": tokens[:, 0], "cls+mean": torch.cat([tokens[:, 0], mean], 1)}[self.features], None


class HeadEncoder(nn.Module):
    """A timm classifier: what its head reads, and what it says.

    Attributes:
        classes: names of its classes, None where the file does not tell; num_classes: how many.
    """

    features = "head"

    def __init__(self, classifier: nn.Module, img_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.classes: list[str] | None = getattr(classifier, "classes", None)
        self.num_classes = classifier.num_classes
        config = getattr(classifier, "pretrained_cfg", None) or {}
        own = tuple((config.get("input_size") or (3, 224, 224))[1:])
        self.img_size = img_size or own
        if self.img_size != own and hasattr(classifier, "set_input_size"):
            classifier.set_input_size(img_size=self.img_size)
        self.in_chans = getattr(classifier, TIMM, ("", {}))[1].get("in_chans", 3)
        self.mean, self.std = statistics_of(classifier)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, H, W, C] -> features [B, D] and logits [B, num_classes], float32."""
        x = self.classifier.forward_features(normalize(images, self.mean, self.std))
        logits = self.classifier.forward_head(x).float() if self.num_classes else None
        return self.classifier.forward_head(x, pre_logits=True).float(), logits


def load_encoder(
    source: str | Path, features: str = "auto", img_size: int | tuple[int, int] | None = None
) -> TokenEncoder | HeadEncoder:
    """The encoder of a file or name, in eval mode.

    Args:
        source: a classifier file that fastkd wrote; else what `load_vit` reads; else a timm classifier, pretrained, or
            with random weights as ``untrained:NAME``.
        features: as for `TokenEncoder`; ``"auto"``: mean, and of a classifier what its head reads.
        img_size: side or (height, width); default what the source says.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `load_vit` and `load_classifier`.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if is_classifier(source):
        model = load_classifier(source)
    else:
        try:
            return TokenEncoder(load_vit(source, img_size=size), "mean" if features == "auto" else features).eval()
        except (ValueError, TypeError):  # a timm model of another kind
            name = str(source).removeprefix(UNTRAINED)
            if features != "auto" or not _in_timm(name):
                raise
        model = load_classifier(name, pretrained=name == source)
    if features != "auto":
        raise ValueError(f"features: got {features!r} of a classifier, expected 'auto', what its head reads")
    return HeadEncoder(model, size).eval()


def _in_timm(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)
