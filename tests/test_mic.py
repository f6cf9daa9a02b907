"""MIC as a method: its loss from its parts, views, modes, the teacher's steps, wrappers, state."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.methods import MaskedImageConsistency
from fastkd.methods.student_view import student_view
from fastkd.ops import mask_image, pseudo_label


class Segmenter(nn.Module):
    """Logits at half the size."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu())


class Classifier(Segmenter):
    def forward(self, x):
        return super().forward(x).mean((2, 3))


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(9))


NOISE = torch.rand(4, 1, 3, 4, generator=torch.Generator().manual_seed(5))
OPTIONS = dict(alpha=0.9, block_size=4, mask_ratio=0.5, threshold=0.3, jitter=0.0, blur=0.0)


def other_weights(method: MaskedImageConsistency) -> None:
    """A teacher that is not the student."""
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.5)


def test_segmentation_loss_is_the_sum_of_its_parts():
    method = MaskedImageConsistency(Segmenter(), weight=0.5, ignore_top=2, **OPTIONS)
    other_weights(method)
    source, target, truth = images(1), images(2), labels(4, 12, 16)
    reference = copy.deepcopy(method)
    got = method(source, truth, target, noise=NOISE)

    def entropy(logits, label):
        return F.cross_entropy(F.interpolate(logits, size=(12, 16), mode="bilinear"), label, reduction="none")

    x, y = reference.prepare(source), reference.prepare(target)
    source_loss = entropy(reference.student(x), truth).mean()
    teacher = F.interpolate(reference.teacher(y), size=(12, 16), mode="bilinear").softmax(1)
    quality = (teacher.amax(1) >= 0.3).float().mean()
    assert 0 < quality < 1
    trust = quality.expand(4, 12, 16).clone()
    trust[:, :2] = 0
    kept = F.interpolate((NOISE > 0.5).float(), size=(12, 16), mode="nearest")
    consistency = (trust * entropy(reference.student(y * kept), teacher.argmax(1))).mean()
    for name, want in (("source_loss", source_loss), ("consistency_loss", consistency), ("confidence", trust.mean())):
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["loss"], source_loss + 0.5 * consistency, rtol=1e-5, atol=1e-6)
    got["loss"].backward()
    (source_loss + 0.5 * consistency).backward()
    for ours, theirs in zip(method.student.parameters(), reference.student.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert list(got)[:4] == list(method.losses)


def test_classification_weighs_each_image_with_the_probability_of_its_label():
    method = MaskedImageConsistency(Classifier(), task="classification", **OPTIONS)
    other_weights(method)
    source, target, truth = images(1), images(2), labels(4)
    reference = copy.deepcopy(method)
    got = method(source, truth, target, noise=NOISE)
    x, y = reference.prepare(source), reference.prepare(target)
    want = F.cross_entropy(reference.student(x), truth)
    torch.testing.assert_close(got["source_loss"], want)
    p, label = reference.teacher(y).softmax(1).max(1)
    hidden = mask_image(y, 4, 0.5, noise=NOISE)
    entropy = F.cross_entropy(reference.student(hidden), label, reduction="none")
    torch.testing.assert_close(got["consistency_loss"], (p * entropy).mean())
    torch.testing.assert_close(got["confidence"], p.mean())


def test_without_target_images_the_source_alone_counts():
    method = MaskedImageConsistency(Segmenter(), **OPTIONS)
    result = method(images(1), labels(4, 12, 16))
    assert result["loss"] == result["source_loss"] > 0 and result["consistency_loss"] == result["confidence"] == 0


@pytest.mark.parametrize("masked", ["source", "both"])
def test_masked_source_images_are_learnt_with_their_own_labels(masked):
    method = MaskedImageConsistency(Segmenter(), masked=masked, **OPTIONS)
    other_weights(method)
    source, target, truth = images(1), images(2), labels(4, 12, 16)
    reference = copy.deepcopy(method)
    got = method(source, truth, target, noise=NOISE)["consistency_loss"]
    x, y = reference.prepare(source), reference.prepare(target)
    reference.student(x)  # moves the running statistics only
    label, trust = truth, torch.ones(4, 12, 16)
    if masked == "both":
        theirs, weight = pseudo_label(reference.teacher(y), threshold=0.3, size=(12, 16))
        x, label = torch.cat((x[:2], y[2:])), torch.cat((truth[:2], theirs[2:]))
        trust = torch.cat((trust[:2], weight[2:]))
    logits = F.interpolate(reference.student(mask_image(x, 4, 0.5, noise=NOISE)), size=(12, 16), mode="bilinear")
    want = (F.cross_entropy(logits, label, reduction="none") * trust).mean()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if masked == "both":
        with pytest.raises(ValueError, match="two images or more"):
            method(source[:1], truth[:1], target[:1])


def test_the_teacher_sees_the_whole_image_as_it_is_and_the_student_another_view(monkeypatch):
    method = MaskedImageConsistency(Segmenter(), **OPTIONS | dict(jitter=0.5, blur=1.0))
    seen = {}
    for name in ("student", "teacher"):
        getattr(method, name).register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
    target = images(2)
    method(images(1), labels(4, 12, 16), target, noise=torch.ones(4, 1, 3, 4))
    assert torch.equal(seen["teacher"], method.prepare(target))
    assert (seen["student"] - seen["teacher"]).abs().mean() > 0.05
    method(images(1), labels(4, 12, 16), target, noise=torch.zeros(4, 1, 3, 4))
    assert seen["student"].abs().max() == 0 and torch.equal(seen["teacher"], method.prepare(target))


def test_views_keep_what_they_promise():
    x, options = torch.rand(64, 3, 8, 9), dict(mean=(0.5,), std=(0.25,))
    x = (x - 0.5) / 0.25

    def view(**changes):
        return student_view(x, **options, generator=torch.Generator().manual_seed(0), **changes)

    still = view(jitter_probability=0.0, blur_probability=0.0)
    torch.testing.assert_close(still, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(view(), view())
    moved = ((view(blur_probability=0.0) - x).abs().amax((1, 2, 3)) > 1e-3).float().mean()
    assert 0.6 < moved < 0.95  # 80 % are jittered
    pixels = view(strength=1.0) * 0.25 + 0.5
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    no_change = view(strength=0.0, jitter_probability=1.0, blur_probability=0.0)
    torch.testing.assert_close(no_change, x, rtol=0, atol=1e-2)  # there and back through luminance and chrominance
    blurred = view(jitter_probability=0.0, blur_probability=1.0)
    assert (blurred.var((2, 3)) < x.var((2, 3)) + 1e-6).all() and blurred.std() < 0.9 * x.std()
    flat = student_view(torch.full((2, 1, 5, 5), 0.3), (0.5,), (0.25,), jitter_probability=0.0, blur_probability=1.0)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))


def test_after_a_step_the_teacher_follows_the_student_and_a_checkpoint_keeps_it():
    method = MaskedImageConsistency(Segmenter(), **OPTIONS)
    before = method.teacher.model.head.bias.clone()
    with torch.no_grad():
        method.student.head.bias.add_(1)
    method.after_step(1)  # the share that stays is 1/2
    torch.testing.assert_close(method.teacher.model.head.bias, before + 0.5)
    state = method.training_state()
    assert any(name.startswith("teacher.model") for name in state) and not any("student" in name for name in state)
    other = MaskedImageConsistency(Segmenter(1), **OPTIONS)
    other.load_training_state(state)
    assert torch.equal(other.teacher.model.head.bias, method.teacher.model.head.bias)
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("student.") for name in trained)


def test_a_compiled_student_an_autocast_and_checkpointing_give_the_same_loss():
    arguments = images(1), labels(4, 12, 16), images(2)
    method = MaskedImageConsistency(Segmenter(), **OPTIONS)
    other_weights(method)
    want = copy.deepcopy(method)(*arguments, noise=NOISE)["loss"]
    compiled = copy.deepcopy(method)
    compiled.student = torch.compile(compiled.student, backend="aot_eager")
    got = compiled(*arguments, noise=NOISE)["loss"]
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    compiled.after_step(1)
    whole = torch.compile(copy.deepcopy(method), backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(whole(*arguments, noise=NOISE)["loss"], want, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = copy.deepcopy(method)(*arguments, noise=NOISE)["loss"]
    assert low.dtype == torch.float32 and abs(low - want) < 0.05 * want

    class Checkpointed(Segmenter):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    saving = MaskedImageConsistency(Checkpointed(), **OPTIONS)
    other_weights(saving)
    loss = saving(*arguments, noise=NOISE)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_distributed_data_parallel_runs_a_step(tmp_path):
    """One process: two passes of the student and a teacher without gradients under one wrapper."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        method = MaskedImageConsistency(Segmenter(), **OPTIONS)
        plain = copy.deepcopy(method)
        wrapped = nn.parallel.DistributedDataParallel(method)
        arguments = images(1), labels(4, 12, 16), images(2)
        wrapped(*arguments, noise=NOISE)["loss"].backward()
        plain(*arguments, noise=NOISE)["loss"].backward()
        for a, b in zip(method.student.parameters(), plain.student.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
        method.after_step(1)
    finally:
        torch.distributed.destroy_process_group()


def test_defaults_are_those_of_the_released_code_and_errors_name_the_argument():
    segmentation, classification = (
        MaskedImageConsistency(Segmenter(), task=t) for t in ("segmentation", "classification")
    )
    assert (segmentation.teacher.alpha, segmentation.block_size, segmentation.mask_ratio) == (0.999, 64, 0.7)
    assert segmentation.trust["weight"] == "quality" and classification.trust["weight"] == "prob"
    assert classification.teacher.alpha == 0.9 and segmentation.trust["threshold"] == 0.968
    with pytest.raises(ValueError, match="task: got 'depth'"):
        MaskedImageConsistency(Segmenter(), task="depth")
    with pytest.raises(ValueError, match="masked: got 'all'"):
        MaskedImageConsistency(Segmenter(), masked="all")
    with pytest.raises(ValueError, match="weight: got -1"):
        MaskedImageConsistency(Segmenter(), weight=-1)
