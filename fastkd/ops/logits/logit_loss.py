"""`logit_loss`, the engine: any weighted sum of logit losses in one pass over the logits.

`terms.py` has the maths of each row; here rows become a loss. A row counts unless its class index is `ignore_index`.
The terms that compare student and teacher are summed over rows and divided by the number of rows that count; ce is
divided by the same number, or, where classes have weights, by the sum of the weights of the rows' classes, as in
`torch.nn.functional.cross_entropy`. Both numbers are counted on the device. Nothing counts: 0, and zero gradients.

Where a gradient is wanted, the forward pass makes it while it has the row at hand, and saves it *instead of* the
logits: read z, read v, write dz, and nothing else is moved. Backward multiplies it by the upstream gradient; where
that is 1 it passes the gradient on untouched. float16 would lose what is divided by the number of rows, so its saved
gradient is that of the sum, and backward divides in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import _is_traced, custom_op
from . import terms as _terms
from .terms import Terms, wide

OP = "logit_loss"


def rows(
    student: Tensor, teacher: Tensor | None, index: Tensor | None, scores: Tensor | None, weight: Tensor | None,
    sample_weight: Tensor | None, terms: Terms, ignore_index: int, each: Tensor, ce_each: Tensor,
) -> Tensor:  # fmt: skip
    """[N] differentiable losses of the rows; each and ce_each scale the distillation terms and ce."""
    dtype = wide(student.dtype)
    student = student.to(dtype)
    if not any(terms[:9]):  # part of the graph nevertheless
        return student.new_zeros(()).where(torch.ones_like(student, dtype=torch.bool), student).sum(-1)
    total = student.new_zeros(len(student))
    if terms.ce:
        scores = None if scores is None else scores.to(dtype)
        total = total + terms.ce * ce_each * _terms.cross_entropy(student, index, scores, weight, terms, ignore_index)
    if _terms.need_teacher(terms):
        total = total + each * _terms.distillation(student, teacher.to(dtype), index, terms, ignore_index)
    return total if sample_weight is None else total * sample_weight


def _gradient(
    student, teacher, index, scores, weight, sample_weight, terms: Terms, ignore_index, each, ce_each
) -> Tensor:
    """[N, C], of `rows` by the student's logits."""
    dtype = wide(student.dtype)
    student = student.to(dtype)
    total = torch.zeros_like(student)
    if terms.ce:
        scores = None if scores is None else scores.to(dtype)
        slope = _terms.cross_entropy_gradient(student, index, scores, weight, terms, ignore_index)
        total = total + terms.ce * ce_each * slope
    if _terms.need_teacher(terms):
        total = total + each * _terms.distillation_gradient(student, teacher.to(dtype), index, terms, ignore_index)
    return total if sample_weight is None else total * sample_weight[:, None]


def divisors_of(student, index, scores, weight, items, fixed, ignore_index) -> Tensor:
    """[2]: 1 / what the distillation terms and ce are divided by; 0 for 1 / 0."""
    dtype = wide(student.dtype)
    if items is not None:
        count = ce_count = items
    elif fixed > 0:
        count = ce_count = torch.full((), fixed, dtype=dtype, device=student.device)
    else:
        valid = index != ignore_index
        count = ce_count = valid.sum().to(dtype)
        if weight is not None and scores is None:
            ce_count = weight[index.where(valid, 0)].where(valid, 0).sum()
    both = torch.stack([count, ce_count])
    return both.reciprocal().where(both != 0, 0)


def _fill_forward(
    student, teacher, index, scores, weight, sample_weight, items, terms, ignore_index, fixed, loss, divisors, grad
) -> None:
    divisors.copy_(divisors_of(student, index, scores, weight, items, fixed, ignore_index))
    each, ce_each = divisors.unbind()
    later = torch.ones_like(each)
    if grad is not None and grad.dtype == torch.float16:  # see _fill_backward
        each, ce_each, later = later, (ce_each / each).where(each != 0, 0), each
    options = (sample_weight, Terms(*terms), ignore_index, each, ce_each)
    total = rows(student, teacher, index, scores, weight, *options) * later
    loss.copy_(total if loss.ndim else total.sum())
    if grad is not None:
        grad.copy_(_gradient(student, teacher, index, scores, weight, *options))


def _fill_backward(grad_loss, saved, divisors, grad) -> None:
    factor = grad_loss * divisors[0] if saved.dtype == torch.float16 else grad_loss
    grad.copy_(saved * (factor[:, None] if factor.ndim else factor))


_TRITON = "fastkd.ops.logits.logit_loss_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


def _outputs(student: Tensor, each: bool, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty(student.shape[:1] if each else (), dtype=wide(student.dtype), device=student.device)
    shape = student.shape if need_grad else (0,)
    return loss, torch.empty(shape, dtype=student.dtype, device=student.device), loss.new_empty(2)


@custom_op("logit_loss")
def _op(
    student: Tensor, teacher: Tensor | None, index: Tensor | None, scores: Tensor | None, weight: Tensor | None,
    sample_weight: Tensor | None, items: Tensor | None, terms: Sequence[float], ignore_index: int, fixed: float,
    each: bool, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # loss, its gradient by the student (empty where not needed), the divisors' inverses
    loss, grad, divisors = _outputs(student, each, need_grad)
    _check_range(index, ignore_index, student.shape[1])
    forward(
        student, teacher, index, scores, weight, sample_weight, items, list(terms), ignore_index, fixed, loss,
        divisors, grad if need_grad else None,
    )  # fmt: skip
    return loss, grad, divisors


@_op.register_fake
def _(student, teacher, index, scores, weight, sample_weight, items, terms, ignore_index, fixed, each, need_grad):
    return _outputs(student, each, need_grad)


def _check_range(index: Tensor | None, ignore_index: int, classes: int) -> None:
    if index is None or index.device.type != "cpu":
        return  # on a GPU this would wait for the device: there a row with a wrong class gives NaN
    wrong = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if wrong.any():
        got = index[wrong][0].item()
        _check.fail(OP, "target", f"class {got}", f"0 to {classes - 1}, or ignore_index {ignore_index}")


@custom_op("logit_loss_backward")
def _op_backward(grad_loss: Tensor, saved: Tensor, divisors: Tensor) -> Tensor:
    grad = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
    backward(grad_loss.contiguous(), saved, divisors, grad)
    return grad


@_op_backward.register_fake
def _(grad_loss, saved, divisors):
    return torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)


def _setup_context(ctx, inputs, output) -> None:
    _, grad, divisors = output
    ctx.save_for_backward(grad, divisors)
    ctx.mark_non_differentiable(grad, divisors)


def _autograd(ctx, grad_loss: Tensor, *_):
    saved, divisors = ctx.saved_tensors
    if torch.is_grad_enabled() and not grad_loss.requires_grad:
        grad_loss = grad_loss.detach().requires_grad_()  # so that a second derivative raises, and is not 0 by accident
    traced = torch.compiler.is_compiling() or _is_traced((grad_loss, saved))
    finish = _op_backward if traced or torch.is_grad_enabled() or _keeps_graph() else _scaled_in_place
    return finish(grad_loss, saved, divisors), *[None] * 11


def _scaled_in_place(grad_loss: Tensor, saved: Tensor, divisors: Tensor) -> Tensor:
    # Where it is known without waiting for a device that there is nothing to do; on a GPU the kernel finds out itself.
    on_cpu = saved.device.type == "cpu" and saved.dtype != torch.float16
    if not (on_cpu and not grad_loss.ndim and grad_loss.item() == 1):
        backward(grad_loss.contiguous(), saved, divisors, saved)
    return saved


def _keeps_graph() -> bool:
    """Whether this backward may run a second time: then what it saved must stay as it is."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return query is None or query()


_op.register_autograd(_autograd, setup_context=_setup_context)


def differentiable(
    student, teacher, index, scores, weight, sample_weight, items, terms: Terms, ignore_index, fixed, each: bool
) -> Tensor:
    """The loss by plain PyTorch, with gradients for the teacher as well: what the fused op is measured by."""
    divisors = divisors_of(student, index, scores, weight, items, fixed, ignore_index)
    total = rows(student, teacher, index, scores, weight, sample_weight, terms, ignore_index, *divisors.unbind())
    return total if each else total.sum()


class InPlace(torch.autograd.Function):
    """The same op with the gradient in the memory of the student's logits."""

    @staticmethod
    def forward(ctx, student: Tensor, *args) -> Tensor:
        loss, _, divisors = _outputs(student, args[-2], False)
        _check_range(args[1], args[7], student.shape[1])
        forward(student, *args[:-2], loss, divisors, student)
        # Whoever saved the logits for a backward of his own is told by autograd, instead of reading a gradient there.
        torch.autograd.graph.increment_version(student)
        ctx.saved = student.detach(), divisors
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        if ctx.saved is None or torch.is_grad_enabled():
            raise RuntimeError(
                f"fastkd {OP}: inplace=True can be differentiated once: the gradient took the place of the logits and "
                "was scaled there; leave inplace out to run backward twice or to create a graph of it"
            )
        (saved, divisors), ctx.saved = ctx.saved, None
        return _scaled_in_place(grad_loss, saved, divisors), *[None] * 11
