"""A linear head and a loss of its logits in one, for any number of classes: the logits are never stored.

For N rows x of H features, V classes, s the scale and c the soft cap:

    z = s (x W^T + b), then z = c tanh(z / c)          the logits [N, V], of the student or of the teacher
    rows = w_hard CE(z, y) + w_soft D(teacher, z)      D: a divergence, KL or Jensen-Shannon, at temperature T
    loss = sum(rows) / count
    dx = s g W,  dW = s g^T x,  db = s sum_rows g      g = d rows / d z (times 1 - (z / c)^2), times d loss / count

Rows are taken `chunk_size` at a time (Liger-Kernel's idea, Hsu et al. 2024): one product makes their logits, one kernel
of `logit_loss` turns them into losses and, over the logits themselves, into g; two products add to the gradients. What
lives is a chunk of logits of student and teacher, and the gradients, whose sums are float32.

The gradients are made in forward, 3 products for the student and 1 for the teacher, and backward multiplies them by
d loss / count. That needs one upstream number, so with reduction "none" forward makes the rows alone and backward runs
the chunks again with the upstream gradient as the weights of the rows: 4 products and 2, right for any of them.

g is made without 1 / count, which for float16 would take it out of range; it is multiplied in at the end, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from ..blocks import linear as _linear
from . import linear_topk
from .linear_products import Products
from .logit_loss import forward as logit_rows
from .terms import Terms

OP = "linear_loss"
REDUCTIONS = ("batchmean", "sum", "none")


class Options(NamedTuple):
    """Numbers that the loss depends on; kernels get them as a flat list."""

    hard: float = 0.0  # weight of the cross entropy
    smoothing: float = 0.0
    soft: float = 0.0  # weight of the divergence, with T^2 where that is wanted
    beta: float = 0.0  # 0: KL(teacher || student), 1: KL(student || teacher), between: Jensen-Shannon
    temperature: float = 1.0
    scale: float = 1.0
    cap: float = 0.0  # 0: none
    teacher_scale: float = 1.0
    teacher_cap: float = 0.0


class Teacher(NamedTuple):
    """What is known of the teacher: its head's input and head, or its logits, or its k best classes; or nothing."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    ids: Tensor | None
    logprobs: Tensor | None


def through(backend: str) -> Callable[..., None]:
    """The chunks on the kernels of one backend."""

    def fill(
        x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size, row_weight, grad_x, grad_weight,
        grad_bias, rows,
    ) -> None:  # fmt: skip
        native = backend == "cpp"
        head = Products(x, weight, native)
        other = None if teacher.x is None else Products(teacher.x, teacher.weight, native)
        count, classes = min(chunk_size, len(x)), weight.shape[0]
        wants = any(g is not None for g in (grad_x, grad_weight, grad_bias))
        buffer = rows.new_empty(count, classes)
        taught = rows.new_empty(count, classes) if other is not None else None
        capped = rows.new_empty(count, classes) if wants and options.cap else None
        each, terms, divisors = logit_rows.implementation(backend), _terms(options), rows.new_empty(2)
        bias, teacher_bias = (None if b is None else b.to(rows.dtype).contiguous() for b in (bias, teacher.bias))
        if grad_bias is not None:
            grad_bias.zero_()
        if grad_weight is not None and len(x) == 0:
            grad_weight.zero_()
        for start in range(0, len(x), chunk_size):
            part = slice(start, min(len(x), start + chunk_size))
            n = part.stop - start
            z, inputs = buffer[:n], x[part]
            head.logits(inputs, bias, options.scale, z)
            cap_(z, options.cap)
            grad = None if not wants else z if capped is None else capped[:n]
            labels = None if target is None else target[part]
            weights = None if row_weight is None else row_weight[part]
            if teacher.ids is not None:
                linear_topk.kernel.implementation(backend)(
                    z, teacher.ids[part], teacher.logprobs[part], labels, options.hard, options.soft, mode,
                    ignore_index, weights, rows[part], grad,
                )  # fmt: skip
            else:
                v = None if teacher.logits is None else teacher.logits[part]
                if other is not None:
                    v = taught[:n]
                    other.logits(teacher.x[part], teacher_bias, options.teacher_scale, v)
                    cap_(v, options.teacher_cap)
                each(
                    z, v, labels, None, None, weights, None, terms, ignore_index, 1.0, rows[part], divisors, grad,
                )  # fmt: skip
            if not wants:
                continue
            if capped is not None:
                grad.mul_(z.div_(options.cap).square_().neg_().add_(1))
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0))
            if grad_x is not None:
                head.grad_input(grad, grad_x[part])
            if grad_weight is not None:
                head.grad_weight(grad, inputs, grad_weight, first=start == 0)

    return fill


def _terms(options: Options) -> list[float]:
    kind = {0.0: "kl", 1.0: "reverse_kl"}.get(options.beta, "jsd")
    constants = dict(temperature=options.temperature, beta=options.beta, smoothing=options.smoothing)
    return list(Terms(ce=options.hard, **{kind: options.soft}, **constants))


def cap_(z: Tensor, cap: float) -> None:
    if cap:
        z.div_(cap).tanh_().mul_(cap)


_TRITON = "fastkd.ops.logits.linear_loss_triton"
kernel = Kernel(OP, reference=through("reference"), cpp=through("cpp"), triton=f"{_TRITON}:fill")


def _run(x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size, row_weight, needs):
    """Losses of the rows, and wide gradients (None where they are not needed) of their sum weighted by row_weight."""
    wide, rows = _linear.wide_dtype(x.dtype), x.new_empty(len(x), dtype=_linear.wide_dtype(x.dtype))
    shapes = (x.shape, weight.shape, weight.shape[:1])
    gradients = [x.new_empty(shape, dtype=wide) if need else None for shape, need in zip(shapes, needs)]
    x = _linear.as_rows(x)
    if teacher.x is not None:
        teacher = teacher._replace(x=_linear.as_rows(teacher.x))
    if teacher.logits is not None:
        teacher = teacher._replace(logits=_linear.as_rows(teacher.logits))
    if target is not None:
        target = target.contiguous()
        _check_target(target, weight.shape[0], ignore_index)
    kernel(
        x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size, row_weight, *gradients, rows,
    )  # fmt: skip
    return rows, gradients


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Labels out of range raise on the CPU; a GPU would have to wait for the answer."""
    if target.is_cuda:
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        _check.fail(OP, "target", f"the label {int(wrong[0])}", f"0 to {classes - 1}, or ignore_index {ignore_index}")


def _factor(rows: Tensor, target: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
    """1 / count as a scalar on the device."""
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    if REDUCTIONS[reduction] != "batchmean":
        return one
    if target is None:
        return one / max(1, len(rows))
    return one / (target != ignore_index).sum().clamp_min(1)


@custom_op("linear_loss")
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher_x: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, teacher_logits: Tensor | None, ids: Tensor | None, logprobs: Tensor | None,
    target: Tensor | None, options: Sequence[float], ignore_index: int, mode: int, chunk_size: int, reduction: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    teacher = Teacher(teacher_x, teacher_weight, teacher_bias, teacher_logits, ids, logprobs)
    rows, gradients = _run(
        x, weight, bias, teacher, target, Options(*options), ignore_index, mode, chunk_size, None, needs
    )
    factor = _factor(rows, target, reduction, ignore_index)
    loss = rows if REDUCTIONS[reduction] == "none" else rows.sum() * factor
    return loss, factor, *(x.new_empty(0, dtype=rows.dtype) if g is None else g for g in gradients)


@_op.register_fake
def _(
    x, weight, bias, teacher_x, teacher_weight, teacher_bias, teacher_logits, ids, logprobs, target, options,
    ignore_index, mode, chunk_size, reduction, needs,
):  # fmt: skip
    wide = _linear.wide_dtype(x.dtype)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return (
        x.new_empty(x.shape[:1] if REDUCTIONS[reduction] == "none" else (), dtype=wide),
        x.new_empty((), dtype=wide),
        *(x.new_empty(shape if need else (0,), dtype=wide) for shape, need in zip(shapes, needs)),
    )


# Gradients of parameters stay wide until the rule of autograd gives them their dtypes.
@custom_op("linear_loss_backward")
def _op_backward(
    grad_loss: Tensor, factor: Tensor, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor, scale: float,
    x_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    by = grad_loss * factor * scale
    return _scaled(grad_x, by, x_dtype), _scaled(grad_weight, by, weight_dtype), _scaled(grad_bias, by, bias_dtype)


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


@_op_backward.register_fake
def _(grad_loss, factor, grad_x, grad_weight, grad_bias, scale, *dtypes):
    return tuple(torch.empty_like(g, dtype=dtype) for g, dtype in zip((grad_x, grad_weight, grad_bias), dtypes))


@custom_op("linear_loss_rows_backward")
def _op_rows_backward(
    grad_rows: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, teacher_x: Tensor | None,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, teacher_logits: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, target: Tensor | None, options: Sequence[float], ignore_index: int, mode: int,
    chunk_size: int, needs: list[bool], x_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(*options)
    teacher = Teacher(teacher_x, teacher_weight, teacher_bias, teacher_logits, ids, logprobs)
    # Weights of the rows up to 1, so that float16 holds what they multiply; the largest of them comes in at the end.
    unit = grad_rows.abs().amax().clamp_min(torch.finfo(grad_rows.dtype).tiny) if len(x) else grad_rows.sum()
    _, gradients = _run(
        x, weight, bias, teacher, target, options, ignore_index, mode, chunk_size, grad_rows / unit, needs
    )
    by = unit * options.scale
    return tuple(
        x.new_empty(0, dtype=dtype) if g is None else _scaled(g, by, dtype)
        for g, dtype in zip(gradients, (x_dtype, weight_dtype, bias_dtype))
    )


@_op_rows_backward.register_fake
def _(
    grad_rows, x, weight, bias, teacher_x, teacher_weight, teacher_bias, teacher_logits, ids, logprobs, target,
    options, ignore_index, mode, chunk_size, needs, *dtypes,
):  # fmt: skip
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s if need else (0,), dtype=d) for s, need, d in zip(shapes, needs, dtypes))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *_, options, ctx.ignore_index, ctx.mode, ctx.chunk_size, reduction, needs = inputs
    ctx.options = list(options)
    ctx.rows = REDUCTIONS[reduction] == "none"
    ctx.dtypes = [x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(inputs[:10] if ctx.rows else output[1:]))


def _autograd(ctx, grad_loss: Tensor, *_):
    needs = list(ctx.needs_input_grad[:3])
    if ctx.rows:
        found = _op_rows_backward(
            grad_loss.contiguous(), *ctx.saved_tensors, ctx.options, ctx.ignore_index, ctx.mode, ctx.chunk_size, needs,
            *ctx.dtypes,
        )  # fmt: skip
    else:
        found = _op_backward(grad_loss, *ctx.saved_tensors, Options(*ctx.options).scale, *ctx.dtypes)
    return (*(g if need else None for g, need in zip(found, needs)), *[None] * 13)


_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, target: Tensor | None, options: Options,
    ignore_index: int, mode: int, chunk_size: int, reduction: str,
) -> Tensor:  # fmt: skip
    """The op on checked arguments; the public functions are in `linear_losses`."""
    wanted = [t is not None and t.requires_grad for t in (x, weight, bias)]
    needs = [torch.is_grad_enabled() and reduction != "none" and want for want in wanted]
    return _op(
        x, weight, bias, *teacher, target, list(options), ignore_index, mode, chunk_size,
        REDUCTIONS.index(reduction), needs,
    )[0]  # fmt: skip
