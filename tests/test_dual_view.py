"""dual_view_loss beyond its OpSpec: the DCT that it stands for, pairs, prepared targets, the norm floor, errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

from fastkd.nn import DualViewLoss
from fastkd.ops import dual_view_loss, dual_view_target, remove_dc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from baselines.published.dual_view_loss import dct, inverse_dct, published, transform  # noqa: E402


@pytest.fixture
def features(each_backend):
    """Student and teacher [3, 16, 20] on the backend's device; random, fixed, with a direct component."""
    random = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(3, 16, 20, generator=random) + torch.randn(20, generator=random) for _ in range(2))
    return student.to(device_of(each_backend)).requires_grad_(), teacher.to(device_of(each_backend))


def gradient(loss, inputs, upstream=1.0):
    return torch.autograd.grad(loss * upstream, inputs, retain_graph=True)


def close(got, want, relative=2e-5):
    torch.testing.assert_close(got, want, rtol=relative, atol=relative * want.abs().max().item())


def test_both_losses_and_their_gradients_are_those_of_the_published_form(features):
    student, teacher = features
    ours, theirs = dual_view_loss(student, teacher), published(student, teacher)
    for mine, other in zip(ours, theirs):
        close(mine, other)
        close(*(gradient(loss, student, -3.5)[0] for loss in (mine, other)))


@pytest.mark.parametrize("height, width", [(3, 5), (4, 4), (1, 6)])
def test_removing_the_mean_is_the_dct_without_its_first_coefficient(height, width):
    x = torch.randn(2, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    to, back = ([change(torch.eye(n, dtype=x.dtype)) for n in (height, width)] for change in (dct, inverse_dct))
    coefficients = transform(x, *to)
    assert torch.allclose(transform(coefficients, *back), x, atol=1e-14)
    coefficients[:, :, 0, 0] = 0
    assert torch.allclose(remove_dc(x, "map"), transform(coefficients, *back), atol=1e-14)


def test_remove_dc_is_its_own_adjoint_and_works_in_float32():
    x = torch.randn(2, 9, 4, requires_grad=True)
    above = torch.randn(2, 9, 4)
    torch.testing.assert_close(gradient((remove_dc(x) * above).sum(), x)[0], remove_dc(above))
    half = (100 + torch.randn(2, 9, 4)).bfloat16()
    assert remove_dc(half).dtype == torch.bfloat16
    torch.testing.assert_close(remove_dc(half), remove_dc(half.float()).bfloat16(), rtol=0, atol=0)


def test_each_student_of_a_pair_has_its_own_loss_and_gradient(features):
    student, teacher = features
    other = (2 * student.detach().roll(1, 0) + 1).requires_grad_()
    plain, alt = dual_view_loss((student, other), teacher)
    torch.testing.assert_close(plain, dual_view_loss(student, teacher)[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(alt, dual_view_loss(other, teacher)[1], rtol=1e-6, atol=0)
    ours = gradient(2 * plain + 3 * alt, (student, other))
    alone = (
        gradient(2 * dual_view_loss(student, teacher)[0], student),
        gradient(3 * dual_view_loss(other, teacher)[1], other),
    )
    for mine, (want,) in zip(ours, alone):
        close(mine, want, 1e-6)
    together = dual_view_loss(student, teacher)
    assert gradient(together[0], student)[0].abs().sum() > 0  # one loss alone


def test_a_prepared_target_serves_many_losses(features):
    student, teacher = features
    target = dual_view_target(teacher)
    for factor in (1.0, 0.3):
        for mine, want in zip(dual_view_loss(factor * student, target), dual_view_loss(factor * student, teacher)):
            assert torch.equal(mine, want)
    torch.testing.assert_close(target.mean, teacher.mean(1))
    torch.testing.assert_close(target.inverse_norms[0], 1 / teacher.norm(dim=-1))
    torch.testing.assert_close(target.inverse_norms[1], 1 / remove_dc(teacher).norm(dim=-1))


def test_below_the_norm_floor_the_divisor_is_constant(features):
    student, teacher = features
    with torch.no_grad():
        student[0, 3] = 0
        student[1, 2] = torch.linspace(-1e-13, 1e-13, 20)
        student[2] = 0  # and zero without its mean
        teacher[1, 5] = 1e-14
    for alpha in ((1.0, 0.0), (0.0, 1.0)):
        ours = sum(dual_view_loss(student, teacher, alpha=alpha))
        view = (lambda x: x) if alpha[0] else remove_dc
        u, v = (F.normalize(view(x), dim=-1, eps=1e-12) for x in (student, teacher))
        want = (u - v).square().sum() / 3
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=0)
        for image in range(3):
            low, high = (gradient(loss, student)[0][image] for loss in (ours, want))
            close(low, high, 1e-4)
            usual = torch.arange(16, device=low.device) > 5  # rows far above the floor beside those below it
            close(low[usual], high[usual], 1e-3)


def test_autocast_and_16_bit_features_give_a_float32_loss(features):
    student, teacher = features
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast(student.device.type, torch.bfloat16):
        losses = dual_view_loss(half, teacher)
    exact = dual_view_loss(half.detach().float().requires_grad_(), teacher)
    for mine, want in zip(losses, exact):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=0)
    assert gradient(sum(losses), half)[0].dtype == torch.bfloat16


def test_module_passes_its_options_on(features):
    student, teacher = features
    maps = student.transpose(1, 2).unflatten(2, (4, 4))
    module = DualViewLoss((0.5, 2.0), "map")
    for mine, want in zip(module(maps, teacher), dual_view_loss(student, teacher, alpha=(0.5, 2.0))):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=0)
    assert "alpha=(0.5, 2.0)" in repr(module) and not list(module.parameters())


def call(student=(2, 6, 8), teacher=(2, 6, 8), dtype=None, **options):
    shape = [student] if isinstance(student, tuple) else student
    tensors = tuple(torch.ones(s) for s in shape)
    return dual_view_loss(tensors if len(tensors) > 1 else tensors[0], torch.ones(teacher, dtype=dtype), **options)


ERRORS = {
    "layout": (dict(layout="nchw"), ValueError, "layout: got 'nchw', expected 'tokens'"),
    "channels": (dict(student=(2, 6, 7)), ValueError, "student: got shape .2, 6, 7.*CrossAttentionProjector"),
    "positions": (dict(student=(2, 5, 8)), ValueError, r"student: got shape \(2, 5, 8\), expected \(2, 6, 8\)"),
    "map of another form": (
        dict(student=(2, 8, 2, 3), teacher=(2, 8, 3, 2), layout="map"), ValueError, r"a map of \(2, 3\)",
    ),
    "tokens as a map": (dict(layout="map"), ValueError, "student: got shape .*expected 4 dimensions"),
    "three students": (dict(student=[(2, 6, 8)] * 3), ValueError, "student: got 3 tensors"),
    "second of a pair": (dict(student=[(2, 6, 8), (2, 6, 7)]), ValueError, r"student: got shape \(2, 6, 7\)"),
    "no image": (dict(student=(0, 6, 8), teacher=(0, 6, 8)), ValueError, "teacher: .*at least one image"),
    "float64 teacher": (dict(dtype=torch.float64), TypeError, "float64 on both sides"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(options, error, match):
    with pytest.raises(error, match=match):
        call(**options)


def test_a_teacher_that_requires_grad_is_refused():
    student, teacher = torch.ones(2, 4, 8), torch.ones(2, 4, 8, requires_grad=True)
    for wrong in (lambda: dual_view_loss(student, teacher), lambda: dual_view_target(teacher)):
        with pytest.raises(ValueError, match="teacher: got a tensor that requires grad.*pass it detached"):
            wrong()
