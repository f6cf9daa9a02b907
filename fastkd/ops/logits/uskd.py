"""USKD: self-distillation without a teacher, by customised soft labels (Yang et al., ICCV 2023, section 3.3).

Student logits z and weak logits u = fc(feature), both [N, C]; target class y, or scores y [N, C] of which the two
largest are the targets (mixup, CutMix). With q = softmax(z), w = softmax(u), targets l_k of score v_k (1 for a class),
means over the rows that are not ignored, and stop-gradient on p and zeta:

    soft target    p_k = q[l_k]^2 + v_k - mean_n q[l_k]^2, 0 where v_k = 0    L_t    = -mean_n sum_k p_k log q[l_k]
    other classes  r   = w / (1 - sum_k w[l_k] + 1e-6) + s / (1 - sum_k s[l_k] + 1e-6)    s = log q ("log"), q ("prob")
                   zeta_i = 1 / (1 + rank of i when r descends), without targets, divided by its sum
                   L_non = -mean_n sum_i zeta_i log softmax(z without targets)_i
    weak head      y~  = 0.9 y + 0.1 / C                                      L_weak = -mean_n sum_i y~_i log w_i

    loss = alpha L_t + beta L_non + mu L_weak + ce_weight CE(z, y)
    N dz = alpha (q sum_k p_k - p at l_k) + beta (softmax(z without targets) - zeta) + ce_weight (q sum y - y)
    N du = mu (w sum y~ - y~)

The released code adds the student's log-probabilities where the text combines two normalised outputs. Both are here:
"log" is the default since the published numbers were made with it, but its order is close to the student's own, the
weak head hardly counts; with "prob" both count.

Ties take the lower class first. A target of score 0 (an unmixed row among mixed ones) is not removed from the other
classes, where the released code removes a class that its sort happens to pick. The mean of q[l_k]^2 couples the rows: a
first pass leaves a few numbers a row, which are summed (over processes too, if wanted), and the second pass does
everything else, both gradients included. Those are kept without the factor 1/N, which would underflow in float16, and
scaled in backward. Ranks are those of float64 scores, so that rounding does not swap neighbours.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from .terms import wide as _wide

OP = "uskd_loss"
SMOOTHING = 0.1  # of the weak head's labels
RANK_EPS = 1e-6
RANK_SCORES = ("log", "prob")  # kernels get the index
# Columns of the first pass. Logarithms of sums are relative to the maximum beside them; "rest" is without targets.
COLUMNS = (
    "valid", "square_0", "square_1", "label_0", "label_1", "value_0", "value_1",
    "z_max", "z_log_sum", "z_rest_max", "z_rest_log_sum", "u_max", "u_log_sum", "u_rest_max", "u_rest_log_sum",
)  # fmt: skip


@functools.cache
def harmonic(classes: int) -> float:
    """Sum of Zipf labels over all classes."""
    return math.fsum(1 / rank for rank in range(1, classes + 1))


def _top_two(scores: Tensor) -> tuple[Tensor, Tensor]:
    # By argmax, which takes the first of equals, as topk does not promise.
    first = scores.argmax(1, keepdim=True)
    second = scores.scatter(1, first, -math.inf).argmax(1, keepdim=True)
    labels = torch.cat((first, second), 1)
    return labels, scores.gather(1, labels)


def _targets(target: Tensor, classes: int, ignore_index: int, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Valid rows [N], labels and their scores [N, 1 or 2], all scores [N, C]."""
    if target.is_floating_point():
        scores = target.to(wide)
        return torch.ones_like(scores[:, 0], dtype=torch.bool), *_top_two(scores), scores
    valid = target != ignore_index
    labels = target.where(valid, 0)[:, None]
    scores = F.one_hot(labels[:, 0].clamp(0, classes - 1), classes).to(wide)
    return valid, labels, torch.ones_like(labels, dtype=wide), scores


def _log_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.amax(1)
    return top, (x - top[:, None]).exp().sum(1).log()


def _fill_rows(student, weak, target, ignore_index, stats) -> None:
    classes, wide = student.shape[1], stats.dtype
    z, u = student.to(wide), weak.to(wide)
    valid, labels, values, _ = _targets(target, classes, ignore_index, wide)
    inside = labels.clamp(0, classes - 1)
    removed = torch.zeros_like(z, dtype=torch.bool).scatter_(1, inside, values > 0)
    top, log_sum = _log_sum(z)
    square = (2 * (z.gather(1, inside) - top[:, None] - log_sum[:, None])).exp()
    square = torch.where(labels == inside, square, math.nan)  # no such class
    stats.zero_()
    for name, value in (("square", square), ("label", inside), ("value", values)):
        for k in range(labels.shape[1]):
            stats[:, COLUMNS.index(f"{name}_{k}")] = value[:, k] * valid if name == "square" else value[:, k]
    if labels.shape[1] == 1:
        stats[:, COLUMNS.index("label_1")] = -1
    stats[:, 0] = valid
    stats[:, 7], stats[:, 8] = top, log_sum
    stats[:, 9], stats[:, 10] = _log_sum(z.masked_fill(removed, -math.inf))
    stats[:, 11], stats[:, 12] = _log_sum(u)
    stats[:, 13], stats[:, 14] = _log_sum(u.masked_fill(removed, -math.inf))


def _rank(z: Tensor, u: Tensor, stats: Tensor, labels: Tensor, present: Tensor, prob: bool) -> Tensor:
    """Rank of every class by float64 scores, the lower class first among equals."""
    column = {name: stats[:, i, None].double() for i, name in enumerate(COLUMNS)}
    weak_rest = (column["u_rest_max"] - column["u_max"] + column["u_rest_log_sum"] - column["u_log_sum"]).exp()
    log_q = z.double() - column["z_max"] - column["z_log_sum"]
    score = (u.double() - column["u_max"] - column["u_log_sum"]).exp() / (weak_rest + RANK_EPS)
    if prob:
        rest = (column["z_rest_max"] - column["z_max"] + column["z_rest_log_sum"] - column["z_log_sum"]).exp()
        score += log_q.exp() / (rest + RANK_EPS)
    else:
        taken = torch.where(present, log_q.gather(1, labels), 0).sum(1, keepdim=True)
        score += log_q / (1 - taken + RANK_EPS)
    order = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(z.shape[1], device=z.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _fill(
    student, weak, target, stats, sums, means, alpha, beta, mu, ce_weight, rank_score, grad_student, grad_weak, loss
) -> None:
    classes, wide = student.shape[1], loss.dtype
    z, u = student.to(wide), weak.to(wide)
    valid = stats[:, :1] != 0
    two = target.is_floating_point()
    labels = stats[:, 3:5].long() if two else stats[:, 3:4].long()
    values, squares, mean = (t[..., : labels.shape[1]] for t in (stats[:, 5:7], stats[:, 1:3], means[1:]))
    present = values > 0
    scores = target.to(wide) if two else torch.zeros_like(z).scatter_(1, labels, 1)
    removed = torch.zeros_like(present[:, :1]).expand_as(z).scatter(1, labels, present)

    log_q = z - stats[:, 7, None] - stats[:, 8, None]
    log_w = u - stats[:, 11, None] - stats[:, 12, None]
    log_rest = z - stats[:, 9, None] - stats[:, 10, None]
    p = torch.where(present, squares + values - mean / means[0].clamp_min(1), 0)
    zeta = torch.where(removed, 0, 1 / (1 + _rank(z, u, stats, labels, present, rank_score == 1).to(wide)))
    zeta = zeta / zeta.sum(1, keepdim=True)
    smooth = (1 - SMOOTHING) * scores + SMOOTHING / classes

    row = -alpha * (p * log_q.gather(1, labels)).sum(1) - beta * torch.where(removed, 0, zeta * log_rest).sum(1)
    row = row - mu * (smooth * log_w).sum(1) - ce_weight * (scores * log_q).sum(1)
    loss.copy_(torch.where(valid[:, 0], row, 0).sum() / sums[0].clamp_min(1))
    if grad_student.numel():
        q = log_q.exp()
        gradient = alpha * (q * p.sum(1, keepdim=True)).scatter_add(1, labels, -p)
        gradient += beta * (torch.where(removed, 0, log_rest.exp()) - zeta)
        gradient += ce_weight * (q * scores.sum(1, keepdim=True) - scores)
        grad_student.copy_(torch.where(valid, gradient, 0))
        grad_weak.copy_(torch.where(valid, mu * (log_w.exp() * smooth.sum(1, keepdim=True) - smooth), 0))


_TRITON = "fastkd.ops.logits.uskd_triton"
rows = Kernel(f"{OP}_rows", reference=_fill_rows, triton=f"{_TRITON}:rows")
forward = Kernel(OP, reference=_fill, triton=f"{_TRITON}:forward")


@custom_op("uskd_loss_rows")
def _op_rows(student: Tensor, weak: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    stats = torch.empty(student.shape[0], len(COLUMNS), dtype=_wide(student.dtype), device=student.device)
    rows(student, weak, target, ignore_index, stats)
    return stats


@_op_rows.register_fake
def _(student, weak, target, ignore_index):
    return torch.empty(student.shape[0], len(COLUMNS), dtype=_wide(student.dtype), device=student.device)


def _outputs(student: Tensor, weak: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=_wide(student.dtype), device=student.device)
    shape = student.shape if with_grad else (0,)
    grads = (torch.empty(shape, dtype=x.dtype, device=x.device) for x in (student, weak))
    return loss, *grads


@custom_op("uskd_loss")
def _op(
    student: Tensor, weak: Tensor, target: Tensor, stats: Tensor, sums: Tensor, means: Tensor, alpha: float,
    beta: float, mu: float, ce_weight: float, rank_score: int, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss, *grads = _outputs(student, weak, with_grad)
    forward(student, weak, target, stats, sums, means, alpha, beta, mu, ce_weight, rank_score, *grads, loss)
    return loss, *grads


@_op.register_fake
def _(student, weak, target, stats, sums, means, alpha, beta, mu, ce_weight, rank_score, with_grad):
    return _outputs(student, weak, with_grad)


@custom_op("uskd_loss_backward")
def _op_backward(grad_loss: Tensor, sums: Tensor, grad_student: Tensor, grad_weak: Tensor) -> tuple[Tensor, Tensor]:
    # In one dimension the scale keeps its dtype beside 16-bit gradients: rounded once, at the end.
    scale = (grad_loss / sums[0].clamp_min(1))[None]
    scaled = [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (grad_student, grad_weak)]
    return tuple(torch.mul(g, scale, out=out) for g, out in zip((grad_student, grad_weak), scaled))


@_op_backward.register_fake
def _(grad_loss, sums, grad_student, grad_weak):
    return tuple(torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (grad_student, grad_weak))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[4], *output[1:])


def _autograd(ctx, grad_loss: Tensor, *_):
    return *_op_backward(grad_loss, *ctx.saved_tensors), *[None] * 10


_op.register_autograd(_autograd, setup_context=_setup_context)


def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    rank_score: str = "log",
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Self-distillation with customised soft labels; mean over the batch.

    Args:
        student_logits: [N, C], floating, any strides.
        weak_logits: [N, C], floating: a linear head on a feature of an earlier stage (`fastkd.nn.USKDLoss` has one).
        target: int64 [N] classes in [0, C), or floating [N, C] scores of mixed images.
        alpha, beta, mu: weights of the soft target, of the other classes and of the weak head. Published: 1, 0.1, 0.005
            on ImageNet, 0.1, 0.1, 0.1 on CIFAR-100.
        rank_score: order of the other classes: by ``log`` (as released) or ``prob`` (probabilities of both heads).
        ce_weight: adds this times the cross-entropy of student_logits, in the same pass.
        ignore_index: rows of this class count nowhere. If all rows do: 0 with zero gradients, where
            `torch.nn.functional.cross_entropy` gives NaN.
        group: processes over which the mean of squared probabilities is taken; default: this process, as released.

    Returns:
        Scalar, float32 (float64 for float64 logits). Both logits get gradients.

    Raises:
        ValueError: shapes that do not fit, no rows, C < 2 (C < 3 with scores), an unknown rank_score, a target outside
            [0, C) (looked at on the CPU only; on a GPU the loss is NaN then).
        TypeError: not floating logits, or float64 on one side only.
    """
    _check.check_tensor(OP, "student_logits", student_logits, 2)
    _check.check_tensor(OP, "weak_logits", weak_logits, 2)
    batch, classes = student_logits.shape
    _check.check_shape(OP, "weak_logits", weak_logits, (batch, classes), "(N, C) like student_logits")
    two = isinstance(target, Tensor) and target.is_floating_point()
    _check.check_tensor(OP, "target", target, 2 if two else 1, _check.FLOATS if two else (torch.int64,))
    _check.check_shape(OP, "target", target, (batch, classes)[: target.ndim], "like student_logits")
    _check.check_no_grad(OP, "target", target, "targets are constants")
    _check.check_same_device(OP, student_logits=student_logits, weak_logits=weak_logits, target=target)
    if batch == 0:
        _check.fail(
            OP, "student_logits", f"shape (0, {classes})", "at least one row", "the mean of nothing is undefined"
        )
    if classes < 2 + two:
        _check.fail(OP, "student_logits", f"{classes} classes", f"at least {2 + two}", "no other class would be left")
    if rank_score not in RANK_SCORES:
        _check.fail(OP, "rank_score", repr(rank_score), "one of " + ", ".join(RANK_SCORES))
    if (student_logits.dtype == torch.float64) != (weak_logits.dtype == torch.float64):
        got = f"{weak_logits.dtype} with student_logits in {student_logits.dtype}".replace("torch.", "")
        _check.fail(OP, "weak_logits", got, "float64 on both sides or on none", "cast one of them", TypeError)
    if not two and target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            _check.fail(
                OP, "target", f"class {wrong[0].item()}", f"0 to {classes - 1}, or {ignore_index} to ignore a row"
            )
    with torch.no_grad():
        stats = _op_rows(student_logits.detach(), weak_logits.detach(), target, ignore_index)
        sums = stats[:, :3].sum(0)
        means = sums
        if group is not None:
            means = sums.clone()
            torch.distributed.all_reduce(means, group=group)
    with_grad = torch.is_grad_enabled() and (student_logits.requires_grad or weak_logits.requires_grad)
    return _op(
        student_logits, weak_logits, target, stats, sums, means, alpha, beta, mu, ce_weight,
        RANK_SCORES.index(rank_score), with_grad,
    )[0]  # fmt: skip


class USKDLoss(torch.nn.Module):
    """`uskd_loss` with the head that makes weak logits of a feature; ``forward(feature, student_logits, target)``.

    Args:
        in_features: width of the feature: the pooled last-but-one stage of a convolutional network, the class token
            after half of the blocks of a ViT.
        num_classes: number of classes.
        alpha, beta, mu, rank_score, ce_weight, ignore_index, group: as in `uskd_loss`.

    The head is trained along and thrown away afterwards: hand ``parameters()`` to the optimiser.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005,
        rank_score: str = "log", ce_weight: float = 0.0, ignore_index: int = -100,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fc = torch.nn.Linear(in_features, num_classes)
        self.group = group
        self.options = dict(
            alpha=alpha, beta=beta, mu=mu, rank_score=rank_score, ce_weight=ce_weight, ignore_index=ignore_index
        )

    def forward(self, feature: Tensor, student_logits: Tensor, target: Tensor) -> Tensor:
        return uskd_loss(student_logits, self.fc(feature), target, **self.options, group=self.group)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(
    student_logits, weak_logits, target, *, alpha=1.0, beta=0.1, mu=0.005, rank_score="log", ce_weight=0.0,
    ignore_index=-100, group=None,
) -> Tensor:  # fmt: skip
    wide, classes = _wide(student_logits.dtype), student_logits.shape[1]
    valid, labels, values, scores = _targets(target, classes, ignore_index, wide)
    count = valid.sum().clamp_min(1)
    log_q, log_w = (F.log_softmax(x.to(wide), 1) for x in (student_logits, weak_logits))
    present = values > 0
    removed = torch.zeros_like(present[:, :1]).expand_as(log_q).scatter(1, labels, present)
    with torch.no_grad():
        square = log_q.gather(1, labels).exp().square()
        mean = (square * valid[:, None]).sum(0) / count
        p = torch.where(present, square + values - mean, 0)
        student, weak = log_q if rank_score == "log" else log_q.exp(), log_w.exp()
        taken = [torch.where(present, x.gather(1, labels), 0).sum(1, keepdim=True) for x in (student, weak)]
        score = weak / (1 - taken[1] + RANK_EPS) + student / (1 - taken[0] + RANK_EPS)
        order = score.argsort(dim=1, descending=True, stable=True)
        zeta = torch.where(removed, 0, 1 / (1 + order.argsort(1).to(wide)))
        zeta = zeta / zeta.sum(1, keepdim=True)
        smooth = (1 - SMOOTHING) * scores + SMOOTHING / classes
    log_rest = F.log_softmax(student_logits.to(wide).masked_fill(removed, -math.inf), 1).masked_fill(removed, 0)
    row = -alpha * (p * log_q.gather(1, labels)).sum(1) - beta * (zeta * log_rest).sum(1)
    row = row - mu * (smooth * log_w).sum(1) - ce_weight * (scores * log_q).sum(1)
    return torch.where(valid, row, 0).sum() / count


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, classes = case["batch"], case["classes"]
    student = 2 * torch.randn(batch, classes, generator=random)
    weak = torch.randn(batch, classes, generator=random)
    target = torch.randint(classes, (batch,), generator=random)
    if case.get("scores"):
        second = (target + torch.randint(1, classes, (batch,), generator=random)) % classes
        share = torch.rand(batch, 1, generator=random) * 0.8 + 0.1
        share[1::3] = 1  # unmixed rows
        target = share * F.one_hot(target, classes) + (1 - share) * F.one_hot(second, classes)
        target = target.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    elif case.get("ignored"):
        target[1::2] = -100
    names = ("alpha", "beta", "mu", "ce_weight", "rank_score")
    options = {name: case[name] for name in names if name in case}
    return dict(
        student_logits=student.to(device, dtype),
        weak_logits=weak.to(device, dtype),
        target=target.to(device),
        **options,
    )


def _law(kwargs: dict) -> None:
    """Only differences of logits count; a batch that is there twice has the loss of one."""
    z, u, target = (kwargs[name] for name in ("student_logits", "weak_logits", "target"))
    loss = uskd_loss(**kwargs)
    shifted = uskd_loss(**{**kwargs, "student_logits": z + 0.5, "weak_logits": u - 0.25})
    torch.testing.assert_close(shifted, loss, rtol=1e-4, atol=1e-5)
    twice = dict(student_logits=torch.cat((z, z)), weak_logits=torch.cat((u, u)), target=torch.cat((target, target)))
    torch.testing.assert_close(uskd_loss(**{**kwargs, **twice}), loss, rtol=1e-5, atol=1e-6)


def _bytes_moved(kwargs: dict) -> int:
    scores = kwargs["target"] if kwargs["target"].is_floating_point() else None
    return 2 * tensor_bytes(kwargs["student_logits"], kwargs["weak_logits"]) + tensor_bytes(scores)


SPEC = register(
    OpSpec(
        name=OP,
        function=uskd_loss,
        reference=_reference,
        kernels=(rows, forward),
        build=_build,
        differentiable=("student_logits", "weak_logits"),
        cases={
            "classes": dict(batch=5, classes=11, ce_weight=0.5),
            "prob": dict(batch=4, classes=37, rank_score="prob", beta=1.0, mu=0.5),
            "scores": dict(batch=5, classes=13, scores=True, beta=1.0, ce_weight=1.0),
            "many_classes": dict(batch=2, classes=301, beta=1.0, mu=0.2),
            "ignored": dict(batch=5, classes=6, ignored=True),
            # The smallest is differentiated numerically too: alpha = 0, as p is a constant in the gradient alone.
            "two_classes": dict(batch=2, classes=2, alpha=0.0, beta=1.0, mu=0.5, ce_weight=1.0),
        },
        space=dict(
            batch=(1, 2, 5), classes=(3, 4, 10, 33, 260), scores=(False, True), ignored=(False, True),
            rank_score=RANK_SCORES, alpha=(0.0, 1.0), beta=(0.1, 1.0), mu=(0.005, 0.3), ce_weight=(0.0, 1.0),
            seed=tuple(range(5)),
        ),
        bench={
            "imagenet": dict(batch=256, classes=1000, ce_weight=1.0),
            "cifar_mixup": dict(batch=256, classes=100, scores=True, ce_weight=1.0),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 40 * k["student_logits"].numel(),
        golden="uskd_loss",
        law=_law,
    )
)  # fmt: skip
