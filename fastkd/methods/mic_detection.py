"""MIC for two-stage detectors: masked image consistency of torchvision's Faster R-CNN.

    teacher = EMATeacher(detector, 0.9, warmup=False, buffers="ema", mode="eval")
    boxes = confident_boxes(teacher(images))                       # labels from the complete images
    losses = faster_rcnn_consistency(detector, images, boxes)      # added to the losses of the source images
    sum(losses.values()).backward()
    ...
    teacher.update(detector, step)

Only the classifications of proposals and anchors are consistent: pseudo-boxes are too coarse to regress to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.ops import mask_image, objectness_consistency_loss, roi_consistency_loss

Boxes = dict[str, Tensor]  # boxes [N, 4], labels [N], scores [N]: what torchvision's detectors return for an image


def confident_boxes(detections: Sequence[Boxes], score: float = 0.8) -> list[Boxes]:
    """The boxes of each image whose score is at least this; an image may be left without any."""
    return [{name: value[found["scores"] >= score] for name, value in found.items()} for found in detections]


def faster_rcnn_consistency(
    detector: nn.Module,
    images: Sequence[Tensor],
    boxes: Sequence[Boxes],
    block_size: int = 32,
    mask_ratio: float = 0.5,
    *,
    detach_weight: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Classification losses of both stages on masked images, weighted by the detector's own confidence.

    Args:
        detector: `torchvision.models.detection.FasterRCNN` (or anything built like it) in training mode.
        images: [C, H, W] each, white is 1; the detector resizes and normalises them, then come the masks.
        boxes: pseudo-labels of each image. Images without any are dropped, as the released code does.
        block_size: side of a masked square, in pixels of the resized image.
        mask_ratio: probability with which a square is masked.
        detach_weight: see `fastkd.ops.objectness_consistency_loss`.
        generator: of the masks.

    Returns:
        roi_loss and objectness_loss, scalars; zero without gradient where no image has a box.
    """
    if len(images) != len(boxes):
        raise ValueError(
            f"faster_rcnn_consistency: boxes: got {len(boxes)}, expected {len(images)}, one dict per image"
        )
    kept = [(image, found) for image, found in zip(images, boxes) if len(found["boxes"])]
    if not kept:
        zero = torch.zeros((), device=images[0].device)
        return {"roi_loss": zero, "objectness_loss": zero}
    images, targets = detector.transform(*(list(part) for part in zip(*kept)))
    images.tensors = mask_image(images.tensors, block_size, mask_ratio, generator=generator)
    features = detector.backbone(images.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    proposals, objectness_loss = _anchors(detector.rpn, images, features, targets, detach_weight)
    heads = detector.roi_heads
    proposals, _, labels, _ = heads.select_training_samples(proposals, targets)
    pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
    logits, _ = heads.box_predictor(heads.box_head(pooled))
    return {"roi_loss": roi_consistency_loss(logits, torch.cat(labels)), "objectness_loss": objectness_loss}


def _anchors(rpn: nn.Module, images, features: dict[str, Tensor], targets, detach_weight: bool):
    """Proposals of the first stage, and the loss of its sampled anchors."""
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    levels = list(features.values())
    objectness, deltas = rpn.head(levels)
    anchors = rpn.anchor_generator(images, levels)
    per_level = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, per_level)
    labels, _ = rpn.assign_targets_to_anchors(anchors, targets)
    sampled = torch.cat([torch.cat(part) for part in rpn.fg_bg_sampler(labels)]).nonzero().flatten()
    sampled = sampled % sum(len(label) for label in labels)  # positive anchors, then negative ones
    loss = objectness_consistency_loss(objectness.flatten()[sampled], torch.cat(labels)[sampled], detach_weight)
    return proposals, loss
