"""Losses between student and teacher logits, all of them calls of the engine in `logit_loss.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from .. import _check
from . import arguments
from . import logit_loss as _engine
from .terms import Terms, need_index, need_teacher, wide

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("mean", "batchmean", "sum", "none")


class Shared(TypedDict, total=False):
    """Keyword arguments of every loss between logits.

    Attributes:
        weight: [C], weights of the classes in ce, as in `torch.nn.functional.cross_entropy`.
        label_smoothing: of ce, in [0, 1], likewise.
        sample_weight: [...] like the rows; multiplies everything that a row adds. It does not enter the divisor.
        ignore_index: rows with this class index are left out of every term and of the divisor. Default -100.
        num_items_in_batch: a number, or a scalar tensor (which is not waited for), that "mean" and "batchmean" divide
            by instead of the number of rows: gradient accumulation over batches of unequal length.
        inplace: the gradient takes the place of the student's logits, so that no second [N, C] tensor exists. The
            logits hold no logits after the call: they must be an intermediate result, or a leaf, that nobody reads
            again (autograd raises where an earlier operation needs them in its backward). One backward only; without
            a gradient to make, nothing is overwritten.
        teacher_grad: let gradients reach the teacher too, as mutual learning does. Runs as plain PyTorch, not fused.
    """

    weight: Tensor | None
    label_smoothing: float
    sample_weight: Tensor | None
    ignore_index: int
    num_items_in_batch: float | Tensor | None
    inplace: bool
    teacher_grad: bool


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    *,
    ce: float = 0.0,
    kl: float = 0.0,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    tvd: float = 0.0,
    dkd: Sequence[float] = (0.0, 0.0),
    nkd: Sequence[float] = (0.0, 0.0),
    temperature: float = 1.0,
    beta: float = 0.5,
    normalize: bool = False,
    t_square: bool = True,
    reduction: str = "mean",
    **shared: Unpack[Shared],
) -> Tensor:
    """Any weighted sum of logit losses, loss and gradient in one pass over the logits; `terms.py` has the formulas.

    Args:
        student_logits: [..., C], floating.
        teacher_logits: the same shape, floating; its dtype may differ. Must not require grad (see ``teacher_grad``).
            Not needed by ce alone.
        target: class indices, int64 [...], or probabilities [..., C] (mixup). ce takes either as
            `torch.nn.functional.cross_entropy` does; dkd and nkd take the most probable class. For the other terms it
            is optional, and only says which rows to ignore.
        ce, kl, reverse_kl, jsd, tvd: weights of cross-entropy, KL(teacher || student), KL(student || teacher),
            generalised Jensen-Shannon divergence and total variation distance. 0 leaves a term out, at no cost.
        dkd, nkd: weights (target part, rest) of decoupled and of normalised distillation: (alpha, beta), (1, gamma).
        temperature: T of everything but ce and the target part of nkd.
        beta: of jsd, the share of the teacher in the mixture, in [0, 1]. At 0 it is KL(teacher || student), at 1
            KL(student || teacher), by convention (GKD, TRL, Liger-Kernel); see ``normalize``.
        normalize: divide jsd by beta (1 - beta). As defined it goes to 0 like beta (1 - beta) towards either end and
            jumps there; divided it is continuous, with the two divergences as its ends.
        t_square: multiply kl, reverse_kl, jsd and tvd by T^2; dkd and nkd contain that factor.
        reduction: ``mean`` over rows that count; ``batchmean`` is the same, or, without class indices, divides by the
            size of dimension 0; ``sum``; ``none``: a loss a row, [...].
        **shared: see `Shared`.

    Returns:
        Scalar (``none``: [...]), float32, or float64 for float64 logits. Where no row counts it is 0, with gradient 0,
        where torch gives NaN.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, constants outside their range, a
            missing teacher or target, a teacher that requires grad, logits that inplace cannot overwrite, or (on the
            CPU; on a GPU the loss becomes NaN) a class outside [0, C).
        TypeError: dtypes that do not fit.
    """
    square = temperature**2
    divided = square if t_square else 1.0
    terms = Terms(
        ce, kl * divided, reverse_kl * divided, jsd * divided, tvd * divided, *(square * x for x in (*dkd, *nkd)),
        temperature, beta,
    )  # fmt: skip
    terms = terms._replace(nkd_target=nkd[0])
    return _loss("logit_loss", student_logits, teacher_logits, target, terms, reduction, normalize, **shared)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    reduction: str = "batchmean",
    t_square: bool = True,
    **shared: Unpack[Shared],
) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): ``ce_weight`` CE(z, y) + ``kd_weight`` T^2 KL(teacher || student).

    Arguments, errors and result as in `logit_loss`. ``mean`` divides the divergence by the number of classes too, as
    `torch.nn.functional.kl_div` does, so ``batchmean`` is the mean of the formula. Usual weights are 0.1 and 0.9. The
    factor T^2 stays whatever the weights are, unless ``t_square`` is off.
    """
    weight = kd_weight * _factor(student_logits, temperature, t_square, reduction)
    terms = Terms(ce=ce_weight, kl=weight, temperature=temperature)
    return _loss("kd_loss", student_logits, teacher_logits, target, terms, reduction, **shared)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    **shared: Unpack[Shared],
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, eq. 7): T^2 (``alpha`` target part + ``beta`` rest) [+ CE].

    Finite at any logits, where the published code gives inf and NaN once the target leads by more than 104. The paper
    ramps the weights of both parts up over the first 20 epochs (`DKDLoss` does that) beside a ``ce_weight`` of 1. On
    CIFAR-100 it takes the defaults (beta by teacher), on ImageNet T = 1, beta = 0.5. The rest as in `logit_loss`.
    """
    square = temperature**2
    terms = Terms(ce=ce_weight, dkd_target=alpha * square, dkd_rest=beta * square, temperature=temperature)
    return _loss("dkd_loss", student_logits, teacher_logits, target, terms, reduction, **shared)


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    **shared: Unpack[Shared],
) -> Tensor:
    """Normalised distillation (Yang et al. 2023, eq. 9): - softmax(v)_y log softmax(z)_y - gamma T^2 sum p^ log q^.

    The sum is over the other classes, both softmaxes p^ and q^ without the target; it is a cross-entropy, so the loss
    of a perfect student is not 0. Of targets [..., C] (mixup) the most probable class counts; ce takes all of them.
    Published: T = 1 and gamma 1.5 (ImageNet, CNN) or 1 (ViT), T = 3 and gamma 3.5 (CIFAR-100), beside a ``ce_weight``
    of 1. The rest as in `logit_loss`.
    """
    rest = gamma * temperature**2
    terms = Terms(ce=ce_weight, nkd_target=1.0, nkd_rest=rest, temperature=temperature)
    return _loss("nkd_loss", student_logits, teacher_logits, target, terms, reduction, **shared)


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalize: bool = False,
    t_square: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, eq. 1), M = beta teacher + (1 - beta) student:
    beta KL(teacher || M) + (1 - beta) KL(student || M).

    ``labels`` say only which rows to ignore. ``beta`` and ``normalize`` as in `logit_loss`: at 0 and 1 it is
    KL(teacher || student) and KL(student || teacher), a jump unless it is normalised. ``batchmean`` divides by the
    rows that count, or, without labels, by the size of dimension 0 (as TRL does); ``mean`` by rows and classes.
    """
    weight = _factor(student_logits, temperature, t_square, reduction)
    terms = Terms(jsd=weight, temperature=temperature, beta=beta)
    return _loss("jsd_loss", student_logits, teacher_logits, labels, terms, reduction, normalize, **shared)


def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t_square: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """KL(student || teacher), which prefers one mode of the teacher to all of them; as `jsd_loss` with beta = 1."""
    weight = _factor(student_logits, temperature, t_square, reduction)
    terms = Terms(reverse_kl=weight, temperature=temperature)
    return _loss("reverse_kl_loss", student_logits, teacher_logits, labels, terms, reduction, **shared)


def tvd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t_square: bool = False,
    **shared: Unpack[Shared],
) -> Tensor:
    """Total variation distance sum |p - q| / 2, from logits; where p = q its gradient is 0. Else as `jsd_loss`."""
    weight = _factor(student_logits, temperature, t_square, reduction)
    terms = Terms(tvd=weight, temperature=temperature)
    return _loss("tvd_loss", student_logits, teacher_logits, labels, terms, reduction, **shared)


def _factor(student: Tensor, temperature: float, t_square: bool, reduction: str) -> float:
    """T^2, and what makes the mean over rows one over rows and classes."""
    classes = student.shape[-1] if reduction == "mean" and isinstance(student, Tensor) and student.ndim else 1
    return (temperature**2 if t_square else 1.0) / max(classes, 1)


def _loss(
    op: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    terms: Terms,
    reduction: str,
    normalize: bool = False,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: float | Tensor | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
) -> Tensor:
    arguments.check_inputs(op, student, teacher, target, terms, weight, sample_weight, teacher_grad)
    if reduction not in REDUCTIONS:
        _check.fail(op, "reduction", repr(reduction), "one of " + ", ".join(REDUCTIONS))
    if not 0 <= label_smoothing <= 1:
        _check.fail(op, "label_smoothing", label_smoothing, "a number in [0, 1]")
    terms = _at_the_ends(terms, normalize)._replace(smoothing=label_smoothing)
    dtype, lead = wide(student.dtype), student.shape[:-1]
    classes = student.shape[-1]
    index = scores = None
    if target is not None and target.is_floating_point():
        scores = target.reshape(-1, classes) if terms.ce else None
        index = target.argmax(-1).reshape(-1) if need_index(terms) else None
    elif target is not None:
        index = target.reshape(-1).contiguous()
    counted = target is not None and not target.is_floating_point()
    items, fixed = arguments.divisor(op, student, counted, reduction, num_items_in_batch)
    weight, sample_weight = (
        None if w is None else w.detach().reshape(-1).to(dtype).contiguous() for w in (weight, sample_weight)
    )
    rows = student.reshape(-1, classes)
    need_grad = torch.is_grad_enabled() and student.requires_grad
    tensors = (
        rows, None if teacher is None or not need_teacher(terms) else teacher.reshape(-1, classes), index, scores,
        weight, sample_weight, items,
    )  # fmt: skip
    if teacher_grad:
        loss = _engine.differentiable(*tensors, terms, ignore_index, fixed, reduction == "none")
    elif inplace and need_grad:
        arguments.check_inplace(op, student, teacher, target)
        options = (list(terms), ignore_index, fixed, reduction == "none", True)
        loss = _engine.InPlace.apply(student.view(-1, classes), *tensors[1:], *options)
    else:
        loss, _, _ = _engine._op(*tensors, list(terms), ignore_index, fixed, reduction == "none", need_grad)
    return loss.view(lead) if reduction == "none" else loss


def _at_the_ends(terms: Terms, normalize: bool) -> Terms:
    """jsd with beta 0 and 1 is one of the divergences."""
    jsd, beta = terms.jsd, terms.beta
    if jsd and beta == 0:
        return terms._replace(jsd=0.0, kl=terms.kl + jsd)
    if jsd and beta == 1:
        return terms._replace(jsd=0.0, reverse_kl=terms.reverse_kl + jsd)
    return terms._replace(jsd=jsd / (beta * (1 - beta))) if jsd and normalize else terms
