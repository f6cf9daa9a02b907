"""Ops of MIC beyond their OpSpecs and golden files: interpolation, ties, rounding, what is ignored, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of

from fastkd.nn import BlockMask, MaskedConsistencyLoss
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
from fastkd.ops.features import bilinear


def each_backend_of(op: str):
    return pytest.mark.parametrize("name", backends_of(SPECS[op]))


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("values, out", [(1, 5), (5, 1), (3, 7), (7, 3), (4, 16), (13, 64), (9, 10), (6, 6)])
def test_bilinear_matrix_is_that_of_torch(values, out):
    x = torch.eye(values, dtype=torch.float64)[None, None]
    want = F.interpolate(x, size=(out, values), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(bilinear.matrix(values, out, x.device, x.dtype), want, rtol=0, atol=1e-12)


@each_backend_of("mask_image")
def test_masks_are_enlarged_by_the_nearest_rule_of_torch(name):
    for height, block in ((198, 4), (70, 16), (13, 2), (30, 7), (8, 8), (5, 1)):
        noise = torch.arange(2 * round(height / block)).view(2, 1, -1, 1) % 3 / 3
        noise = noise.expand(-1, -1, -1, round(height / block)).to(device_of(name))
        images = torch.ones(2, 1, height, height, device=device_of(name))
        with backend(name):
            masked = mask_image(images, block, 0.3, noise=noise)
        want = F.interpolate((noise > 0.3).float(), size=(height, height), mode="nearest")
        assert torch.equal(masked, want), (height, block)
        assert torch.equal(block_mask(images.shape, block, 0.3, noise=noise), want.bool())


def test_noise_equal_to_the_ratio_masks_and_half_cells_round_to_even():
    noise = torch.tensor([0.0, 0.5, 0.75]).view(3, 1, 1, 1)
    assert block_mask((3, 3, 2, 2), 2, 0.5, noise=noise)[:, 0, 0, 0].tolist() == [False, False, True]
    for size, cells in ((10, 2), (14, 4), (18, 4), (22, 6)):  # 2.5, 3.5, 4.5 and 5.5 blocks
        block_mask((1, 1, size, size), 4, 0.5, noise=torch.zeros(1, 1, cells, cells))


def test_masks_are_drawn_per_image_and_from_the_generator():
    draw = [block_mask((4, 3, 32, 32), 4, 0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert len({tuple(m.flatten().tolist()) for m in draw[0]}) == 4
    kept = block_mask((64, 1, 64, 64), 8, 0.7, generator=torch.Generator().manual_seed(0)).float().mean()
    assert 0.27 < kept < 0.33
    module = BlockMask(4, 1.0)
    assert module(torch.ones(1, 2, 8, 8)).abs().sum() == 0 and "mask_ratio=1.0" in repr(module)


@each_backend_of("mask_image")
def test_masked_pixels_are_zero_even_where_not_finite_and_get_no_gradient(name):
    images = torch.full((1, 1, 4, 4), float("nan"), device=device_of(name), requires_grad=True)
    noise = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]], device=device_of(name))
    with backend(name):
        masked = mask_image(images, 2, 0.5, noise=noise)
        (grad,) = torch.autograd.grad(masked, images, 3 * torch.ones_like(masked))
    kept = block_mask(images.shape, 2, 0.5, noise=noise)
    assert torch.equal(masked.isnan(), kept) and (masked[~kept] == 0).all()
    assert torch.equal(grad, 3.0 * kept)


@each_backend_of("pseudo_label")
def test_equal_logits_give_the_first_class_and_the_threshold_itself_counts(name):
    logits = torch.zeros(1, 2, 3, 5, device=device_of(name))
    for threshold, share in ((0.5, 1.0), (0.5001, 0.0)):
        with backend(name):
            label, weight = pseudo_label(logits, threshold=threshold)
            large = pseudo_label(logits, threshold=threshold, size=(7, 4))
        assert (label == 0).all() and (weight == share).all()
        assert (large[0] == 0).all() and (large[1] == share).all()


@each_backend_of("pseudo_label")
def test_quality_is_one_number_for_the_batch_or_one_per_image(name):
    logits = torch.zeros(2, 3, 4, 4, device=device_of(name))
    logits[0, 1, :2] = 50.0  # half of the first image, nothing of the second
    with backend(name):
        batch, image = (pseudo_label(logits, scope=scope)[1] for scope in ("batch", "image"))
        vectors = pseudo_label(logits[:, :, 0, 0], scope="image")[1]
    assert (batch == 0.25).all()
    assert (image[0] == 0.5).all() and (image[1] == 0).all()
    assert vectors.tolist() == [1.0, 0.0]
    assert batch.stride() == (0, 0, 0)  # no memory


@each_backend_of("pseudo_label")
def test_ignored_rows_and_invalid_pixels_weigh_nothing_and_the_rest_as_before(name):
    logits = 3 * randn(2, 4, 6, 5, device=device_of(name))
    valid = randn(2, 6, 5, seed=1, device=device_of(name)) > 0
    for weight in ("quality", "prob", "none"):
        with backend(name):
            whole = pseudo_label(logits, weight=weight, threshold=0.5)[1]
            cut = pseudo_label(logits, weight=weight, threshold=0.5, ignore_top=2, ignore_bottom=1)[1]
            masked = pseudo_label(logits, weight=weight, threshold=0.5, valid_mask=valid[:, None])[1]
        assert (cut[:, :2] == 0).all() and (cut[:, -1] == 0).all() and torch.equal(cut[:, 2:-1], whole[:, 2:-1])
        assert torch.equal(masked, whole * valid)


@each_backend_of("masked_consistency_loss")
@pytest.mark.parametrize("size", [(3, 5), (2, 3), (1, 2), (2, 7)])
def test_loss_is_that_of_torch_on_resized_logits_with_all_pixels_in_the_mean(name, size):
    logits = (2 * randn(2, 6, 2, 3, device=device_of(name))).requires_grad_()
    label = (randn(2, *size, seed=1).abs() * 4).long().clamp(max=5).to(device_of(name))
    label[:, 0] = 255
    weight = randn(2, *size, seed=2, device=device_of(name)).abs()
    with backend(name):
        loss = masked_consistency_loss(logits, label, weight, size=size)
        grad = torch.autograd.grad(1.7 * loss, logits)[0]
    large = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    want = (F.cross_entropy(large, label, reduction="none", ignore_index=255) * weight).mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(1.7 * want, logits)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in backends_of(SPECS["masked_consistency_loss"]) if n != "triton"])
def test_many_rows_and_columns_of_cells_are_gathered_tile_by_tile(name):
    logits = randn(1, 3, 40, 150, device=device_of(name)).requires_grad_()
    label = randn(1, 83, 290, seed=1).gt(0).long().to(device_of(name))
    with backend(name):
        (grad,) = torch.autograd.grad(masked_consistency_loss(logits, label), logits)
    large = F.interpolate(logits, size=(83, 290), mode="bilinear", align_corners=False)
    (want,) = torch.autograd.grad(F.cross_entropy(large, label), logits)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6 * want.abs().max().item() + 1e-9)


@each_backend_of("masked_consistency_loss")
def test_everything_ignored_is_zero_with_zero_gradient(name):
    logits = randn(1, 3, 2, 2, device=device_of(name)).requires_grad_()
    label = torch.full((1, 4, 5), 7, dtype=torch.uint8, device=device_of(name))
    with backend(name):
        loss = masked_consistency_loss(logits, label, ignore_index=7)
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and grad.abs().max() == 0


@each_backend_of("masked_consistency_loss")
def test_far_logits_neither_overflow_nor_lose_their_gradient(name):
    logits = torch.tensor([[300.0, -300.0], [-90.0, 90.0]], device=device_of(name)).requires_grad_()
    label = torch.tensor([1, 0], device=device_of(name))
    with backend(name):
        loss = masked_consistency_loss(logits, label)
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss == (600 + 180) / 2
    assert grad.tolist() == [[0.5, -0.5], [-0.5, 0.5]]


def test_module_and_scalar_weight():
    logits, label = randn(4, 5), torch.tensor([0, 4, 9, 2])
    loss = MaskedConsistencyLoss(ignore_index=9)
    assert "ignore_index=9" in repr(loss)
    want = F.cross_entropy(logits, label, ignore_index=9, reduction="sum") / 4
    torch.testing.assert_close(loss(logits, label), want)
    torch.testing.assert_close(loss(logits, label, torch.tensor(0.25)), want / 4)


def test_labels_of_bytes_and_of_integers_are_the_same():
    logits = randn(2, 5, 4, 4)
    label, weight = pseudo_label(logits, size=(8, 8))
    small, _ = pseudo_label(logits, size=(8, 8), label_dtype=torch.uint8)
    assert small.dtype == torch.uint8 and torch.equal(small.long(), label)
    student = randn(2, 5, 4, 4, seed=1)
    assert torch.equal(*(masked_consistency_loss(student, x, weight) for x in (label, small)))


def test_detection_losses_ignore_and_weigh_by_the_student():
    objectness = randn(6).requires_grad_()
    label = torch.tensor([1.0, 0, -1, 1, 0, -1])
    counted = label >= 0
    plain = F.binary_cross_entropy_with_logits(objectness[counted], label[counted], reduction="none")
    for detach in (False, True):
        weight = objectness[counted].sigmoid()
        want = ((weight.detach() if detach else weight) * plain).mean()
        got = objectness_consistency_loss(objectness, label, detach_weight=detach)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(x, objectness, retain_graph=True)[0] for x in (got, want)]
        torch.testing.assert_close(*grads)
        assert grads[0][~counted].abs().max() == 0
    logits, classes = randn(5, 4).requires_grad_(), torch.tensor([0, 3, -100, 1, -100])
    kept = classes >= 0
    confidence = logits[kept].detach().softmax(1).amax(1)
    want = (confidence * F.cross_entropy(logits[kept], classes[kept], reduction="none")).mean()
    got = roi_consistency_loss(logits, classes)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*[torch.autograd.grad(x, logits)[0] for x in (got, want)])
    nothing = roi_consistency_loss(logits, torch.full((5,), -100))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0
    assert objectness_consistency_loss(objectness, -torch.ones(6)) == 0


LOGITS = torch.zeros(2, 3, 4, 4)
LABEL = torch.zeros(2, 4, 4, dtype=torch.int64)
ERRORS = {
    "ratio": (lambda: mask_image(LOGITS, 2, 1.5), ValueError, "mask_ratio: got 1.5, expected a number from 0 to 1"),
    "no cell": (lambda: block_mask((1, 3, 4, 64), 9, 0.5), ValueError, "block_size: got 9 for images of 4 x 64"),
    "noise": (lambda: mask_image(LOGITS, 2, 0.5, noise=torch.zeros(2, 1, 3, 2)), ValueError, "noise: got shape"),
    "weight": (lambda: pseudo_label(LOGITS, weight="entropy"), ValueError, "weight: got 'entropy'"),
    "scope": (lambda: pseudo_label(LOGITS, scope="pixel"), ValueError, "scope: got 'pixel'"),
    "grad": (lambda: pseudo_label(LOGITS.clone().requires_grad_()), ValueError, "pass it detached"),
    "bytes": (lambda: pseudo_label(torch.zeros(1, 300), label_dtype=torch.uint8), ValueError, "at most 255"),
    "label dtype": (lambda: pseudo_label(LOGITS, label_dtype=torch.int32), TypeError, "torch.int64 or torch.uint8"),
    "rows": (lambda: pseudo_label(LOGITS[:, :, 0, 0], ignore_top=1), ValueError, "4 with ignored rows"),
    "valid": (lambda: pseudo_label(LOGITS, valid_mask=torch.ones(2, 4, 5)), ValueError, "valid_mask: got shape"),
    "no picture": (lambda: pseudo_label(LOGITS[..., 0], size=(4, 4)), ValueError, "are resized"),
    "label shape": (lambda: masked_consistency_loss(LOGITS, LABEL[:1]), ValueError, "label: got shape"),
    "class": (lambda: masked_consistency_loss(LOGITS, LABEL + 3), ValueError, "label: got 3, expected classes from 0"),
    "size": (lambda: masked_consistency_loss(LOGITS, LABEL, size=(8, 8)), ValueError, r"size: got \(8, 8\)"),
    "weight shape": (lambda: masked_consistency_loss(LOGITS, LABEL, LOGITS[:, :, 0]), ValueError, "weight: got shape"),
    "weight grad": (
        lambda: masked_consistency_loss(LOGITS, LABEL, torch.ones(2, 4, 4, requires_grad=True)), ValueError, "detached",
    ),
    "nothing": (lambda: masked_consistency_loss(LOGITS[:0], LABEL[:0]), ValueError, "mean of nothing"),
    "huge": (
        lambda: masked_consistency_loss(torch.zeros(1, 2, 1, 40000), torch.zeros(1, 1, 40001).long()), ValueError,
        "cut the picture into tiles",
    ),
    "roi": (lambda: roi_consistency_loss(torch.zeros(3, 2), torch.zeros(4).long()), ValueError, "label: got shape"),
    "anchors": (lambda: objectness_consistency_loss(torch.zeros(3, 2), torch.zeros(3)), ValueError, "1 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
