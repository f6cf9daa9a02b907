"""What no golden file pins down: ties, ignored and unmixed rows, shared means, tiles of classes, errors, modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of
from op_checks import evaluate, relative_error, to_double

from fastkd import nn as criteria
from fastkd import ops
from fastkd.ops import SPECS
from fastkd.ops.logits import uskd

SPEC = SPECS["uskd_loss"]
each_backend = pytest.mark.parametrize("name", backends_of(SPEC))
each_dist_backend = pytest.mark.parametrize("name", backends_of(SPECS["dist_loss"]))


def ones(output: torch.Tensor, index: int = 0) -> torch.Tensor:
    return torch.ones_like(output)


def case(name: str, **changes) -> dict:
    return SPEC.build(dict(batch=4, classes=7, beta=1.0, mu=0.5, **changes), torch.float32, device_of(name))


def zipf_order(kwargs: dict, row: int) -> list[int]:
    """Classes without targets in the order of the labels that the gradient holds: rest softmax - gradient."""
    alone = {**kwargs, "alpha": 0.0, "beta": 1.0, "mu": 0.0, "ce_weight": 0.0}
    gradient = evaluate(SPEC, ops.uskd_loss, alone, ones).gradients["student_logits"][row]
    logits, target = kwargs["student_logits"][row], kwargs["target"][row]
    others = torch.tensor([c for c in range(len(logits)) if c != target], device=logits.device)
    zeta = logits[others].softmax(0) - gradient[others] * len(kwargs["target"])
    return others[zeta.argsort(descending=True)].tolist()


@each_backend
@pytest.mark.parametrize("rank_score", uskd.RANK_SCORES)
def test_equal_scores_take_the_lower_class_first_targets_included(name, rank_score):
    kwargs = case(name, rank_score=rank_score)
    for key in ("student_logits", "weak_logits"):
        kwargs[key] = torch.full_like(kwargs[key], 0.3)
    kwargs["target"] = torch.tensor([3, 0, 6, 2], device=kwargs["target"].device)
    with ops.backend(name):
        gradient = evaluate(SPEC, ops.uskd_loss, {**kwargs, "alpha": 0.0}, ones).gradients["student_logits"]
    for row, target in enumerate([3, 0, 6, 2]):
        zeta = torch.tensor([0 if c == target else 1 / (1 + c) for c in range(7)])  # the rank of the target stays free
        want = torch.tensor([0 if c == target else 1 / 6 for c in range(7)]) - zeta / zeta.sum()
        torch.testing.assert_close(4 * gradient[row].cpu(), want, rtol=1e-5, atol=1e-6)


@each_backend
def test_probabilities_let_the_weak_head_decide_where_logs_do_not(name):
    kwargs = case(name)
    student = torch.tensor([2.0, 0.0, -0.1, -0.2, -4.0, -5.0, -6.0])
    weak = torch.tensor([0.0, -9.0, -9.0, -9.0, -9.0, -9.0, -8.5])
    device = kwargs["target"].device
    kwargs |= dict(
        student_logits=student.expand(4, 7).to(device), weak_logits=weak.expand(4, 7).to(device),
        target=torch.zeros(4, dtype=torch.int64, device=device),
    )  # fmt: skip
    with ops.backend(name):
        assert zipf_order({**kwargs, "rank_score": "log"}, 0) == [1, 2, 3, 4, 5, 6]
        assert zipf_order({**kwargs, "rank_score": "prob"}, 0) == [1, 2, 3, 6, 4, 5]


@each_backend
def test_ignored_rows_count_nowhere(name):
    kwargs = case(name)
    full = {
        k: v if not isinstance(v, torch.Tensor) else torch.cat((v, v.flip(0) * 0 + v[:1])) for k, v in kwargs.items()
    }
    full["target"] = torch.cat((kwargs["target"], torch.full_like(kwargs["target"], -100)))
    with ops.backend(name):
        want = evaluate(SPEC, ops.uskd_loss, kwargs)
        got = evaluate(SPEC, ops.uskd_loss, full)
        torch.testing.assert_close(got.outputs[0], want.outputs[0])
        for key, gradient in got.gradients.items():
            torch.testing.assert_close(gradient[:4], want.gradients[key])
            assert (gradient[4:] == 0).all()
        nothing = evaluate(SPEC, ops.uskd_loss, {**kwargs, "target": torch.full_like(kwargs["target"], -100)})
    assert nothing.outputs[0] == 0 and all((g == 0).all() for g in nothing.gradients.values())


@each_backend
def test_an_unmixed_row_removes_its_class_alone(name):
    """One-hot scores are the class index, but for the column mean of a class that is not there."""
    kwargs = case(name, alpha=0.0, ce_weight=1.0)
    scores = F.one_hot(kwargs["target"], 7).float()
    with ops.backend(name):
        by_class, by_score = (
            evaluate(SPEC, ops.uskd_loss, {**kwargs, "target": t}) for t in (kwargs["target"], scores)
        )
    for key, want in by_class.named().items():
        torch.testing.assert_close(by_score.named()[key], want)


@each_backend
def test_the_second_of_equal_scores_is_the_lowest_class(name):
    """The batch mean holds softmax of class 0 (1 where 0 is the target) for rows without a second target."""
    kwargs = case(name, scores=True)
    logits = kwargs["student_logits"]
    target = torch.zeros_like(logits)
    target[0, 2], target[0, 4], target[1, 3], target[2, 0], target[3, 6] = 0.7, 0.3, 1, 1, 1
    q = logits.double().softmax(1)
    mean = (q[0, 4] ** 2 + q[1, 0] ** 2 + q[2, 1] ** 2 + q[3, 0] ** 2) / 4
    first = torch.stack((q[0, 2], q[1, 3], q[2, 0], q[3, 6])).square()
    p = torch.cat((first + torch.tensor([0.7, 1, 1, 1]).to(q) - first.mean(), (q[0, 4] ** 2 + 0.3 - mean)[None]))
    log_q = torch.stack((q[0, 2], q[1, 3], q[2, 0], q[3, 6], q[0, 4])).log()
    with ops.backend(name):
        loss = ops.uskd_loss(logits, kwargs["weak_logits"], target, alpha=1.0, beta=0.0, mu=0.0)
    torch.testing.assert_close(loss.double(), -(p * log_q).sum() / 4, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("scores", [False, True], ids=["classes", "scores"])
def test_many_tiles_of_classes(name, scores):
    kwargs = SPEC.build(dict(batch=2, classes=2500, scores=scores, beta=1.0), torch.float32, device_of(name))
    exact = evaluate(SPEC, SPEC.reference, to_double(kwargs)).named()
    with ops.backend(name):
        ours = evaluate(SPEC, ops.uskd_loss, kwargs).named()
    for key, want in exact.items():
        assert relative_error(ours[key], want) < 1e-4, key


@each_backend
def test_nearly_equal_scores_of_many_classes_are_told_apart(name):
    """One class far away, all others within a millionth of it: no coarse key tells these apart."""
    classes = 400
    order = torch.randperm(classes - 1, generator=torch.Generator().manual_seed(3)) + 1
    student = torch.zeros(1, classes, dtype=torch.float64)
    student[0, order] = -torch.arange(classes - 1, dtype=torch.float64) * 2.0**-42
    student[0, 0], student[0, order[-1]] = 1.0, -40.0
    if name == "triton":  # no float64; neighbours that float32 can hold
        student[0, order[:-1]] = -torch.arange(classes - 2, dtype=torch.float64) * 2.0**-20
    dtype = torch.float32 if name == "triton" else torch.float64
    student = student.to(device_of(name), dtype)
    target = torch.zeros(1, dtype=torch.int64, device=student.device)
    kwargs = dict(student_logits=student, weak_logits=torch.zeros_like(student), target=target)
    with ops.backend(name):
        assert zipf_order(kwargs, 0) == order.tolist()


@each_backend
def test_float16_gradients_do_not_underflow(name):
    """With a loss scale of 2^16, as torch's GradScaler starts: gradients are scaled before they are rounded."""
    kwargs = SPEC.build(dict(batch=8, classes=50, mu=0.005), torch.float16, device_of(name))
    with ops.backend(name):
        ours = evaluate(SPEC, ops.uskd_loss, kwargs, lambda output, index: torch.full_like(output, 2.0**16)).gradients
    exact = evaluate(SPEC, SPEC.reference, to_double(kwargs), ones).gradients
    for key, want in exact.items():
        assert relative_error(ours[key].double() / 2.0**16, want) < 1e-3, key


def test_the_mean_can_be_shared_between_processes(monkeypatch):
    """Halves that share the mean have the full batch's loss; by themselves they have not."""
    kwargs = SPEC.build(dict(batch=6, classes=9), torch.float32, "cpu")
    halves = [{k: v[part] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
              for part in (slice(3), slice(3, 6))]  # fmt: skip
    sums = [uskd._op_rows(h["student_logits"], h["weak_logits"], h["target"], -100)[:, :3].sum(0) for h in halves]

    def all_reduce(tensor, group):
        assert group == "all" and any(torch.equal(tensor, s) for s in sums)
        tensor.copy_(sums[0] + sums[1])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    full = evaluate(SPEC, ops.uskd_loss, kwargs, ones)
    shared = [evaluate(SPEC, ops.uskd_loss, {**h, "group": "all"}, ones) for h in halves]
    torch.testing.assert_close((shared[0].outputs[0] + shared[1].outputs[0]) / 2, full.outputs[0])
    gradients = torch.cat([s.gradients["student_logits"] for s in shared]) / 2
    torch.testing.assert_close(gradients, full.gradients["student_logits"])
    alone = [ops.uskd_loss(**h) for h in halves]
    assert abs(sum(alone) / 2 - full.outputs[0]) > 1e-4


@each_backend
def test_confident_rows_stay_finite(name):
    kwargs = case(name)
    kwargs["student_logits"] = kwargs["student_logits"].scatter(1, kwargs["target"][:, None], 300.0)
    kwargs["weak_logits"] = kwargs["weak_logits"].scatter(1, kwargs["target"][:, None], 300.0)
    with ops.backend(name):
        found = evaluate(SPEC, ops.uskd_loss, kwargs).named()
    exact = evaluate(SPEC, SPEC.reference, to_double(kwargs)).named()
    for key, want in exact.items():
        assert relative_error(found[key], want) < 1e-5, key


@each_backend
def test_a_class_that_is_not_there(name):
    kwargs = case(name)
    kwargs["target"][1] = 7
    with ops.backend(name):
        with pytest.raises(ValueError, match="target: got class 7, expected 0 to 6, or -100"):
            ops.uskd_loss(**{**kwargs, "target": kwargs["target"].cpu()} if device_of(name) == "cpu" else kwargs)
        stats = uskd._op_rows(kwargs["student_logits"], kwargs["weak_logits"], kwargs["target"], -100)
        assert stats[:, 1].isnan().tolist() == [False, True, False, False]  # where nothing looks: the loss is NaN


def two(classes=5, rows=3, **changes):
    logits = torch.ones(rows, classes)
    return dict(dict(student_logits=logits, weak_logits=logits, target=torch.zeros(rows, dtype=torch.int64)), **changes)


ERRORS = {
    "weak shape": (two(weak_logits=torch.ones(3, 4)), ValueError, r"weak_logits: got shape \(3, 4\)"),
    "target length": (two(target=torch.zeros(2, dtype=torch.int64)), ValueError, "target: got shape"),
    "scores shape": (two(target=torch.ones(3, 4)), ValueError, "target: got shape"),
    "target dtype": (two(target=torch.zeros(3, dtype=torch.int32)), TypeError, "target: got int32, expected int64"),
    "one class": (two(classes=1), ValueError, "expected at least 2"),
    "two classes, two targets": (two(classes=2, target=torch.ones(3, 2)), ValueError, "expected at least 3"),
    "rank": (two(rank_score="weak"), ValueError, "rank_score: got 'weak', expected one of log, prob"),
    "no rows": (two(rows=0), ValueError, "at least one row"),
    "float64 on one side": (two(weak_logits=torch.ones(3, 5).double()), TypeError, "float64 on both sides"),
}


@pytest.mark.parametrize("kwargs, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.uskd_loss(**kwargs)


def test_module_trains_its_head_and_passes_its_options_on():
    torch.manual_seed(0)
    module = criteria.USKDLoss(6, 5, alpha=0.3, rank_score="prob", ce_weight=1.0)
    feature, logits = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    target = torch.tensor([0, 3, 1, 1])
    loss = module(feature, logits, target)
    want = ops.uskd_loss(logits, module.fc(feature), target, alpha=0.3, rank_score="prob", ce_weight=1.0)
    assert loss == want and "rank_score=prob" in repr(module)
    loss.backward()
    assert module.fc.weight.grad.abs().max() > 0 and feature.grad.abs().max() > 0


# DIST, standardisation, cosine


@each_dist_backend
def test_dist_gives_the_teacher_the_gradient_of_the_exchanged_sides(name):
    spec = SPECS["dist_loss"]
    kwargs = spec.build(dict(batch=7, classes=12, temperature=2.0), torch.float32, device_of(name))
    z, v = (kwargs[key].requires_grad_() for key in ("student_logits", "teacher_logits"))
    with ops.backend(name):
        both = torch.autograd.grad(ops.dist_loss(z, v, temperature=2.0, teacher_grad=True), (z, v))
        (other,) = torch.autograd.grad(ops.dist_loss(v, z.detach(), temperature=2.0), v)
        (own,) = torch.autograd.grad(ops.dist_loss(z, v.detach(), temperature=2.0), z)
    torch.testing.assert_close(both[0], own)
    torch.testing.assert_close(both[1], other)


@each_dist_backend
def test_dist_below_its_least_norm_divides_by_a_constant(name):
    """A class of equal probabilities in all rows: no correlation, and the gradient of a / eps."""
    student = torch.zeros(3, 4, dtype=torch.float64, device=device_of(name), requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(student.device)
    if name == "triton":
        pytest.skip("float64")
    with ops.backend(name):
        loss = ops.dist_loss(student, teacher, eps=1e-3)
        (gradient,) = torch.autograd.grad(loss, student)
    p, q = teacher.softmax(1), torch.full((3, 4), 0.25, dtype=torch.float64, device=student.device)
    g = 0
    for dim, count in ((1, 3), (0, 4)):
        centred = p - p.mean(dim, keepdim=True)
        g = g - centred / centred.norm(dim=dim, keepdim=True).clamp_min(1e-3) / 1e-3 / count
    torch.testing.assert_close(loss.item(), 2.0)
    torch.testing.assert_close(gradient, q * (g - (q * g).sum(1, keepdim=True)))


def test_standardised_kd_is_kd_of_standardised_logits_beside_raw_cross_entropy():
    random = torch.Generator().manual_seed(4)
    z, v = (3 * torch.randn(5, 9, generator=random) + 2 for _ in range(2))
    target = torch.tensor([0, -100, 3, 8, 1])
    valid = target != -100
    z_, v_ = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) / 2 for x in (z, v))
    kl = F.kl_div(z_.log_softmax(1)[valid], v_.log_softmax(1)[valid], reduction="batchmean", log_target=True)
    want = 0.4 * F.cross_entropy(z, target) + 3 * 4 * kl
    got = ops.standardized_kd_loss(z, v, target, temperature=2.0, ce_weight=0.4, kd_weight=3.0)
    torch.testing.assert_close(got, want)
    module = criteria.StandardizedKDLoss(2.0, ce_weight=0.4, kd_weight=3.0)
    assert module(z, v, target) == got and "kd_weight=3.0" in repr(module)
    shifted = ops.standardized_kd_loss(2 * z - 5, v + 100, target, kd_weight=3.0)
    torch.testing.assert_close(shifted, ops.standardized_kd_loss(z, v, target, kd_weight=3.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(6,), (2, 3)], ids=["matrix", "sequence"])
def test_logit_cosine_leaves_ignored_rows_out_of_sum_and_divisor(rows):
    random = torch.Generator().manual_seed(5)
    z, v = (torch.randn(*rows, 7, generator=random) for _ in range(2))
    target = torch.tensor([1, -100, 0, 0, -100, 2]).view(rows)
    z.requires_grad_()
    loss = ops.logit_cosine_loss(z, v, target)
    valid = target != -100
    want = (1 - F.cosine_similarity(z[valid], v[valid], dim=-1)).mean()
    torch.testing.assert_close(loss, want)
    (gradient,) = torch.autograd.grad(loss, z)
    assert (gradient[~valid] == 0).all() and (gradient[valid] != 0).any()
    torch.testing.assert_close(ops.logit_cosine_loss(z, v), (1 - F.cosine_similarity(z, v, dim=-1)).mean())
    assert ops.logit_cosine_loss(z, v, torch.full(rows, -100)) == 0
    assert criteria.LogitCosineLoss()(z, v, target) == loss


@pytest.mark.parametrize("loss", [ops.dist_loss, ops.standardized_kd_loss, ops.logit_cosine_loss])
def test_a_teacher_that_requires_grad_is_refused_unless_asked_for(loss):
    z, v = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="teacher_logits: got a tensor that requires grad"):
        loss(z, v)
    (gradient,) = torch.autograd.grad(loss(z, v, teacher_grad=True), v)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="teacher_logits: got shape"):
        loss(z, v.detach()[:, 1:])
