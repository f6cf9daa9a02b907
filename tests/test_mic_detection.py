"""MIC for detection: the losses inside of torchvision's Faster R-CNN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.methods.mic_detection import confident_boxes, faster_rcnn_consistency
from fastkd.models.ema import EMATeacher

detection = pytest.importorskip("torchvision.models.detection")


@pytest.fixture
def detector():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    return detection.FasterRCNN(
        backbone, num_classes=4, rpn_anchor_generator=anchors, min_size=64, max_size=96, rpn_batch_size_per_image=32,
        box_batch_size_per_image=16, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50,
    )  # fmt: skip


@pytest.fixture
def images():
    return [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


def found(*scores: float) -> dict[str, torch.Tensor]:
    count = len(scores)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 60.0, 50.0]])[:count]
    return dict(boxes=boxes, labels=torch.tensor([1, 3])[:count], scores=torch.tensor(scores))


def test_only_confident_boxes_are_labels():
    kept = confident_boxes([found(0.8, 0.79), found(0.1, 0.2)])
    assert kept[0]["labels"].tolist() == [1] and kept[0]["boxes"].shape == (1, 4) and len(kept[1]["boxes"]) == 0


def test_without_masks_the_unweighted_losses_are_those_of_torchvision(detector, images, monkeypatch):
    """The same samples and labels: with all weights 1 both classification losses are the detector's own."""
    from fastkd.methods import mic_detection

    boxes = [found(0.9, 0.9), found(0.95)]
    detector.train()
    torch.manual_seed(3)
    want = detector(images, boxes)
    monkeypatch.setattr(mic_detection, "roi_consistency_loss", F.cross_entropy)
    monkeypatch.setattr(
        mic_detection, "objectness_consistency_loss", lambda o, y, _: F.binary_cross_entropy_with_logits(o, y)
    )
    torch.manual_seed(3)
    # The noise of the masks comes from a generator of its own: the samplers draw as before.
    got = faster_rcnn_consistency(detector, images, boxes, mask_ratio=0.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got["objectness_loss"], want["loss_objectness"])
    torch.testing.assert_close(got["roi_loss"], want["loss_classifier"])


def test_a_step_trains_classification_alone_and_moves_the_teacher(detector, images):
    teacher = EMATeacher(detector, 0.9, warmup=False, buffers="ema", mode="eval")
    assert all({"boxes", "labels", "scores"} <= set(result) for result in teacher(images))
    losses = faster_rcnn_consistency(detector.train(), images, [found(0.9, 0.9), found()])
    assert all(0 < loss < 10 for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.roi_heads.box_predictor.cls_score.weight.grad.abs().max() > 0
    assert detector.rpn.head.cls_logits.weight.grad.abs().max() > 0
    assert detector.roi_heads.box_predictor.bbox_pred.weight.grad is None
    assert detector.rpn.head.bbox_pred.weight.grad is None
    with torch.no_grad():
        detector.rpn.head.cls_logits.bias.add_(1.0)
    before = teacher.model.rpn.head.cls_logits.bias.clone()
    teacher.update(detector, 0)
    torch.testing.assert_close(teacher.model.rpn.head.cls_logits.bias, before + 0.1)


def test_images_without_a_box_are_dropped(detector, images):
    losses = faster_rcnn_consistency(detector.train(), images, [found(), found()])
    assert losses["roi_loss"] == losses["objectness_loss"] == 0
    with pytest.raises(ValueError, match="boxes: got 1, expected 2"):
        faster_rcnn_consistency(detector, images, [found()])
