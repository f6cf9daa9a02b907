"""Hint, attention transfer, SP, PKT and RKD beyond their OpSpecs: laws, extreme features, modules, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of

from fastkd.nn import ATLoss, HintLoss, HintProjector, PKTLoss, RKDLoss, SPLoss
from fastkd.ops import SPECS, at_loss, backend, feature_alignment_loss, hint_loss, pkt_loss, rkd_loss, sp_loss

rkd_backends = pytest.mark.parametrize("name", backends_of(SPECS["rkd_loss"]))
at_backends = pytest.mark.parametrize("name", backends_of(SPECS["at_loss"]))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(function, student, *rest, upstream=1.0, **options):
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(function(student, *rest, **options) * upstream, student)[0]


# --- RKD -------------------------------------------------------------------------------------------------------------


@rkd_backends
def test_rkd_of_features_far_from_the_origin(name):
    """Mean / std = 600: distances from a Gram matrix of raw features would be off by percents."""
    near, teacher = random(12, 16), random(12, 9, seed=1)
    student = (near + 600).to(device_of(name))  # what float32 keeps of it
    exact = student.cpu().double()
    with backend("reference"):
        want, slope = rkd_loss(exact, teacher.double()), gradient(rkd_loss, exact, teacher.double())
    with backend(name):
        got = rkd_loss(student, teacher.to(student.device))
        grad = gradient(rkd_loss, student, teacher.to(student.device))
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-6, atol=0)
    torch.testing.assert_close(grad.cpu().double(), slope, rtol=0, atol=1e-5 * slope.abs().max().item())


@rkd_backends
def test_rkd_of_equal_rows_has_no_wild_gradient(name):
    student, teacher = random(6, 8).to(device_of(name)), random(6, 5, seed=1).to(device_of(name))
    student[3] = student[1]
    with backend(name):
        grad = gradient(rkd_loss, student, teacher)
        assert grad.isfinite().all() and grad.abs().max() < 100
        alone = gradient(rkd_loss, student[:1].repeat(6, 1), teacher)  # all equal
    assert (alone == 0).all()


@rkd_backends
def test_rkd_laws(name):
    """Rotation, shift, scale and order change nothing; the gradient is at right angles to shift and scale."""
    student, teacher = random(9, 6).to(device_of(name)), random(9, 6, seed=1).to(device_of(name))
    rotation = torch.linalg.qr(random(6, 6, seed=2).to(student.device))[0]
    with backend(name):
        plain, grad = rkd_loss(student, teacher), gradient(rkd_loss, student, teacher)
        moved = rkd_loss(3 * student @ rotation + 2, 0.1 * teacher @ rotation - 1)
        grad_moved = gradient(rkd_loss, 3 * student @ rotation + 2, teacher)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(3 * grad_moved, grad @ rotation, rtol=1e-3, atol=1e-3 * grad.abs().max().item())
    torch.testing.assert_close(grad.sum(0), torch.zeros_like(grad[0]), rtol=0, atol=1e-5 * grad.abs().max().item())
    assert (grad * (student - student.mean(0))).sum().abs() < 1e-4 * grad.abs().max()


@rkd_backends
def test_rkd_of_two_samples_is_zero(name):
    """One distance, equal to its own mean; all angles are of equal vectors."""
    with backend(name):
        device = device_of(name)
        student, teacher = random(2, 4).to(device), random(2, 4, seed=1).to(device)
        assert rkd_loss(student, teacher) < 1e-10
        assert gradient(rkd_loss, student, teacher).abs().max() < 1e-4


@rkd_backends
def test_rkd_of_more_samples_than_a_tile(name):
    student, teacher = random(70, 3).to(device_of(name)), random(70, 4, seed=1).to(device_of(name))
    with backend("reference"):
        want, slope = (f(student, teacher) for f in (rkd_loss, lambda s, t: gradient(rkd_loss, s, t, upstream=-3)))
    with backend(name):
        torch.testing.assert_close(rkd_loss(student, teacher), want, rtol=1e-5, atol=0)
        grad = gradient(rkd_loss, student, teacher, upstream=-3)
    torch.testing.assert_close(grad, slope, rtol=0, atol=1e-4 * slope.abs().max().item())


# --- attention transfer ----------------------------------------------------------------------------------------------


@at_backends
def test_at_by_hand(name):
    """One position stands out: the map of a single channel is its squares over their norm."""
    student = torch.tensor([[[[3.0, 1.0]]]], device=device_of(name))
    teacher = torch.tensor([[[[0.0, 2.0]]]], device=device_of(name))
    map_s, map_t = torch.tensor([9.0, 1.0]) / 82**0.5, torch.tensor([0.0, 1.0])
    with backend(name):
        assert at_loss(student, teacher).item() == pytest.approx(F.mse_loss(map_s, map_t).item(), rel=1e-6)
        assert at_loss(student, teacher, mode="paper").item() == pytest.approx((map_s - map_t).norm().item(), rel=1e-6)


@at_backends
@pytest.mark.parametrize("sizes", [((6, 6), (3, 3)), ((3, 3), (7, 6)), ((8, 3), (4, 5))])
def test_at_pools_the_larger_side(name, sizes):
    student, teacher = random(2, 3, *sizes[0]).to(device_of(name)), random(2, 5, *sizes[1], seed=1).to(device_of(name))
    size = tuple(map(min, *sizes))

    def by_hand(student, teacher):
        maps = (F.adaptive_avg_pool2d(x, size).square().mean(1).flatten(1) for x in (student, teacher))
        return F.mse_loss(*(F.normalize(m) for m in maps))

    with backend(name):
        torch.testing.assert_close(at_loss(student, teacher), by_hand(student, teacher), rtol=1e-5, atol=0)
        got, want = (gradient(f, student, teacher, upstream=7.5) for f in (at_loss, by_hand))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@at_backends
def test_at_of_dead_maps(name):
    """A map of zeros has a norm below the floor: finite loss, no gradient for p > 1; its neighbour is not disturbed."""
    student, teacher = random(2, 4, 3, 3).to(device_of(name)), random(2, 4, 3, 3, seed=1).to(device_of(name))
    student[0] = 0
    with backend(name):
        loss, grad = at_loss(student, teacher), gradient(at_loss, student, teacher)
        alone = gradient(at_loss, student[1:], teacher[1:])
    assert loss.isfinite() and (grad[0] == 0).all()
    torch.testing.assert_close(grad[1], alone[0] / 2, rtol=1e-5, atol=1e-9)


@at_backends
def test_at_keeps_channels_last(name):
    student = random(2, 8, 4, 4).to(device_of(name)).to(memory_format=torch.channels_last).requires_grad_()
    teacher = random(2, 8, 4, 4, seed=1).to(student.device)
    with backend(name):
        (grad,) = torch.autograd.grad(at_loss(student, teacher), student)
        assert grad.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(grad, gradient(at_loss, student.contiguous(), teacher), rtol=1e-5, atol=1e-8)


def test_at_module_takes_lists():
    students, teachers = (
        [random(2, 3, 4, 4), random(2, 6, 2, 2)],
        [random(2, 5, 4, 4, seed=1), random(2, 3, 2, 2, seed=1)],
    )
    module = ATLoss(p=1.0, mode="paper")
    want = sum(at_loss(s, t, 1.0, "paper") for s, t in zip(students, teachers)) / 2
    torch.testing.assert_close(module(students, teachers), want)
    with pytest.raises(ValueError, match="zip"):
        module(students, teachers[:1])


# --- hint ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (1, 2, 3, 2, 3), (4099,)])
@pytest.mark.parametrize("loss, plain", [("l1", F.l1_loss), ("l2", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)])
def test_hint_of_any_shape_equals_torch(shape, loss, plain):
    student, teacher = random(*shape), random(*shape, seed=1)
    for reduction in ("mean", "sum"):
        options = dict(beta=0.3) if loss == "smooth_l1" else {}
        want = plain(student, teacher, reduction=reduction, **options)
        got = hint_loss(student, teacher, loss=loss, reduction=reduction, **options)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
        slopes = [
            gradient(f, student, teacher, upstream=-2.0, reduction=reduction, **more, **options)
            for f, more in ((hint_loss, dict(loss=loss)), (plain, {}))
        ]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-9)


def test_hint_normalises_channels_of_maps_and_of_tokens():
    maps, goal = random(2, 6, 3, 4), random(2, 6, 3, 4, seed=1)
    want = F.mse_loss(F.normalize(maps, dim=1), F.normalize(goal, dim=1))
    torch.testing.assert_close(hint_loss(maps, goal, normalize=True), want, rtol=1e-5, atol=0)
    want = (1 - F.cosine_similarity(maps, goal, dim=1)).mean()
    torch.testing.assert_close(hint_loss(maps, goal, loss="cosine"), want, rtol=1e-5, atol=0)
    total = hint_loss(maps, goal, loss="cosine", reduction="sum")
    torch.testing.assert_close(total, (1 - F.cosine_similarity(maps, goal, dim=1)).sum(), rtol=1e-5, atol=0)
    tokens, aim = maps.flatten(2), goal.flatten(2)
    torch.testing.assert_close(
        hint_loss(tokens, aim, normalize=True), feature_alignment_loss(tokens, aim, loss="l2"), rtol=1e-6, atol=0
    )
    by_channel = hint_loss(tokens, aim, normalize=True, channels=1)
    torch.testing.assert_close(by_channel, hint_loss(maps, goal, normalize=True), rtol=1e-6, atol=0)


def test_hint_projector_and_module():
    student, teacher = random(4, 3, 8, 8), random(4, 5, 4, 4, seed=1)
    module = HintLoss(HintProjector(3, 5, stride=2))
    loss = module(student, teacher)
    torch.testing.assert_close(loss, F.mse_loss(module.projector(student), teacher))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters()) and (module.projector(student) >= 0).all()
    assert (HintProjector(3, 5, relu=False)(student) < 0).any() and HintProjector(3, 5)(student).shape == (4, 5, 8, 8)
    linear = torch.nn.Linear(3, 6)
    tokens, goal = random(2, 7, 3), random(2, 7, 6, seed=1)
    want = F.l1_loss(linear(tokens), goal)
    torch.testing.assert_close(hint_loss(tokens, goal, linear, "l1"), want)
    with pytest.raises(ValueError, match=r"student: got shape \(4, 3, 8, 8\).*HintProjector"):
        hint_loss(student, teacher)


# --- SP and PKT ------------------------------------------------------------------------------------------------------


def test_sp_and_pkt_do_not_see_rotation_or_scale():
    student, teacher = random(6, 5), random(6, 7, seed=1)
    rotation = torch.linalg.qr(random(5, 5, seed=2))[0]
    for loss in (sp_loss, pkt_loss):
        torch.testing.assert_close(loss(3 * student @ rotation, teacher), loss(student, teacher), rtol=1e-4, atol=1e-8)


def test_pkt_of_a_row_of_zeros_is_finite():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    student[2] = 0
    assert pkt_loss(student, teacher).isfinite() and gradient(pkt_loss, student, teacher).isfinite().all()


def test_modules_flatten_and_pass_options_on():
    student, teacher = random(5, 3, 2, 2), random(5, 4, 2, 2, seed=1)
    flat = student.flatten(1), teacher.flatten(1)
    torch.testing.assert_close(SPLoss()(student, teacher), sp_loss(*flat))
    torch.testing.assert_close(PKTLoss(eps=1e-5)(student, teacher), pkt_loss(*flat, eps=1e-5))
    module = RKDLoss(1.0, 2.0, squared=True)
    torch.testing.assert_close(
        module(student, teacher), rkd_loss(*flat, distance_weight=1.0, angle_weight=2.0, squared=True)
    )
    assert "squared=True" in repr(module) and not list(module.parameters())


# --- all -------------------------------------------------------------------------------------------------------------

LOSSES = dict(at=at_loss, hint=hint_loss, sp=sp_loss, pkt=pkt_loss, rkd=rkd_loss)
PAIR = dict(at=(2, 3, 4), hint=(2, 3, 4), sp=(3, 4), pkt=(3, 4), rkd=(3, 4))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_features(name, dtype):
    student, teacher = random(*PAIR[name]).to(dtype), random(*PAIR[name], seed=1).to(dtype)
    loss, grad = LOSSES[name](student, teacher), gradient(LOSSES[name], student, teacher)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss, LOSSES[name](student.float(), teacher.float()), rtol=1e-6, atol=1e-8)
    want = gradient(LOSSES[name], student.float(), teacher.float())
    torch.testing.assert_close(grad.float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_errors_name_the_argument(name):
    loss, shape = LOSSES[name], PAIR[name]
    student, teacher = random(*shape), random(*shape)
    with pytest.raises(ValueError, match="teacher: got a tensor that requires grad.*pass it detached"):
        loss(student, teacher.clone().requires_grad_())
    with pytest.raises(TypeError, match="float64 on both sides"):
        loss(student, teacher.double())
    with pytest.raises(TypeError, match="student: got int64"):
        loss(student.long(), teacher)
    with pytest.raises(ValueError, match="student: got"):
        loss(student[:0], teacher[:0])
    with pytest.raises(ValueError, match="student: got"):
        loss(student[:-1], teacher)


BAD = {
    "one sample": (rkd_loss, (1, 4), {}, "N >= 2"),
    "no eps": (rkd_loss, (3, 4), dict(eps=0.0), "eps: got 0.0"),
    "mode": (at_loss, (2, 3, 4), dict(mode="sum"), "mode: got 'sum'"),
    "p": (at_loss, (2, 3, 4), dict(p=0.5), "p: got 0.5"),
    "unknown": (hint_loss, (2, 3), dict(loss="l3"), "loss: got 'l3'"),
    "reduction": (hint_loss, (2, 3), dict(reduction="none"), "reduction: got 'none'"),
    "beta": (hint_loss, (2, 3), dict(loss="smooth_l1", beta=0.0), "beta: got 0.0"),
    "channels": (hint_loss, (2, 3), dict(normalize=True, channels=2), "channels: got 2"),
    "pkt eps": (pkt_loss, (3, 4), dict(eps=0.0), "eps: got 0.0"),
}


@pytest.mark.parametrize("loss, shape, options, match", BAD.values(), ids=BAD)
def test_wrong_options(loss, shape, options, match):
    with pytest.raises(ValueError, match=match):
        loss(random(*shape), random(*shape), **options)
