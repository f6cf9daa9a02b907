"""feature_alignment_loss beyond its OpSpec: the norm floor, torch's own losses, autocast, modules, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

from fastkd.nn import FeatureAlignmentLoss
from fastkd.ops import feature_alignment_loss


@pytest.fixture
def features(each_backend):
    """Student and teacher [3, 5, 24] on the backend's device; random, fixed."""
    random = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 5, 24, generator=random).to(device_of(each_backend)) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(loss, student, upstream=1.0):
    return torch.autograd.grad(loss * upstream, student)[0]


def plain(kind, beta):
    def loss(student, teacher):
        if kind == "cosine":
            return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if kind == "smooth_l1":
            return F.smooth_l1_loss(student, teacher, beta=beta)
        return F.l1_loss(student, teacher) if kind == "l1" else F.mse_loss(student, teacher)

    return loss


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1", "cosine"])
def test_equals_torch_functional_and_scales_with_the_upstream_gradient(features, kind):
    student, teacher = features
    ours = feature_alignment_loss(student, teacher, loss=kind, beta=0.2)
    theirs = plain(kind, 0.2)(student, teacher)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    want = gradient(theirs, student, -37.5)
    torch.testing.assert_close(gradient(ours, student, -37.5), want, rtol=2e-5, atol=1e-6 * want.abs().max().item())


def test_below_the_norm_floor_the_divisor_is_constant(features):
    student, teacher = features
    with torch.no_grad():
        student[0, 1] = 0
        student[1, 2] = torch.linspace(-1e-13, 1e-13, 24)  # norm 2.9e-13
    loss = feature_alignment_loss(student, teacher)
    want = plain("l1", 1.0)(student, teacher)  # F.normalize has the same floor
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    got, want = gradient(loss, student), gradient(want, student)
    low = torch.zeros(3, 5, dtype=torch.bool, device=got.device)
    low[0, 1] = low[1, 2] = True
    torch.testing.assert_close(got[low], want[low], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[~low], want[~low], rtol=1e-4, atol=1e-6)
    assert got[0, 1].abs().min() > 1e6  # g / 1e-12, without projection


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
def test_equal_rows_have_exactly_no_loss_and_no_gradient(features, kind, normalize):
    student, _ = features
    loss = feature_alignment_loss(student, student.detach().clone(), loss=kind, normalize=normalize)
    assert loss == 0 and gradient(loss, student).abs().max() == 0


def test_each_row_counts_alike_whatever_its_length(features):
    student, teacher = features
    rows = [feature_alignment_loss(student[b, t][None], teacher[b, t][None]) for b in range(3) for t in range(5)]
    torch.testing.assert_close(torch.stack(rows).mean(), feature_alignment_loss(student, teacher))
    flat = feature_alignment_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(flat, feature_alignment_loss(student, teacher), rtol=1e-6, atol=0)


def test_views_are_read_in_place(features):
    student, teacher = features
    wide = torch.cat((student, student + 1), dim=2).detach()[:, 1:, :24].requires_grad_()
    across = teacher.transpose(0, 2).contiguous().transpose(0, 2)[:, 1:]
    loss = feature_alignment_loss(wide, across)
    want = feature_alignment_loss(student[:, 1:].contiguous(), teacher[:, 1:].contiguous())
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(loss, wide), gradient(want, student)[:, 1:], rtol=1e-6, atol=1e-9)


def test_no_gradient_reaches_the_teacher_and_all_of_it_the_projection(features):
    student, teacher = features
    weight = torch.randn(32, 24, device=student.device, requires_grad=True)
    bias = torch.randn(32, device=student.device, requires_grad=True)
    wide = torch.randn(3, 5, 32, device=student.device)
    feature_alignment_loss(student, wide, weight, bias).backward()
    exact = [x.detach().double().requires_grad_() for x in (student, weight, bias)]
    plain("l1", 1.0)(F.linear(*exact), wide.double()).backward()
    for got, want in zip((student, weight, bias), exact):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-6)
    assert wide.grad is None


def test_autocast_projects_in_low_precision_and_compares_in_float32(features):
    student, teacher = features
    weight = torch.randn(24, 24, device=student.device, requires_grad=True)
    with torch.autocast(student.device.type, torch.bfloat16):
        loss = feature_alignment_loss(student, teacher, weight)
        projected = F.linear(student, weight)
    assert loss.dtype == torch.float32 and projected.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain("l1", 1.0)(projected.float(), teacher), rtol=1e-5, atol=0)
    loss.backward()
    assert student.grad.dtype == weight.grad.dtype == torch.float32


def test_module_passes_its_options_on(features):
    student, teacher = features
    module = FeatureAlignmentLoss("smooth_l1", normalize=False, beta=0.3)
    want = F.smooth_l1_loss(student, teacher, beta=0.3)
    torch.testing.assert_close(module(student, teacher), want)
    assert "beta=0.3" in repr(module) and not list(module.parameters())


def tensors(student=(2, 3, 8), teacher=(2, 3, 8), **dtypes):
    return dict(
        student=torch.ones(student, dtype=dtypes.get("student_dtype")),
        teacher=torch.ones(teacher, dtype=dtypes.get("teacher_dtype")),
    )


ERRORS = {
    "unknown loss": (dict(tensors(), loss="huber"), ValueError, "loss: got 'huber', expected one of l1"),
    "beta": (dict(tensors(), loss="smooth_l1", beta=0.0), ValueError, "beta: got 0.0"),
    "width": (tensors(student=(2, 3, 6)), ValueError, "projection weight"),
    "rows": (tensors(student=(2, 4, 8)), ValueError, r"student: got shape \(2, 4, 8\)"),
    "no rows": (tensors((0, 3, 8), (0, 3, 8)), ValueError, "at least one row"),
    "dimensions": (tensors((2, 3, 8), (6, 8)), ValueError, "teacher: got shape .*3 dimensions"),
    "float64 teacher": (tensors(teacher_dtype=torch.float64), TypeError, "float64 on both sides"),
    "integers": (tensors(student_dtype=torch.int64), TypeError, "student: got int64"),
    "weight shape": (dict(tensors(student=(2, 3, 6)), weight=torch.ones(6, 8)), ValueError, "weight: got shape"),
    "weight dtype": (dict(tensors(), weight=torch.ones(8, 8).bfloat16()), TypeError, "autocast"),
    "bias shape": (dict(tensors(), weight=torch.ones(8, 8), bias=torch.ones(7)), ValueError, "bias: got shape"),
    "bias alone": (dict(tensors(), bias=torch.ones(8)), ValueError, "bias without weight"),
    "trained teacher": (
        dict(student=torch.ones(2, 8), teacher=torch.ones(2, 8, requires_grad=True)), ValueError, "pass it detached",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        feature_alignment_loss(**kwargs)
