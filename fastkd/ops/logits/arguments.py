"""What the losses between logits accept, and what they divide by."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._op import _is_traced
from .terms import Terms, need_index, need_teacher, wide


def divisor(
    op: str, student: Tensor, counted: bool, reduction: str, items: float | Tensor | None
) -> tuple[Tensor | None, float]:
    """What the sum is divided by: a tensor, or a number, or (0) what is counted."""
    if reduction in ("sum", "none"):
        if items is not None:
            _check.fail(op, "num_items_in_batch", f"a value with reduction={reduction!r}", "None", "it is a divisor")
        return None, 1.0
    if isinstance(items, Tensor):
        if items.numel() != 1:
            _check.fail(op, "num_items_in_batch", f"shape {tuple(items.shape)}", "one number")
        return items.detach().reshape(()).to(student.device, wide(student.dtype), non_blocking=True), 0.0
    if items is not None:
        if not items > 0:
            _check.fail(op, "num_items_in_batch", items, "a positive number")
        return None, float(items)
    if counted:
        return None, 0.0
    count = student.shape[0] if reduction == "batchmean" else student.shape[:-1].numel()
    return None, float(max(count, 1))


def check_inputs(op, student, teacher, target, terms: Terms, weight, sample_weight, teacher_grad: bool) -> None:
    ndim = student.ndim if isinstance(student, Tensor) else 2
    _check.check_tensor(op, "student_logits", student, max(ndim, 2))
    if student.shape[-1] < 2:
        _check.fail(op, "student_logits", f"shape {tuple(student.shape)}", "at least 2 classes in the last dimension")
    if not terms.temperature > 0:
        _check.fail(op, "temperature", terms.temperature, "a positive number")
    if not 0 <= terms.beta <= 1:
        _check.fail(op, "beta", terms.beta, "a number in [0, 1]")
    if teacher is None:
        if need_teacher(terms):
            _check.fail(op, "teacher_logits", "None", "logits, which a term with a weight needs")
    else:
        _check.check_tensor(op, "teacher_logits", teacher, ndim)
        _check.check_shape(op, "teacher_logits", teacher, tuple(student.shape), "like student_logits")
        if not teacher_grad:
            why = "a distillation loss must not train the teacher (set teacher_grad=True where it should)"
            _check.check_no_grad(op, "teacher_logits", teacher, why)
        if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
            got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
            _check.fail(op, "teacher_logits", got, "float64 on both sides or on none", "cast one of them", TypeError)
    if target is None:
        if terms.ce or need_index(terms):
            _check.fail(op, "target", "None", "class indices or probabilities, which a term with a weight needs")
    elif isinstance(target, Tensor) and target.is_floating_point():
        _check.check_tensor(op, "target", target, ndim)
        _check.check_shape(op, "target", target, tuple(student.shape), "like student_logits")
        _check.check_no_grad(op, "target", target, "targets are not trained")
    else:
        _check.check_tensor(op, "target", target, ndim - 1, (torch.int64,))
        _check.check_shape(op, "target", target, tuple(student.shape[:-1]), "(one class a row)")
    if weight is not None:
        _check.check_tensor(op, "weight", weight, 1)
        _check.check_shape(op, "weight", weight, (student.shape[-1],), "(one a class)")
    if sample_weight is not None:
        _check.check_tensor(op, "sample_weight", sample_weight, ndim - 1)
        _check.check_shape(op, "sample_weight", sample_weight, tuple(student.shape[:-1]), "(one a row)")
        _check.check_no_grad(op, "sample_weight", sample_weight, "its gradient is not computed")
    _check.check_same_device(
        op, student_logits=student, teacher_logits=teacher, target=target, weight=weight, sample_weight=sample_weight
    )


def check_inplace(op: str, student: Tensor, teacher: Tensor | None, target: Tensor | None) -> None:
    if torch.compiler.is_compiling() or _is_traced((student,)):
        _check.fail(op, "inplace", "True while the call is being traced", "eager code", "leave it out under compile")
    if not student.is_contiguous():
        _check.fail(op, "inplace", "True with student_logits that are not contiguous", "dense logits", "leave it out")
    storage = student.untyped_storage().data_ptr()
    for name, other in (("teacher_logits", teacher), ("target", target)):
        if other is not None and other.untyped_storage().data_ptr() == storage:
            _check.fail(op, "inplace", f"True with {name} in the memory of student_logits", "memory of their own")
