"""Distillation between image features through stored class vectors (PromptKD, Li et al. 2024, section 3.3).

For projected student features P [B, D], class vectors W [C, D] of the teacher's text encoder, and either the teacher's
image features v [B, D] or its finished logits t [B, C]:

    s = scale_s u W^T,  u = P / max(||P||, 1e-12)        t = scale_t v W^T, v normalised likewise
    p = softmax(t / T), q = softmax(s / T)
    loss = weight T^2 / (B C) sum p (log p - log q)      "mean_elements", the released code; "batchmean": / B, the paper

    dP = scale_s (g - u (u . g)) / ||P||,  g = ds W,  ds = weight T / (B C) (q - p)

Student and teacher rows are normalised into one matrix, so that W is read by one product for both; the kernel of the
rows turns the student's logits into ds where they lie; a second product and the way back through the norm follow. The
gradient is made in forward, B D numbers, and backward scales it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from ..blocks.linear import as_rows, wide_dtype
from .logit_loss import forward as logit_rows
from .terms import Terms

OP = "class_vector_kd"
REDUCTIONS = ("mean_elements", "batchmean")
NORM_FLOOR = 1e-12


# x [N, D] -> out [N, D] wide, norms [N] wide; then grad, unit [N, D] -> grad_x = factor (grad - u (u . grad)) / norm.


def _fill_unit_rows(x, scale, out, norms) -> None:
    x = x.to(out.dtype)
    torch.linalg.vector_norm(x, dim=1, out=norms)
    torch.mul(x, scale / norms.clamp_min(NORM_FLOOR)[:, None], out=out)


def _fill_unit_rows_backward(grad, unit, norms, scale, factor, grad_x) -> None:
    along = (unit * grad).sum(1, keepdim=True) / scale**2
    along = torch.where(norms[:, None] < NORM_FLOOR, 0, along)
    # `grad_x` may be `grad`.
    torch.mul(grad - unit * along, factor / norms.clamp_min(NORM_FLOOR)[:, None], out=grad_x)


def _cpp_unit_rows(x, scale, out, norms) -> None:
    torch.ops.fastkd_cpu.unit_rows(x[None], scale, out, norms)


_TRITON = "fastkd.ops.logits.class_vectors_triton"
unit_rows = Kernel("unit_rows", reference=_fill_unit_rows, cpp=_cpp_unit_rows, triton=f"{_TRITON}:unit_rows")
unit_rows_backward = Kernel(
    "unit_rows_backward", reference=_fill_unit_rows_backward, triton=f"{_TRITON}:unit_rows_backward"
)


def through(backend: str) -> Callable[..., None]:
    """Loss and gradient [B, D] (None: not wanted), wide, on the kernels of one backend."""

    def fill(student, text, teacher, teacher_logits, scale, teacher_scale, temperature, weight, grad, loss) -> None:
        batch, width = student.shape
        both = 2 * batch if teacher is not None else batch
        units, norms, divisors = loss.new_empty(both, width), loss.new_empty(both), loss.new_empty(2)
        normalize = unit_rows.implementation(backend)
        normalize(student, scale, units[:batch], norms[:batch])
        if teacher is not None:
            normalize(teacher, teacher_scale, units[batch:], norms[batch:])
        # Into given memory: autocast leaves such products alone.
        logits = torch.mm(units, text.t(), out=loss.new_empty(both, len(text)))
        mine, theirs = logits[:batch], teacher_logits if teacher is None else logits[batch:]
        terms = list(Terms(kl=weight * temperature**2, temperature=temperature))
        over = None if grad is None else mine
        logit_rows.implementation(backend)(mine, theirs, *[None] * 5, terms, 0, float(batch), loss, divisors, over)
        if grad is not None:
            torch.mm(mine, text, out=grad)
            unit_rows_backward.implementation(backend)(grad, units[:batch], norms[:batch], scale, scale, grad)

    return fill


kernel = Kernel(OP, reference=through("reference"), cpp=through("cpp"), triton=f"{_TRITON}:fill")


@custom_op("class_vector_kd")
def _op(
    student: Tensor, text: Tensor, teacher: Tensor | None, teacher_logits: Tensor | None, scale: float,
    teacher_scale: float, temperature: float, weight: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = wide_dtype(student.dtype)
    loss = student.new_empty((), dtype=wide)
    grad = student.new_empty(student.shape if keep else (0,), dtype=wide)
    if teacher_logits is not None:
        teacher_logits = as_rows(teacher_logits)
    text = as_rows(text).to(wide)
    kernel(
        student, text, teacher, teacher_logits, scale, teacher_scale, temperature, weight, grad if keep else None, loss
    )
    return loss, grad


@_op.register_fake
def _(student, text, teacher, teacher_logits, scale, teacher_scale, temperature, weight, keep):
    wide = wide_dtype(student.dtype)
    return student.new_empty((), dtype=wide), student.new_empty(student.shape if keep else (0,), dtype=wide)


@custom_op("class_vector_kd_backward")
def _op_backward(grad_loss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(grad, grad_loss, out=torch.empty_like(grad, dtype=dtype))


@_op_backward.register_fake
def _(grad_loss, grad, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _autograd(ctx, grad_loss: Tensor, _grad):
    return _op_backward(grad_loss, *ctx.saved_tensors, ctx.dtype), *[None] * 8


_op.register_autograd(_autograd, setup_context=_setup_context)


def class_vector_kd(
    student_feature: Tensor,
    text_features: Tensor,
    *,
    teacher_feature: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    logit_scale: float = 100.0,
    teacher_logit_scale: float = 100.0,
    temperature: float = 1.0,
    weight: float = 1.0,
    reduction: str = "mean_elements",
) -> Tensor:
    """KL divergence of a student's class probabilities from a teacher's, both through one set of class vectors.

    Args:
        student_feature: [B, D] floating, the student's features after the projection to the teacher's width; they are
            normalised here.
        text_features: [C, D], the class vectors, used as they are (unit rows, as in `ClassVectorBank`). No gradient.
        teacher_feature: [B, D], the teacher's image features, normalised here. No gradient.
        teacher_logits: [B, C] instead, finished: the teacher's scale is in them. No gradient.
        logit_scale, teacher_logit_scale: what the cosines are multiplied by, > 0 (CLIP's ``exp(logit_scale)``).
        temperature: > 0; the loss carries its square.
        weight: factor of the loss.
        reduction: ``mean_elements`` divides by B C as the released code does (its weights of 200 and 1000 belong to
            that), ``batchmean`` by B as the paper does: the same with weight / C.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: both or neither of the teacher's inputs, widths or class numbers that do not fit, an empty batch, a
            number that is not positive, or a frozen side that requires grad.
        TypeError: not floating.
    """
    _check.check_tensor(OP, "student_feature", student_feature, 2)
    _check.check_tensor(OP, "text_features", text_features, 2)
    batch, width = student_feature.shape
    classes = text_features.shape[0]
    if (teacher_feature is None) == (teacher_logits is None):
        got = "neither" if teacher_feature is None else "both"
        _check.fail(OP, "teacher_feature", f"{got} of it and teacher_logits", "one of the two")
    _check.check_shape(OP, "text_features", text_features, (classes, width), "(C, D) with the D of student_feature")
    for name, value, shape, meaning in (
        ("teacher_feature", teacher_feature, (batch, width), "(B, D) like student_feature"),
        ("teacher_logits", teacher_logits, (batch, classes), "(B, C)"),
    ):
        if value is not None:
            _check.check_tensor(OP, name, value, 2)
            _check.check_shape(OP, name, value, shape, meaning)
            _check.check_no_grad(OP, name, value, "a distillation loss must not train the teacher")
    _check.check_no_grad(OP, "text_features", text_features, "the class vectors are stored once")
    _check.check_same_device(
        OP, student_feature=student_feature, text_features=text_features, teacher_feature=teacher_feature,
        teacher_logits=teacher_logits,
    )  # fmt: skip
    if batch == 0 or classes == 0:
        _check.fail(OP, "student_feature", f"{batch} rows and {classes} classes", "at least one of each")
    for name, value in (
        ("logit_scale", logit_scale), ("teacher_logit_scale", teacher_logit_scale), ("temperature", temperature),
    ):  # fmt: skip
        if not value > 0:
            _check.fail(OP, name, value, "a positive number")
    if reduction not in REDUCTIONS:
        _check.fail(OP, "reduction", repr(reduction), "one of " + ", ".join(REDUCTIONS))
    if reduction == "mean_elements":
        weight = weight / classes
    keep = torch.is_grad_enabled() and student_feature.requires_grad
    return _op(
        student_feature, text_features, teacher_feature, teacher_logits, float(logit_scale),
        float(teacher_logit_scale), float(temperature), float(weight), keep,
    )[0]  # fmt: skip


class ClassVectorKDLoss(torch.nn.Module):
    """`class_vector_kd` as a module; ``forward(student_feature, text_features, teacher_feature)``."""

    def __init__(
        self,
        logit_scale: float = 100.0,
        teacher_logit_scale: float = 100.0,
        temperature: float = 1.0,
        weight: float = 1.0,
        reduction: str = "mean_elements",
    ) -> None:
        super().__init__()
        self.options = dict(
            logit_scale=logit_scale, teacher_logit_scale=teacher_logit_scale, temperature=temperature, weight=weight,
            reduction=reduction,
        )  # fmt: skip

    def forward(self, student_feature: Tensor, text_features: Tensor, teacher_feature: Tensor) -> Tensor:
        return class_vector_kd(student_feature, text_features, teacher_feature=teacher_feature, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(
    student_feature, text_features, *, teacher_feature=None, teacher_logits=None, logit_scale=100.0,
    teacher_logit_scale=100.0, temperature=1.0, weight=1.0, reduction="mean_elements",
) -> Tensor:  # fmt: skip
    def logits(feature: Tensor, scale: float) -> Tensor:
        wide = wide_dtype(feature.dtype)
        return scale * F.normalize(feature.to(wide), dim=1, eps=NORM_FLOOR) @ text_features.to(wide).t()

    s = logits(student_feature, logit_scale)
    t = logits(teacher_feature, teacher_logit_scale) if teacher_logits is None else teacher_logits.to(s.dtype)
    log_p, log_q = (t / temperature).log_softmax(1), (s / temperature).log_softmax(1)
    count = s.numel() if reduction == "mean_elements" else len(s)
    return weight * temperature**2 / count * (log_p.exp() * (log_p - log_q)).sum()


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0) + 3)
    batch, width, classes = case["batch"], case["width"], case["classes"]
    text = F.normalize(torch.randn(classes, width, generator=random), dim=1)
    student, teacher = (torch.randn(batch, width, generator=random) for _ in range(2))
    kwargs = dict(student_feature=student.to(device, dtype), text_features=text.to(device, dtype))
    if case.get("stored"):
        logits = 10 * torch.randn(batch, classes, generator=random)
        kwargs["teacher_logits"] = logits.to(device, dtype)
    else:
        kwargs["teacher_feature"] = teacher.to(device, dtype)
    scale = case.get("scale", 20.0)
    return dict(
        kwargs, logit_scale=scale, teacher_logit_scale=scale / 2, temperature=case.get("temperature", 1.0),
        weight=case.get("weight", 1.0), reduction=case.get("reduction", "mean_elements"),
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """Lengths do not matter; a student that agrees with the teacher has no loss."""
    loss = class_vector_kd(**kwargs)
    longer = class_vector_kd(**{**kwargs, "student_feature": 4 * kwargs["student_feature"]})
    torch.testing.assert_close(longer, loss, rtol=1e-4, atol=1e-6)
    same = dict(kwargs, teacher_feature=kwargs["student_feature"], teacher_logit_scale=kwargs["logit_scale"])
    same.pop("teacher_logits", None)
    assert abs(class_vector_kd(**same)) < 1e-5


def _bytes_moved(kwargs: dict) -> int:
    stored = kwargs.get("teacher_logits")
    features = tensor_bytes(kwargs["student_feature"], kwargs.get("teacher_feature"), stored)
    return features + 2 * tensor_bytes(kwargs["text_features"]) + tensor_bytes(kwargs["student_feature"])


def _flops(kwargs: dict) -> int:
    products = 4 if kwargs.get("teacher_logits") is not None else 6
    return products * kwargs["student_feature"].numel() * kwargs["text_features"].shape[0]


SPEC = register(
    OpSpec(
        name=OP,
        function=class_vector_kd,
        reference=_reference,
        kernels=(kernel, unit_rows, unit_rows_backward),
        build=_build,
        differentiable=("student_feature",),
        cases={
            "features": dict(batch=3, width=24, classes=7),
            "stored_logits": dict(batch=4, width=16, classes=33, stored=True, temperature=2.0),
            "batchmean": dict(batch=2, width=40, classes=5, reduction="batchmean", weight=0.3),
            "odd": dict(batch=1, width=7, classes=2, temperature=0.5, scale=3.0),
        },
        space=dict(
            batch=(1, 2, 5), width=(2, 8, 33), classes=(2, 17), stored=(False, True), temperature=(0.5, 1.0, 4.0),
            scale=(1.0, 20.0), reduction=REDUCTIONS, seed=tuple(range(5)),
        ),
        bench={
            "clip_1000": dict(batch=8, width=768, classes=1000, scale=100.0),
            "clip_21841": dict(batch=64, width=512, classes=21841, scale=100.0),
        },
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="promptkd_loss",
        law=_law,
    )
)  # fmt: skip
