"""Losses of a linear head beyond their OpSpecs: memory, torch's own losses, chunks, vocabularies, modules, errors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

from fastkd import nn, ops


@pytest.fixture
def head(each_backend):
    """Input [6, 5] and weight [11, 5], bias, labels with one ignored, and a teacher of width 7; random, fixed."""
    random = torch.Generator().manual_seed(5)
    shapes = dict(x=(6, 5), weight=(11, 5), bias=(11,), teacher_x=(6, 7), teacher_weight=(11, 7))
    made = {k: torch.randn(s, generator=random).to(device_of(each_backend)) for k, s in shapes.items()}
    for name in ("x", "weight", "bias"):
        made[name].requires_grad_()
    return made | dict(target=torch.tensor([3, -100, 0, 10, 3, 7], device=made["x"].device))


def gradients(loss, *inputs, upstream=1.0):
    return torch.autograd.grad(loss.sum() * upstream, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_torchs(head, reduction, smoothing):
    options = dict(label_smoothing=smoothing, reduction=reduction)
    inputs = [head[k] for k in ("x", "weight", "bias")]
    ours = ops.linear_cross_entropy(head["x"], head["weight"], head["target"], head["bias"], chunk_size=4, **options)
    theirs = F.cross_entropy(F.linear(*inputs), head["target"], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(ours, *inputs, upstream=-3.0), gradients(theirs, *inputs, upstream=-3.0)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_kl_reduces_as_torchs_does(head, reduction):
    x, weight = head["x"], head["weight"]
    logits = head["teacher_x"] @ head["teacher_weight"].t()
    ours = ops.linear_kl(x, weight, teacher_logits=logits, temperature=2.0, reduction=reduction)
    log_q, log_p = (z.div(2.0).log_softmax(1) for z in (x @ weight.t(), logits))
    theirs = F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    square = ops.linear_kl(x, weight, teacher_logits=logits, temperature=2.0, reduction=reduction, t_square=True)
    torch.testing.assert_close(square, 4 * theirs, rtol=1e-5, atol=1e-7)


def test_every_row_takes_its_own_upstream_gradient(head):
    """ "none" makes its gradients in backward, from the upstream gradient of each row."""
    upstream = torch.tensor([0.0, 5.0, 1e-30, -2.0, 3e4, 1.0], device=head["x"].device)
    inputs = [head[k] for k in ("x", "weight", "bias")]
    ours = ops.linear_cross_entropy(*inputs[:2], head["target"], inputs[2], reduction="none", chunk_size=4)
    theirs = F.cross_entropy(F.linear(*inputs), head["target"], reduction="none")
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
    zero = torch.autograd.grad(
        ops.linear_cross_entropy(*inputs[:2], head["target"], inputs[2], reduction="none"), inputs, 0 * upstream
    )
    assert all(g.abs().max() == 0 for g in zero)


def test_scale_and_cap_are_those_of_the_formula(head):
    inputs = [head[k] for k in ("x", "weight", "bias")]
    options = dict(logit_scale=3.0, softcap=2.0, teacher_logit_scale=0.5, teacher_softcap=4.0, beta=0.3)
    ours = ops.linear_jsd(
        *inputs[:2], head["teacher_x"], head["teacher_weight"], head["target"], student_bias=inputs[2], ce_weight=0.7,
        chunk_size=4, **options,
    )  # fmt: skip
    z = 2 * torch.tanh(3.0 * F.linear(*inputs) / 2)
    v = 4 * torch.tanh(0.5 * head["teacher_x"] @ head["teacher_weight"].t() / 4)
    p, q = v.softmax(1), z.softmax(1)
    m = 0.3 * p + 0.7 * q
    rows = 0.3 * (p * (p / m).log()).sum(1) + 0.7 * (q * (q / m).log()).sum(1)
    valid = head["target"] != -100
    theirs = rows[valid].mean() + 0.7 * F.cross_entropy(z, head["target"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(ours, *inputs), gradients(theirs, *inputs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_beta_counts_the_teacher(head):
    """beta is the teacher's share: at its ends the divergence is forward and reverse KL, near them it is near 0."""
    x, weight, teacher = head["x"], head["weight"], (head["teacher_x"], head["teacher_weight"])
    p, q = (teacher[0] @ teacher[1].t()).softmax(1), (x @ weight.t()).softmax(1)
    forward, reverse = (p * (p / q).log()).sum(1).mean(), (q * (q / p).log()).sum(1).mean()
    for beta, want in ((0.0, forward), (1.0, reverse), (1e-3, 1e-3 * forward), (1 - 1e-3, 1e-3 * reverse)):
        got = ops.linear_jsd(x, weight, *teacher, beta=beta)
        torch.testing.assert_close(got, want, rtol=0.05, atol=1e-6)


def test_no_row_that_counts_gives_zero(head):
    target = torch.full_like(head["target"], -100)
    inputs = [head[k] for k in ("x", "weight", "bias")]
    loss = ops.linear_cross_entropy(*inputs[:2], target, inputs[2])
    assert loss == 0 and all(g.abs().max() == 0 for g in gradients(loss, *inputs))
    jsd = ops.linear_jsd(*inputs[:2], head["teacher_x"], head["teacher_weight"], target, ce_weight=1.0)
    assert jsd == 0 and all(g.abs().max() == 0 for g in gradients(jsd, *inputs[:2]))


def test_sequences_are_flattened(head):
    batch = {k: head[k].detach().unflatten(0, (2, 3)) for k in ("x", "target", "teacher_x")}
    rows = ops.linear_kl(
        batch["x"], head["weight"], batch["teacher_x"], head["teacher_weight"], batch["target"], reduction="none"
    )
    flat = ops.linear_kl(
        head["x"], head["weight"], head["teacher_x"], head["teacher_weight"], head["target"], reduction="none"
    )
    assert rows.shape == (2, 3) and torch.equal(rows.flatten(), flat)


def test_num_items_divides_the_sum(head):
    made = [head[k] for k in ("x", "weight", "target", "bias")]
    total = ops.linear_cross_entropy(*made, reduction="sum")
    torch.testing.assert_close(ops.linear_cross_entropy(*made, num_items=17), total / 17)


def test_vocabularies_that_differ_raise_or_are_cut(head):
    wide = torch.cat((head["teacher_weight"], torch.randn(5, 7, device=head["x"].device)))
    with pytest.raises(ValueError, match="16 classes, expected 11 like the student; .*vocab_size"):
        ops.linear_kl(head["x"], head["weight"], head["teacher_x"], wide)
    cut = ops.linear_kl(head["x"], head["weight"], head["teacher_x"], wide, vocab_size=11)
    same = ops.linear_kl(head["x"], head["weight"], head["teacher_x"], head["teacher_weight"])
    torch.testing.assert_close(cut, same)
    (gradient,) = gradients(
        ops.linear_kl(head["x"], head["weight"], head["teacher_x"], head["teacher_weight"], vocab_size=8),
        head["weight"],
    )
    assert gradient[8:].abs().max() == 0 and gradient[:8].abs().min() > 0


@pytest.mark.parametrize("mode", ["raw", "renorm", "tail"])
def test_all_classes_as_top_k_are_the_full_divergence(head, mode):
    x, weight = head["x"], head["weight"]
    log_p = (head["teacher_x"] @ head["teacher_weight"].t()).log_softmax(1)
    ids = torch.rand(6, 11).argsort(1).to(x.device)
    top = ops.linear_kl(x, weight, topk_ids=ids, topk_logprobs=log_p.gather(1, ids), topk_mode=mode)
    full = ops.linear_kl(x, weight, head["teacher_x"], head["teacher_weight"])
    torch.testing.assert_close(top, full, rtol=1e-4, atol=1e-5)
    for got, want in zip(gradients(top, x, weight), gradients(full, x, weight)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_topk_with_cross_entropy_is_the_sum_of_both(head):
    x, weight, target = head["x"], head["weight"], head["target"]
    log_p = (head["teacher_x"] @ head["teacher_weight"].t()).log_softmax(1)
    values, ids = log_p.topk(4)
    make = functools.partial(ops.linear_kl, x, weight, target=target, topk_ids=ids, topk_logprobs=values)
    both = make(ce_weight=0.3, kl_weight=0.6)
    apart = 0.6 * make() + 0.3 * ops.linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(both, apart)
    for got, want in zip(gradients(both, x, weight), gradients(apart, x, weight)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_float16_keeps_gradients_of_many_rows():
    """1 / N would push the gradient of a logit out of float16's range if it were multiplied in before the products."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3000, 4, generator=random) / 30, torch.randn(50, 4, generator=random) / 30
    target = torch.randint(50, (3000,), generator=random)
    exact = [t.double().requires_grad_() for t in (x.half(), weight.half())]
    halves = [t.half().requires_grad_() for t in (x, weight)]
    ours = ops.linear_cross_entropy(*halves, target)
    wanted = gradients(F.cross_entropy(exact[0] @ exact[1].t(), target), *exact)
    for got, want in zip(gradients(ours, *halves), wanted):
        assert got.dtype == torch.float16
        # The result itself has the resolution of float16's smallest numbers.
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=6e-8)


def peak_bytes(run) -> int:
    """Most bytes that torch held at once on the CPU during run(), beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("loss", ["cross entropy", "jsd", "tail"])
def test_peak_memory_is_a_fraction_of_the_logits(loss, reduction):
    rows, width, classes = 2048, 8, 4000
    x = torch.randn(rows, width, requires_grad=True)
    weight, teacher = torch.randn(classes, width, requires_grad=True), torch.randn(rows, width)
    target = torch.randint(classes, (rows,))
    if loss == "tail":
        values, ids = torch.randn(rows, classes)[:, :8].log_softmax(1).sub(1), torch.arange(8).expand(rows, 8)
    runs = {
        "cross entropy": lambda: ops.linear_cross_entropy(
            x, weight, target, reduction=reduction.removeprefix("batch"), chunk_size=32
        ),
        "jsd": lambda: ops.linear_jsd(
            x, weight, teacher, weight.detach(), target, ce_weight=0.5, reduction=reduction, chunk_size=32
        ),
        "tail": lambda: ops.linear_kl(
            x, weight, topk_ids=ids, topk_logprobs=values, reduction=reduction, chunk_size=32
        ),
    }
    logits = 4 * rows * classes
    plain = peak_bytes(lambda: F.cross_entropy(F.linear(x, weight), target).backward())
    assert plain > 2 * logits  # what is measured is measured
    assert peak_bytes(lambda: runs[loss]().sum().backward()) < logits / 4


def test_only_what_is_asked_for_is_made():
    """A frozen head costs neither the product nor the memory of its gradient."""
    x, weight = torch.randn(16, 16, requires_grad=True), torch.randn(20000, 16)
    target = torch.randint(20000, (16,))
    frozen = peak_bytes(lambda: ops.linear_cross_entropy(x, weight, target, chunk_size=2).backward())
    assert frozen < weight.numel() * 4
    with torch.no_grad():
        assert peak_bytes(lambda: ops.linear_cross_entropy(x, weight, target, chunk_size=2)) < weight.numel() * 4


def test_modules_pass_their_options_on(head):
    x, weight, target = head["x"], head["weight"], head["target"]
    teacher = head["teacher_x"], head["teacher_weight"]
    pairs = [
        (nn.LinearCrossEntropyLoss(label_smoothing=0.2)(x, weight, target, head["bias"]),
         ops.linear_cross_entropy(x, weight, target, head["bias"], label_smoothing=0.2)),
        (nn.LinearKLLoss(temperature=2.0)(x, weight, *teacher, target),
         ops.linear_kl(x, weight, *teacher, target, temperature=2.0)),
        (nn.LinearJSDLoss(beta=0.2, ce_weight=0.5)(x, weight, *teacher, target, student_bias=head["bias"]),
         ops.linear_jsd(x, weight, *teacher, target, beta=0.2, ce_weight=0.5, student_bias=head["bias"])),
    ]  # fmt: skip
    for module, function in pairs:
        assert torch.equal(module, function)
    assert "beta=0.2" in repr(nn.LinearJSDLoss(beta=0.2))


def made(**changes):
    x, weight = torch.ones(4, 3), torch.ones(6, 3)
    return dict(student_input=x, student_weight=weight, teacher_input=x, teacher_weight=weight) | changes


IDS, VALUES = torch.zeros(4, 2, dtype=torch.int64), torch.full((4, 2), -2.0)
ALONE = dict(teacher_input=None, teacher_weight=None)
ERRORS = {
    "no teacher": (made(**ALONE), ValueError, "teacher: got nothing, expected one of"),
    "two teachers": (made(teacher_logits=torch.ones(4, 6)), ValueError, "teacher: got .*teacher_logits"),
    "half a teacher": (made(teacher_weight=None), ValueError, "teacher: got teacher_input"),
    "trained teacher": (made(teacher_input=torch.ones(4, 3, requires_grad=True)), ValueError, "pass it detached"),
    "width": (made(student_weight=torch.ones(6, 2)), ValueError, "student_weight: got shape"),
    "rows": (made(teacher_input=torch.ones(5, 3)), ValueError, "teacher_input: got shape"),
    "labels": (made(ce_weight=1.0), ValueError, "target: got None"),
    "label shape": (made(target=torch.zeros(5, dtype=torch.int64)), ValueError, "target: got shape"),
    "label range": (made(target=torch.tensor([0, 6, 1, 1]), ce_weight=1.0), ValueError, "the label 6, expected 0 to 5"),
    "temperature": (made(temperature=0.0), ValueError, "temperature: got 0.0"),
    "temperature of top k": (made(**ALONE, topk_ids=IDS, topk_logprobs=VALUES, temperature=2.0), ValueError, "top-k"),
    "top k alone": (made(**ALONE, topk_ids=IDS), ValueError, "teacher: got topk_ids"),
    "mode": (made(topk_mode="rest"), ValueError, "topk_mode: got 'rest', expected one of raw"),
    "no divergence": (made(kl_weight=0.0), ValueError, "linear_cross_entropy goes without it"),
    "reduction": (made(reduction="avg"), ValueError, "reduction: got 'avg'"),
    "chunk": (made(chunk_size=0), ValueError, "chunk_size: got 0"),
    "num_items": (made(num_items=3, reduction="sum"), ValueError, "num_items"),
    "dtype": (made(student_weight=torch.ones(6, 3).half()), TypeError, "student_weight: got float16"),
    "float64 teacher": (made(teacher_input=torch.ones(4, 3).double(), teacher_weight=torch.ones(6, 3).double()),
                        TypeError, "float64 on both sides"),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.linear_kl(**kwargs)


def test_liger_drop_in_wants_labels_for_its_hard_half():
    with pytest.raises(ValueError, match="weight_hard_loss=0"):
        ops.fused_linear_jsd(*made().values())
    with pytest.raises(ValueError, match="beta: got 1.5"):
        ops.linear_jsd(**made(beta=1.5))
