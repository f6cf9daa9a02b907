"""What the golden files of MaskAlign do not pin down: fusions, heads, weights, draws of masks, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

from fastkd import ops
from fastkd.nn import DynamicAlignment
from fastkd.ops.features.dynamic_alignment import HEADS, layer_weights_of


def random(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def layers(count, *shape, seed=0):
    return [random(*shape, seed=seed + index, dtype=torch.float64) for index in range(count)]


WEIGHTS = {
    ("top2", 4): [0, 0, 0.5, 0.5],
    ("top4", 4): [0.25] * 4,
    ("mean", 3): [1 / 3] * 3,
    ("out", 3): [0, 0, 1],
    ("linear_decay", 4): [0, 1 / 6, 2 / 6, 3 / 6],
    ("mid0", 3): [1, 0, 0],
    ("mid2", 3): [0, 0, 1],
}


@pytest.mark.parametrize("name, count", WEIGHTS)
def test_layer_weights(name, count):
    assert layer_weights_of(name, count) == pytest.approx(WEIGHTS[name, count])
    align = DynamicAlignment(count, count, 6, 8, layer_weights=name)
    assert align.used == tuple(index for index, weight in enumerate(WEIGHTS[name, count]) if weight)
    assert set(align.heads) == {str(index) for index in align.used}


def plain_head(head, x, kind):
    if kind == "linear":
        return F.linear(x, head.weight, head.bias)
    first, middle, *last = head
    if kind == "norm_linear":
        return F.linear(F.layer_norm(x, x.shape[-1:], first.weight, first.bias), middle.weight, middle.bias)
    x = F.linear(x, first.weight, first.bias)
    x = F.gelu(x) if kind == "mlp" else F.layer_norm(x, x.shape[-1:], middle.weight, middle.bias)
    return F.linear(x, last[0].weight, last[0].bias)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fusion", ["linear", "sum", "simple"])
def test_equals_the_plain_formula_with_its_gradients(fusion, head):
    count, wide = (3, 3) if fusion != "sum" else (3, 2)
    torch.manual_seed(0)
    align = DynamicAlignment(count, wide, 6, 8, fusion, head, "linear_decay").double()
    states = [state.requires_grad_() for state in layers(count, 2, 4, 6)]
    hidden = layers(wide, 2, 8, 8, seed=10)
    ids = torch.tensor([[2, 0, 6], [1, 5, 3]])
    start = {"linear": torch.eye(3) + 0.01, "sum": torch.full((2, 3), 1 / 3)}.get(fusion)
    if start is None:
        assert align.align_weights is None
    else:
        torch.testing.assert_close(align.align_weights.detach().float(), start)
    loss = align(states, [None, *hidden[1:]], ids, norm="whiten")

    weights, want = layer_weights_of("linear_decay", wide), 0
    for index, weight in enumerate(weights):
        if weight == 0:
            continue
        mixed = states[index]
        if align.align_weights is not None:
            mixed = sum(align.align_weights[index, b] * state for b, state in enumerate(states))
        target = F.layer_norm(hidden[index], (8,))
        target = torch.stack([torch.cat([t[:1], t[1:][keep]]) for t, keep in zip(target, ids)])
        want = want + weight * 2 * F.smooth_l1_loss(plain_head(align.heads[str(index)], mixed, head), target)
    inputs = [*states, *align.parameters()]
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    got, expected = (torch.autograd.grad(value, inputs, allow_unused=True) for value in (loss, want))
    for mine, theirs in zip(got, expected):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_autocast_mixes_in_float32_and_hands_16_bits_to_the_head():
    align = DynamicAlignment(2, 2, 6, 8, layer_weights="mean")
    states = [random(2, 3, 6, seed=index) for index in range(2)]
    seen = []
    align.heads["1"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = align(states, [random(2, 3, 8)] * 2)
    exact = align.align_weights[1, 0] * states[0] + align.align_weights[1, 1] * states[1]
    assert loss.dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], exact.bfloat16())


def test_mixtures_in_another_dtype(each_backend):
    """Sums are float32 whatever comes out; gradients come back in the dtypes of states and weights."""
    if each_backend == "cuda":
        pytest.skip("no CUDA C++ kernel")
    device = device_of(each_backend)
    states = [random(2, 3, 5, seed=index).to(device).requires_grad_() for index in range(3)]
    weight = random(2, 3, seed=9).to(device).requires_grad_()
    mixed = ops.layer_mix(states, weight, dtype=torch.bfloat16)
    exact = torch.einsum("ab,bntd->antd", weight, torch.stack(states))
    upstream = random(2, 2, 3, 5, seed=10).to(device, torch.bfloat16)
    got = torch.autograd.grad(mixed, [*states, weight], list(upstream))
    want = torch.autograd.grad(exact, [*states, weight], upstream.float())
    for ours, plain in zip(mixed, exact):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), plain, rtol=2**-7, atol=1e-6)
    for ours, plain in zip(got, want):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_mixture_weights_do_not_decay():
    from fastkd.train.optimizer import param_groups

    model = torch.nn.ModuleDict({"align": DynamicAlignment(3, 3, 6, 8, layer_weights="out")})
    decayed, plain = ({id(p) for p in group["params"]} for group in param_groups(model, 0.05))
    align = model["align"]
    assert decayed == {id(align.heads["2"].weight)}
    assert plain == {id(align.align_weights), id(align.heads["2"].bias)}


def test_a_mixture_that_is_not_used_has_no_gradient(each_backend):
    if each_backend == "cuda":
        pytest.skip("no CUDA C++ kernel")
    device = device_of(each_backend)
    states = [random(2, 3, 5, seed=index).to(device).requires_grad_() for index in range(3)]
    weight = random(2, 3, seed=9).to(device).requires_grad_()
    first, _ = ops.layer_mix(states, weight)
    grads = torch.autograd.grad(first.sum(), [*states, weight])
    for index in range(3):
        torch.testing.assert_close(grads[index], weight[0, index].expand(2, 3, 5).detach())
    torch.testing.assert_close(grads[3][0], torch.stack([state.sum() for state in states]).detach())
    assert (grads[3][1] == 0).all()


def test_whitened_targets_of_a_constant_row_are_zero(each_backend):
    """Its variance is 0: eps alone stands below the fraction."""
    if each_backend == "cuda":
        pytest.skip("no CUDA C++ kernel")
    device = device_of(each_backend)
    teacher = random(1, 3, 16).to(device)
    teacher[0, 1] = 7.0
    student = torch.full((1, 2, 16), 0.5, device=device, requires_grad=True)
    loss = ops.gather_whiten_smooth_l1(student, teacher, torch.tensor([[0]], device=device))
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad[0, 1], torch.full((16,), 2 * 0.5 / 32, device=device))


def test_smooth_l1_is_twice_that_of_torch_on_both_sides_of_1(each_backend):
    if each_backend == "cuda":
        pytest.skip("no CUDA C++ kernel")
    device = device_of(each_backend)
    student = torch.linspace(-3, 3, 64, device=device).view(1, 4, 16).requires_grad_()
    target = torch.zeros(1, 4, 16, device=device)
    loss, want = ops.gather_whiten_smooth_l1(student, target, norm="none"), 2 * F.smooth_l1_loss(student, target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, want)))


def test_important_patches_are_kept_as_often_as_drawing_without_replacement_says():
    """Two of three patches with importance 1, 2, 3; probabilities by hand."""
    importance = torch.tensor([1.0, 2.0, 3.0]).expand(20_000, 3)
    masking = ops.attention_masking(importance, 0.3, generator=torch.Generator().manual_seed(0))
    assert masking.ids_keep.shape == (20_000, 2)  # int(3 * 0.7)
    p = torch.tensor([1, 2, 3]) / 6
    first = torch.bincount(masking.ids_shuffle[:, 0], minlength=3) / 20_000
    torch.testing.assert_close(first, p, atol=0.015, rtol=0)
    pair = p[2] * p[1] / (1 - p[2])  # patch 2 first, then patch 1
    found = ((masking.ids_shuffle[:, 0] == 2) & (masking.ids_shuffle[:, 1] == 1)).float().mean()
    assert abs(found - pair) < 0.015


def test_a_patch_without_importance_comes_last():
    importance = torch.tensor([[0.0, 1.0, 0.0, 1e-30]])
    for seed in range(20):
        masking = ops.attention_masking(importance, 0.5, generator=torch.Generator().manual_seed(seed))
        assert set(masking.ids_keep[0].tolist()) == {1, 3}
        assert torch.equal(masking.ids_restore, masking.ids_shuffle.argsort(1))


def test_visible_patches_are_counted_in_double_precision():
    for patches, ratio, visible in ((196, 0.7, 58), (20, 0.9, 1), (16, 0.7, 4)):
        assert ops.attention_masking(torch.ones(1, patches), ratio).ids_keep.shape == (1, visible)


def test_cls_attention_row_is_a_row_of_the_score_matrix():
    query, key = random(2, 3, 5), random(2, 3, 9, 5, seed=1)  # one CLS token, two registers, six patches
    want = (query[:, :, None] @ key.transpose(2, 3) / 5**0.5).softmax(-1)[:, :, 0, 3:].mean(1)
    torch.testing.assert_close(ops.cls_attention_row(query, key, num_prefix=3), want)


def tensors(**changes):
    ids = torch.tensor([[0, 2]])
    return dict(dict(student=torch.ones(1, 3, 4), teacher=torch.ones(1, 6, 4), ids_keep=ids), **changes)


ERRORS = {
    "norm": (lambda: ops.gather_whiten_smooth_l1(**tensors(), norm="batch"), ValueError, "norm: got 'batch'"),
    "loss": (lambda: ops.gather_whiten_smooth_l1(**tensors(), loss="huber"), ValueError, "loss: got 'huber'"),
    "width": (lambda: ops.gather_whiten_smooth_l1(**tensors(student=torch.ones(1, 3, 5))), ValueError, "width 4"),
    "tokens": (
        lambda: ops.gather_whiten_smooth_l1(**tensors(student=torch.ones(1, 4, 4))), ValueError, "ids_keep: got 2",
    ),
    "trained teacher": (
        lambda: ops.gather_whiten_smooth_l1(**tensors(teacher=torch.ones(1, 6, 4, requires_grad=True))),
        ValueError, "pass it detached",
    ),
    "float64 teacher": (
        lambda: ops.gather_whiten_smooth_l1(**tensors(teacher=torch.ones(1, 6, 4).double())), TypeError, "float64 on",
    ),
    "targets of another shape": (
        lambda: ops.gather_whiten_smooth_l1(torch.ones(1, 3, 4), torch.ones(1, 4, 4)), ValueError, "like student",
    ),
    "weight": (lambda: ops.layer_mix([torch.ones(2, 3)] * 3, torch.ones(2, 2)), ValueError, "one column per state"),
    "states": (lambda: ops.layer_mix([], torch.ones(1, 1)), ValueError, "states: got none"),
    "state shapes": (
        lambda: ops.layer_mix([torch.ones(2, 3), torch.ones(3, 2)], torch.ones(1, 2)), ValueError, r"states\[1\]",
    ),
    "state dtypes": (
        lambda: ops.layer_mix([torch.ones(2), torch.ones(2).half()], torch.ones(1, 2)), TypeError, "float32 like",
    ),
    "negative importance": (lambda: ops.attention_masking(-torch.ones(1, 4), 0.5), ValueError, "negative value"),
    "no importance": (lambda: ops.attention_masking(torch.zeros(1, 4), 0.5), ValueError, "a row of zeros"),
    "mask ratio": (lambda: ops.attention_masking(torch.ones(1, 4), 1.0), ValueError, "mask_ratio: got 1.0"),
    "nothing visible": (lambda: ops.attention_masking(torch.ones(1, 4), 0.9), ValueError, "no patch would be visible"),
    "noise": (
        lambda: ops.attention_masking(torch.ones(1, 4), 0.5, exp_noise=torch.ones(1, 3)), ValueError, "exp_noise: got",
    ),
    "layer counts": (lambda: DynamicAlignment(3, 4, 6, 8), ValueError, "use fusion='sum'"),
    "fusion": (lambda: DynamicAlignment(3, 3, 6, 8, "mean"), ValueError, "fusion: got 'mean'"),
    "head": (lambda: DynamicAlignment(3, 3, 6, 8, head="conv"), ValueError, "head: got 'conv'"),
    "too many layers": (lambda: DynamicAlignment(3, 3, 6, 8), ValueError, "'top5', expected top1 to top3"),
    "unknown weights": (lambda: DynamicAlignment(3, 3, 6, 8, layer_weights="last"), ValueError, "topK, mean"),
    "missing layer": (lambda: DynamicAlignment(3, 3, 6, 8, layer_weights="mid3"), ValueError, "mid0 to mid2"),
    "state count": (
        lambda: DynamicAlignment(2, 2, 4, 4, layer_weights="out")([torch.ones(1, 2, 4)], [None] * 2),
        ValueError, "student_states: got 1 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_patches_outside_of_the_picture_are_refused_on_the_cpu():
    for patch in (-1, 5):
        with ops.backend("reference" if patch > 0 else "cpp"), pytest.raises((RuntimeError, IndexError)):
            ops.gather_whiten_smooth_l1(**tensors(ids_keep=torch.tensor([[0, patch]])))
