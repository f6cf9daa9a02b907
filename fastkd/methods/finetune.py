"""Supervised fine-tuning as it is done after MAE: timm's augmentation and mixing around plain cross entropy."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ._method import Method


class Finetune(Method):
    """A classifier that learns from labels, on erased and mixed images.

        x, y = mixup_or_cutmix(random_erasing(normalised images), smoothed labels)
        loss = -mean over images of sum over classes of y log softmax(student(x))

    Erasing and mixing are timm's and draw from the generators of python and numpy: seed those to repeat a step. They
    do so on the host, hence a CUDA graph would repeat one mix for ever.

    Args:
        student: takes images [B, C, H, W] and returns logits [B, classes].
        num_classes: how many.
        mixup, cutmix: alpha of the Beta distribution that mixing weights are drawn from; 0 leaves it out. With both,
            each batch takes one of them, at random. Batches must then be even: image i is mixed with B - 1 - i.
        smoothing: share of the target that is spread over all classes.
        erase: share of the images in which a rectangle is replaced by noise.
    """

    def __init__(
        self, student: nn.Module, num_classes: int, *, mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1,
        erase: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__(student)
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        self._erase, self._erasing = erase, RandomErasing
        self._mix = None
        if mixup or cutmix:
            self._mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)
        self._criterion = SoftTargetCrossEntropy() if self._mix else LabelSmoothingCrossEntropy(smoothing)

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W] normalised for the student, which are then changed.
            target: [B] int64 classes.

        Returns:
            loss: float32 scalar.
        """
        images = self.prepare(images)
        if self.training and self._erase:
            images = self._erasing(self._erase, mode="pixel", device=images.device)(images)
        if self.training and self._mix:
            images, target = self._mix(images, target)
        logits = self.student(images).float()
        if target.ndim == 1 and self._mix:  # not training: plain labels
            return {"loss": nn.functional.cross_entropy(logits, target)}
        return {"loss": self._criterion(logits, target)}


class TrainingView:
    """timm's training view of a picture: random resized crop (bicubic), flip and RandAugment.

    Args:
        size: (height, width).
        scale: share of the picture that a crop covers, smallest and largest.
        augment: timm's name of a RandAugment, such as ``"rand-m9-mstd0.5-inc1"``.

    Raises:
        ValueError: no such RandAugment.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], augment: str) -> None:
        from timm.data.auto_augment import posterize
        from timm.data.transforms_factory import transforms_imagenet_train

        expected = "a RandAugment of timm such as rand-m9-mstd0.5-inc1"
        try:
            crop, augmented, _ = transforms_imagenet_train(
                tuple(size), scale=scale, auto_augment=augment, interpolation="bicubic", separate=True
            )
            operations = augmented.transforms[0].ops
        except (AssertionError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(f"augment: got {augment!r}, expected {expected}") from error
        for operation in operations:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
        self._steps = crop, augmented

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> uint8 [height, width, 3]; draws from the global generators."""
        for step in self._steps:
            image = step(image)
        return np.asarray(image)


def _posterize(image: Image.Image, bits: int, **unused) -> Image.Image:
    """timm's, and black where no bit is left, as it was before Pillow 13 refused that."""
    from timm.data.auto_augment import posterize

    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def layer_decay_groups(student: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """timm's groups of parameters with `lr_scale` = layer_decay ** (layers above), as published for fine-tuning.

    The head has scale 1, the last block of L `layer_decay`, the patch embedding ``layer_decay ** (L + 1)``. Norms,
    biases, tokens and position tables do not decay.
    """
    from timm.optim import param_groups_layer_decay

    spared = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()
    return param_groups_layer_decay(student, weight_decay, no_weight_decay_list=tuple(spared), layer_decay=layer_decay)
