"""Logit standardisation (Sun et al., CVPR 2024): logits lose their own mean and scale before they are compared.

Per row x of C logits, with the unbiased standard deviation s over the classes:

    y      = (x - mean(x)) / (s + eps)
    dx     = (dy - mean(dy) - (x - mean(x)) (dy . (x - mean(x))) / (s (s + eps) (C - 1))) / (s + eps)
                                                          where s = 0 (equal logits) the last term is 0

The statistics live in registers: forward reads x and writes y, backward reads x and dy and writes dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from .losses import kd_loss, logit_loss
from .terms import wide as _wide

OP = "logit_standardization"


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(1, keepdim=True)
    return centred, (centred.square().sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt()


def _fill_forward(x, eps, y) -> None:
    centred, deviation = _moments(x.to(_wide(x.dtype)))
    y.copy_(centred / (deviation + eps))


def _fill_backward(grad_y, x, eps, grad_x) -> None:
    wide = _wide(x.dtype)
    centred, deviation = _moments(x.to(wide))
    g = grad_y.to(wide)
    unit = torch.where(deviation > 0, centred / deviation, 0) / (deviation + eps)
    along = (g * centred).sum(1, keepdim=True) / (x.shape[1] - 1)
    grad_x.copy_((g - g.mean(1, keepdim=True) - unit * along) / (deviation + eps))


_TRITON = "fastkd.ops.logits.standardise_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


@custom_op("logit_standardization")
def _op(x: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x, eps, y)
    return y


@_op.register_fake
def _(x, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("logit_standardization_backward")
def _op_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    backward(grad_y, x, eps, grad_x)
    return grad_x


@_op_backward.register_fake
def _(grad_y, x, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


def _autograd(ctx, grad_y: Tensor):
    return _op_backward(grad_y, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_autograd, setup_context=_setup_context)


def logit_standardization(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Each row minus its mean, divided by its unbiased standard deviation plus eps.

    Args:
        logits: [N, C], C > 1, floating, any strides.
        eps: added to the standard deviation.

    Returns:
        [N, C] in the dtype of logits.

    Raises:
        ValueError: other than 2 dimensions, or one class.
        TypeError: not floating.
    """
    _check.check_tensor(OP, "logits", logits, 2)
    if logits.shape[1] < 2:
        _check.fail(OP, "logits", f"{logits.shape[1]} class", "at least 2", "one value has no standard deviation")
    return _op(logits, eps)


def standardized_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 2.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    eps: float = 1e-7,
    ignore_index: int = -100,
    teacher_grad: bool = False,
) -> Tensor:
    """``ce_weight CE(student, target) + kd_weight T^2 KL`` of standardised logits; the cross-entropy takes raw ones.

    Args:
        student_logits, teacher_logits: [N, C], floating. The teacher must not require grad.
        target: int64 [N], needed with ce_weight; rows of `ignore_index` count nowhere.
        temperature: of the softmax of both standardised logits; the KL divergence is multiplied by its square.
        ce_weight, kd_weight: weights of the two terms, each a mean over the rows that count.
        eps: added to the standard deviations.
        teacher_grad: lets the teacher's logits require grad, and gives them one.

    Returns:
        Scalar, float32 (float64 for float64 logits); 0 where all rows are ignored.

    Raises:
        ValueError: shapes that differ, temperature <= 0, ce_weight without target, a teacher that requires grad.
        TypeError: not floating logits.
    """
    name = "standardized_kd_loss"
    _check.check_tensor(name, "student_logits", student_logits, 2)
    _check.check_tensor(name, "teacher_logits", teacher_logits, 2)
    _check.check_shape(name, "teacher_logits", teacher_logits, tuple(student_logits.shape), "like student_logits")
    if not teacher_grad:
        _check.check_no_grad(name, "teacher_logits", teacher_logits, "a distillation loss must not train the teacher")
    if not temperature > 0:
        _check.fail(name, "temperature", temperature, "a positive number")
    if target is None and ce_weight:
        _check.fail(name, "target", None, "class indices", "a cross-entropy needs them; or leave ce_weight at 0")
    if student_logits.shape[0] == 0:
        _check.fail(name, "student_logits", "no rows", "at least one", "the mean of nothing is undefined")
    z, v = (logit_standardization(x.to(_wide(x.dtype)), eps) for x in (student_logits, teacher_logits))
    loss = kd_loss(
        z, v, target, temperature=temperature, kd_weight=kd_weight, ignore_index=ignore_index, teacher_grad=teacher_grad
    )
    if not ce_weight:
        return loss
    return loss + logit_loss(student_logits, None, target, ce=ce_weight, ignore_index=ignore_index)


class StandardizedKDLoss(torch.nn.Module):
    """`standardized_kd_loss` as a module; ``forward(student_logits, teacher_logits, target=None)``."""

    def __init__(
        self, temperature: float = 2.0, *, ce_weight: float = 0.0, kd_weight: float = 1.0, eps: float = 1e-7,
        ignore_index: int = -100, teacher_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = dict(
            temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight, eps=eps, ignore_index=ignore_index,
            teacher_grad=teacher_grad,
        )  # fmt: skip

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return standardized_kd_loss(student_logits, teacher_logits, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(logits, eps=1e-7) -> Tensor:
    x = logits.to(_wide(logits.dtype))
    return ((x - x.mean(1, keepdim=True)) / (eps + x.std(1, keepdim=True))).to(logits.dtype)


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    logits = 3 * torch.randn(case["batch"], case["classes"], generator=random) + case.get("shift", 0.5)
    return dict(logits=logits.to(device, dtype), **({"eps": case["eps"]} if "eps" in case else {}))


def _law(kwargs: dict) -> None:
    """Shift and scale of a row do not matter."""
    y = logit_standardization(**kwargs)
    moved = logit_standardization(4 * kwargs["logits"] + 1, 4 * kwargs.get("eps", 1e-7))
    torch.testing.assert_close(moved, y, rtol=1e-4, atol=1e-4)


SPEC = register(
    OpSpec(
        name=OP,
        function=logit_standardization,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("logits",),
        cases={
            "digits": dict(batch=5, classes=10),
            "odd": dict(batch=3, classes=133, shift=-20.0),
            "two_classes": dict(batch=4, classes=2, eps=0.1),
        },
        space=dict(batch=(1, 2, 7), classes=(2, 3, 10, 65, 130), eps=(1e-7, 0.01), seed=tuple(range(5))),
        bench={"imagenet": dict(batch=256, classes=1000)},
        bytes_moved=lambda k: 5 * tensor_bytes(k["logits"]),
        flops=lambda k: 15 * k["logits"].numel(),
        golden="classic_kd_extra",
        law=_law,
    )
)  # fmt: skip
