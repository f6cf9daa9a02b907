"""What golden files and the OpSpec cannot see of the logit losses: extremes, torch's conventions, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backends_of, device_of

from fastkd import nn, ops
from fastkd.ops import SPECS, backend, logit_loss
from fastkd.ops.logits import logit_loss as engine

BACKENDS = backends_of(SPECS["logit_loss"])
each = pytest.mark.parametrize("name", BACKENDS)


def logits(batch: int, classes: int, seed: int = 0, device: str = DEVICE, spread: float = 2.0) -> list[torch.Tensor]:
    """Student (a leaf) and teacher."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(batch, classes, generator=random).to(device) for _ in range(2))
    return [student.requires_grad_(), teacher]


def gradient(loss: torch.Tensor, student: torch.Tensor, upstream: torch.Tensor | None = None) -> torch.Tensor:
    return torch.autograd.grad(loss, student, upstream)[0]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    want = want.to(got.device).double()
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= tolerance * max(want.abs().max().item(), 1e-30), (got, want)


TERMS = {
    "ce": dict(ce=1.0), "kl": dict(kl=1.0), "reverse_kl": dict(reverse_kl=1.0), "jsd": dict(jsd=1.0),
    "tvd": dict(tvd=1.0), "dkd": dict(dkd=(1.0, 8.0)), "nkd": dict(nkd=(1.0, 1.5)),
}  # fmt: skip


@each
@pytest.mark.parametrize("gap", [110.0, 120.0, 1e4])
@pytest.mark.parametrize("term", TERMS)
def test_far_logits_stay_finite(name, term, gap):
    """The target leads, or trails, on either side, by more than float32's exponential reaches."""
    device = device_of(name)
    student, teacher = (x.detach() for x in logits(4, 7, device=device))
    target = torch.tensor([0, 3, 6, 2], device=device)
    for row, (of_student, of_teacher) in enumerate([(gap, 0), (-gap, 0), (gap, -gap), (gap, gap)]):
        student[row, target[row]] += of_student
        teacher[row, target[row]] += of_teacher
    options = dict(TERMS[term], target=target, reduction="none")
    exact_student = student.double().requires_grad_()
    exact = logit_loss(exact_student, teacher.double(), **options, teacher_grad=True)
    student.requires_grad_()
    with backend(name):
        loss = logit_loss(student, teacher, **options)
        close(loss, exact)
        close(gradient(loss.sum(), student), gradient(exact.sum(), exact_student))


@each
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "scores"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cross_entropy_is_that_of_torch(name, reduction, kind, weighted):
    device = device_of(name)
    student, other = logits(6, 9, device=device)
    options = dict(weight=torch.rand(9, device=device) + 0.2 if weighted else None, reduction=reduction)
    if kind == "index":
        target = torch.tensor([0, 8, 3, 7, 3, 1], device=device)
        options["ignore_index"] = 3
    else:
        target = other.softmax(-1)
    for smoothing in (0.0, 0.2):
        want = F.cross_entropy(student, target, label_smoothing=smoothing, **options)
        upstream = torch.rand_like(want) + 0.5
        with backend(name):
            got = logit_loss(student, target=target, ce=1.0, label_smoothing=smoothing, **options)
            close(got, want, 1e-6)
            close(gradient(got, student, upstream), gradient(want, student, upstream), 1e-6)


@each
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_kl_is_that_of_torch(name, reduction):
    device = device_of(name)
    student, teacher = logits(5, 9, device=device)
    want = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction=reduction, log_target=True)
    with backend(name):
        got = ops.kd_loss(student, teacher, temperature=1.0, reduction=reduction)
        close(got, want)
        close(ops.kd_loss(student, teacher, temperature=3.0), 9 * ops.kd_loss(student / 3, teacher / 3, temperature=1))
        got = ops.kd_loss(student, teacher, temperature=3.0, t_square=False)
        close(got, ops.kd_loss(student / 3, teacher / 3, temperature=1.0))


@each
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equal_logits(name, temperature):
    """A perfect student: total variation has gradient exactly 0, the divergences nearly so."""
    device = device_of(name)
    teacher = logits(4, 50, device=device)[1]
    target = torch.arange(4, device=device)
    for options in (dict(), dict(target=target)):
        student = teacher.clone().requires_grad_()
        with backend(name):
            loss = logit_loss(student, teacher, tvd=1.0, temperature=temperature, **options)
            assert loss.abs() < 1e-6 and (gradient(loss, student) == 0).all()
            terms = dict(kl=1.0, reverse_kl=1.0, jsd=1.0)
            loss = logit_loss(student, teacher, **terms, temperature=temperature, **options)
            assert loss.abs() < 1e-5 and gradient(loss, student).abs().max() < 1e-6


@each
def test_ends_of_the_generalised_divergence(name):
    """A jump at 0 and 1 as published; divided by beta (1 - beta) there is none."""
    student, teacher = (x.detach() for x in logits(3, 20, device=device_of(name)))
    with backend(name):
        forward, reverse = ops.kd_loss(student, teacher, temperature=1.0), ops.reverse_kl_loss(student, teacher)
        assert forward > 1 and reverse > 1
        for beta, end in ((0.0, forward), (1.0, reverse)):
            close(ops.jsd_loss(student, teacher, beta=beta), end, 1e-6)
            close(ops.jsd_loss(student, teacher, beta=beta, normalize=True), end, 1e-6)
            near = abs(beta - 1e-5)
            assert ops.jsd_loss(student, teacher, beta=near) < 1e-3
            close(ops.jsd_loss(student, teacher, beta=near, normalize=True), end, 2e-3)


@each
def test_excluded_classes_count_nothing(name):
    """Logits of -inf on both sides: as if the class did not exist."""
    student, teacher = logits(3, 8, device=device_of(name))
    target = torch.tensor([0, 4, 2], device=student.device)
    wide = [F.pad(x.detach(), (0, 3), value=float("-inf")) for x in (student, teacher)]
    wide[0].requires_grad_()
    options = dict(ce=1.0, kl=1.0, reverse_kl=0.5, jsd=1.0, tvd=0.5, dkd=(1.0, 2.0), nkd=(1.0, 1.5), temperature=2.0)
    with backend(name):
        want, got = logit_loss(student, teacher, target, **options), logit_loss(*wide, target, **options)
        close(got, want, 1e-6)
        got = gradient(got, wide[0])
        close(got[:, :8], gradient(want, student), 1e-6)
        assert (got[:, 8:] == 0).all()


@each
def test_rows_that_do_not_count(name):
    """A batch without a valid row is 0 with gradient 0; a row's garbage does not matter when it is ignored."""
    student, teacher = logits(4, 6, device=device_of(name))
    target = torch.tensor([1, -100, 5, -100], device=student.device)
    options = dict(ce=1.0, kl=1.0, dkd=(1.0, 2.0), jsd=1.0)
    dirty = student.detach().clone()
    dirty[1::2] = float("nan")
    dirty.requires_grad_()
    with backend(name):
        none = logit_loss(student, teacher, torch.full_like(target, -100), **options)
        assert none == 0 and (gradient(none, student) == 0).all()
        want = logit_loss(student[::2], teacher[::2], target[::2], **options)
        close(logit_loss(student, teacher, target, **options), want, 1e-6)
        if name != "reference":  # there the ignored rows are computed and dropped
            loss = logit_loss(dirty, teacher, target, **options)
            close(loss, want, 1e-6)
            assert (gradient(loss, dirty)[1::2] == 0).all()
        bad = student.detach().clone()
        bad[0, 0] = float("nan")
        for term in TERMS.values():
            assert logit_loss(bad, teacher, target, **term).isnan()  # and where it counts, it is not hidden
            assert "ce" in term or logit_loss(student.detach(), bad, target, **term).isnan()


@each
def test_divisors(name):
    student, teacher = logits(6, 5, device=device_of(name))
    target = torch.tensor([1, -100, 4, 0, -100, 2], device=student.device)
    options = dict(ce=1.0, kl=1.0)
    with backend(name):
        total = logit_loss(student, teacher, target, **options, reduction="sum")
        close(logit_loss(student, teacher, target, **options), total / 4, 1e-6)
        for items in (8, torch.tensor(8, device=student.device)):
            got = logit_loss(student, teacher, target, **options, num_items_in_batch=items)
            close(got, total / 8, 1e-6)
            close(gradient(got, student), gradient(total, student) / 8, 1e-6)
            total = logit_loss(student, teacher, target, **options, reduction="sum")
        tokens = [x.detach().view(2, 3, 5) for x in (student, teacher)]
        rows = ops.jsd_loss(*tokens, reduction="none")
        assert rows.shape == (2, 3)
        close(ops.jsd_loss(*tokens), rows.sum() / 2, 1e-6)  # dimension 0
        close(ops.jsd_loss(*tokens, target.view(2, 3)), rows.flatten()[target >= 0].sum() / 4, 1e-6)
        close(ops.jsd_loss(*tokens, reduction="mean"), rows.sum() / 30, 1e-6)


@each
def test_scores_of_mixed_images(name):
    """NKD and DKD take the most probable class, cross-entropy all of them."""
    student, teacher = logits(5, 12, device=device_of(name))
    scores = logits(5, 12, seed=3, device=device_of(name))[1].softmax(-1)
    with backend(name):
        for function in (ops.nkd_loss, ops.dkd_loss):
            got = function(student, teacher, scores, ce_weight=0.7)
            want = function(student, teacher, scores.argmax(-1)) + 0.7 * F.cross_entropy(student, scores)
            close(got, want, 1e-6)
            close(gradient(got, student), gradient(want, student), 1e-6)


@each
def test_backward_twice(name):
    student, teacher = logits(4, 30, device=device_of(name))
    with backend(name):
        loss = ops.kd_loss(student, teacher)
        (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0, device=student.device), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, student, torch.tensor(0.5, device=student.device))
    assert torch.equal(first, kept)
    close(second * 6, first, 1e-6)


@each
def test_float16_gradients_survive_the_mean(name):
    """Divided by many rows they are below the smallest numbers of float16; with a loss scale they come back."""
    device = device_of(name)
    student, teacher = (x.detach().half() for x in logits(8, 50, device=device, spread=1.0))
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    options = dict(temperature=1.0, num_items_in_batch=2**18)
    want = gradient(ops.kd_loss(exact, teacher.double(), **options), exact)
    with backend(name):
        loss = ops.kd_loss(student, teacher, **options)
        got = gradient(loss, student, torch.tensor(2.0**18, device=device))
    assert loss.dtype == torch.float32 and got.dtype == torch.float16
    assert (got.double() / 2**18 / want - 1).abs().median() < 1e-3


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_inplace(name, dtype):
    student, teacher = (x.detach().to(dtype) for x in logits(6, 20, device=device_of(name)))
    target = torch.tensor([1, -100, 4, 0, 19, 2], device=student.device)
    weight = (student / 7).requires_grad_()
    options = dict(ce=0.5, kl=1.0, jsd=1.0, temperature=2.0)
    with backend(name):
        for upstream in (1.0, 3.0):
            upstream = torch.tensor(upstream, device=student.device)
            want_loss = logit_loss(weight * 7, teacher, target, **options)
            want = gradient(want_loss, weight, upstream)
            made = weight * 7
            loss = logit_loss(made, teacher, target, **options, inplace=True)
            assert torch.equal(loss, want_loss)
            (got,) = torch.autograd.grad(loss, made, upstream, retain_graph=True)
            assert got.data_ptr() == made.data_ptr()
            close(7 * got, want, 1e-6 if dtype == torch.float32 else 2e-3)
            with pytest.raises(RuntimeError, match="differentiated once"):
                loss.backward()


def test_inplace_is_not_silently_wrong():
    student, teacher = logits(3, 8)
    read = student.tanh()  # its backward needs what it returned
    loss = ops.kd_loss(read, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():
        before = student.clone()
        ops.kd_loss(student, teacher, inplace=True)  # no gradient to make
        assert torch.equal(student, before)
    shared = (student * 1.0)[:, ::2]
    with pytest.raises(ValueError, match="not contiguous"):
        ops.kd_loss(shared, teacher[:, ::2], inplace=True)
    made = student * 1.0
    with pytest.raises(ValueError, match="memory of student_logits"):
        ops.kd_loss(made, made.detach(), inplace=True)
    with pytest.raises(Exception, match="inplace: got True while the call is being traced"):
        torch.compile(lambda s: ops.kd_loss(s * 1.0, teacher, inplace=True), backend="eager", fullgraph=True)(student)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native CPU library is not built")
@pytest.mark.parametrize("batch", [1, 65], ids=["shared out", "by rows"])
def test_long_rows_of_several_blocks(batch):
    student, teacher = (x[:1].detach().expand(batch, -1) for x in logits(1, 2 * 32768 + 3, device="cpu"))
    target = torch.full((batch,), 40000)
    options = dict(ce=1.0, kl=1.0, jsd=1.0, reverse_kl=1.0, dkd=(1.0, 1.0), temperature=2.0, label_smoothing=0.1)
    leaf = student[:1].double().requires_grad_()
    exact = logit_loss(leaf, teacher[:1].double(), target[:1], **options, teacher_grad=True)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mine = student.contiguous().requires_grad_()
        with backend("cpp"):
            loss = logit_loss(mine, teacher, target, **options)
            results.append((loss.detach(), gradient(loss, mine)))
    close(results[0][0], exact, 1e-6)
    close(results[0][1][-1:] * batch, gradient(exact, leaf), 4e-6)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    made = []
    body = engine._outputs
    monkeypatch.setattr(engine, "_outputs", lambda *args: made.append(body(*args)) or made[-1])
    student, teacher = logits(3, 8)
    with torch.no_grad():
        ops.kd_loss(student, teacher)
    ops.kd_loss(student.detach(), teacher)
    assert [grad.numel() for _, grad, _ in made] == [0, 0]
    ops.kd_loss(student, teacher)
    assert made[-1][1].shape == student.shape


def test_a_wrong_class_is_an_error_or_nan():
    student, teacher = (x.detach().cpu() for x in logits(3, 8))
    with pytest.raises(ValueError, match="target: got class 8, expected 0 to 7"):
        ops.dkd_loss(student, teacher, torch.tensor([1, 8, 2]))
    assert ops.dkd_loss(student, teacher, torch.tensor([1, 8, 2]), ignore_index=8).isfinite()
    arguments = (torch.tensor([1, -3, 2]), None, None, None, None, [0, 1.0, *[0] * 7, 1, 0.5, 0], -100, 0.0)
    for name in set(BACKENDS) - {"reference"}:
        loss, divisors, grad = (torch.empty(n) for n in ((), 2, (3, 8)))
        with backend(name):
            engine.forward(student, teacher, *arguments, loss, divisors, grad)
        assert loss.isnan() and grad[1].isnan().all() and grad[::2].isfinite().all()


def test_modules():
    student, teacher = logits(4, 10)
    target = torch.tensor([1, 2, 3, 4], device=student.device)
    weight = torch.rand(10, device=student.device)
    module = nn.KDLoss(2.0, 0.3, 0.7, weight)
    want = ops.kd_loss(student, teacher, target, temperature=2.0, ce_weight=0.3, kd_weight=0.7, weight=weight)
    assert torch.equal(module(student, teacher, target), want)
    assert module.double().weight.dtype == torch.float64 and "temperature=2.0" in repr(module)
    assert torch.equal(nn.NKDLoss(gamma=2.0)(student, teacher, target), ops.nkd_loss(student, teacher, target, gamma=2))
    assert torch.equal(nn.JSDLoss(0.2)(student, teacher), ops.jsd_loss(student, teacher, beta=0.2))
    assert torch.equal(nn.ReverseKLLoss(2.0)(student, teacher), ops.reverse_kl_loss(student, teacher, temperature=2.0))
    assert torch.equal(nn.TVDLoss()(student, teacher), ops.tvd_loss(student, teacher))
    assert torch.equal(nn.LogitLoss(ce=1.0)(student, target=target), logit_loss(student, target=target, ce=1.0))
    half = torch.tensor([2.0, 0, 1, 1], device=student.device)
    got = nn.KDLoss(reduction="none")(student, teacher, sample_weight=half)
    assert torch.equal(got, ops.kd_loss(student, teacher, reduction="none") * half)


def test_weights_of_dkd_warm_up():
    student, teacher = logits(4, 10)
    target = torch.tensor([1, 2, 3, 4], device=student.device)
    module = nn.DKDLoss(ce_weight=1.0, warmup=4)
    for epoch, ramp in ((1, 0.25), (3, 0.75), (9, 1.0)):
        module.set_epoch(epoch)
        want = F.cross_entropy(student, target) + ramp * ops.dkd_loss(student, teacher, target)
        close(module(student, teacher, target), want, 1e-6)


def test_teacher_gradient_only_where_it_is_asked_for():
    student, teacher = logits(4, 10)
    teacher.requires_grad_()
    with pytest.raises(ValueError, match="kd_loss: teacher_logits: got a tensor that requires grad"):
        ops.kd_loss(student, teacher)
    loss = ops.kd_loss(student, teacher, temperature=2.0, teacher_grad=True)
    close(loss, ops.kd_loss(student, teacher.detach(), temperature=2.0), 1e-6)
    assert gradient(loss, teacher).abs().sum() > 0


def call(**changes) -> dict:
    return dict(student_logits=torch.ones(2, 4), teacher_logits=torch.ones(2, 4), kl=1.0) | changes


ERRORS = {
    "shape": (call(teacher_logits=torch.ones(2, 5)), ValueError, r"teacher_logits: got shape \(2, 5\)"),
    "one class": (call(student_logits=torch.ones(2, 1)), ValueError, "at least 2 classes"),
    "temperature": (call(temperature=0.0), ValueError, "temperature: got 0.0"),
    "beta": (call(jsd=1.0, beta=1.5), ValueError, "beta: got 1.5"),
    "smoothing": (call(label_smoothing=2.0), ValueError, "label_smoothing: got 2.0"),
    "reduction": (call(reduction="max"), ValueError, "reduction: got 'max'"),
    "no teacher": (call(teacher_logits=None), ValueError, "teacher_logits: got None"),
    "no target": (call(ce=1.0), ValueError, "target: got None"),
    "target shape": (call(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"target: got shape \(3,\)"),
    "target dtype": (call(target=torch.zeros(2, dtype=torch.int32)), TypeError, "target: got int32"),
    "weight": (call(weight=torch.ones(3)), ValueError, r"weight: got shape \(3,\)"),
    "sample weight": (call(sample_weight=torch.ones(3)), ValueError, r"sample_weight: got shape \(3,\)"),
    "float64": (call(teacher_logits=torch.ones(2, 4).double()), TypeError, "float64 on both sides"),
    "integers": (call(student_logits=torch.ones(2, 4).long()), TypeError, "student_logits: got int64"),
    "items": (call(num_items_in_batch=0), ValueError, "num_items_in_batch: got 0"),
    "items of a sum": (call(num_items_in_batch=3, reduction="sum"), ValueError, "it is a divisor"),
    "learnt target": (call(target=torch.ones(2, 4, requires_grad=True)), ValueError, "target: got a tensor that"),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=f"logit_loss: .*{match}"):
        logit_loss(**kwargs)
