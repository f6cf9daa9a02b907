"""MIC against numbers of the authors' own code: mask, pseudo-labels, the losses of three tasks, the mean teacher."""

from __future__ import annotations

import pytest
import torch
from conftest import backends_of, device_of
from golden_files import find

from fastkd.models.ema import EMATeacher
from fastkd.ops import (
    SPECS,
    backend,
    block_mask,
    mask_image,
    masked_consistency_loss,
    objectness_consistency_loss,
    pseudo_label,
    roi_consistency_loss,
)

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss, so that a kernel that ignores the upstream gradient fails


def dtypes(name: str) -> list[torch.dtype]:
    return [torch.float32, torch.float64] if name in ("reference", "cpp") else [torch.float32]


def each(prefix: str, op: str):
    """(file, backend, dtype) of every golden file of a prefix and every backend of an op."""
    cases = [(g, name, dtype) for g in find(prefix) for name in backends_of(SPECS[op]) for dtype in dtypes(name)]
    ids = [f"{g.stem}-{name}-{str(dtype).removeprefix('torch.')}" for g, name, dtype in cases]
    return pytest.mark.parametrize("golden, name, dtype", cases, ids=ids)


def gradient(loss: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(UPSTREAM * loss, value)[0] / UPSTREAM


@each("mic_block_mask", "mask_image")
def test_golden_block_mask(golden, name, dtype):
    for suffix in golden.suffixes("img"):
        images, noise = (golden.tensor(key + suffix).to(device_of(name)) for key in ("img", "noise"))
        options = dict(noise=noise)
        size, ratio = (golden.option(key + suffix) for key in ("block_size", "mask_ratio"))
        golden.check(f"mask{suffix}", block_mask(images.shape, size, ratio, **options), dtype)
        with backend(name):
            masked = mask_image(images.to(dtype), size, ratio, **options)
        golden.check(f"masked_img_sum{suffix}", masked.double().sum(), dtype, rounded_input=True)


@each("mic_seg_consistency", "pseudo_label")
def test_golden_segmentation_labels(golden, name, dtype):
    logits = golden.tensor("teacher_logits", dtype, device_of(name))
    options = dict(threshold=golden.option("threshold"))
    rows = dict(ignore_top=golden.option("ignore_top"), ignore_bottom=golden.option("ignore_bottom"))
    with backend(name):
        label, weight = pseudo_label(logits, **options)
        golden.check("pseudo_label", label, dtype)
        golden.check("weight", weight, dtype)
        golden.check("weight_ignore_rows", pseudo_label(logits, **options, **rows)[1], dtype)
        valid = golden.tensor("valid_mask", dtype, device_of(name))
        golden.check("weight_valid_mask", pseudo_label(logits, **options, valid_mask=valid)[1], dtype)


@each("mic_seg_consistency", "masked_consistency_loss")
def test_golden_segmentation_loss(golden, name, dtype):
    student = golden.tensor("student_logits", dtype, device_of(name)).requires_grad_()
    label, weight = (golden.tensor(k, dtype, device_of(name)) for k in ("label_with_ignore", "weight_valid_mask"))
    with backend(name):
        loss = masked_consistency_loss(student, label, weight, ignore_index=golden.option("ignore_index", default=255))
        grad = gradient(loss, student)
    golden.check("loss", loss, dtype, rounded_input=True)  # the weights are stored in float32
    golden.check("grad_student_logits", grad, dtype, rounded_input=True)


@each("mic_cls_consistency", "masked_consistency_loss")
def test_golden_classification(golden, name, dtype):
    student = golden.tensor("student_logits", dtype, device_of(name)).requires_grad_()
    with backend(name):
        label, weight = pseudo_label(golden.tensor("teacher_logits", dtype, device_of(name)), weight="prob")
        loss = masked_consistency_loss(student, label, weight)
        grad = gradient(loss, student)
    golden.check("pseudo_label", label, dtype)
    golden.check("pseudo_weight", weight, dtype)
    golden.check("loss", loss, dtype)
    golden.check("grad_student_logits", grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("golden", find("mic_det_consistency"), ids=lambda g: g.stem)
def test_golden_detection(golden, dtype):
    logits, objectness = (golden.tensor(k, dtype).requires_grad_() for k in ("class_logits", "objectness"))
    for name, values, loss in (
        ("roi", logits, roi_consistency_loss(logits, golden.tensor("labels"))),
        ("rpn", objectness, objectness_consistency_loss(objectness, golden.tensor("objectness_labels", dtype))),
    ):
        golden.check(f"loss_{name}", loss, dtype)
        key = "grad_class_logits" if name == "roi" else "grad_objectness"
        golden.check(key, gradient(loss, values), dtype)


@pytest.mark.parametrize("golden", find("mic_ema"), ids=lambda g: g.stem)
def test_golden_mean_teacher(golden):
    """The teacher starts from what the file has; its statistics stay its own."""

    class Net(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)
            width = len(golden["ema_bn_running_mean_after"])
            self.norm = torch.nn.BatchNorm1d(width, affine=False).double()

    for k, step in enumerate(golden["iters"].tolist()):
        student = Net(golden.tensor(f"student_{k}"))
        student.norm.running_mean += 7
        teacher = EMATeacher(student, alpha=golden.option("alpha"))
        with torch.no_grad():
            teacher.model.weight.copy_(golden.tensor(f"ema_before_{k}"))
            teacher.model.norm.running_mean.zero_()
        teacher.update(student, step)
        golden.check(f"ema_after_{k}", teacher.model.weight, torch.float64)
        golden.check("ema_bn_running_mean_after", teacher.model.norm.running_mean, torch.float64)
