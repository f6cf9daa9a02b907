"""DIST: relations between and within classes match by correlation (Huang et al., NeurIPS 2022, equations 8 to 10).

With Q = softmax(z / T), P = softmax(v / T) [N, C] and the Pearson correlation r(a, b) = a' . b' / (|a'| |b'|) of
centred vectors a' = a - mean(a), norms clamped at eps:

    loss = T^2 [ beta (1 - mean_n r(Q_n, P_n)) + gamma (1 - mean_c r(Q_:c, P_:c)) ]

    g      = d loss / d Q = -T^2 [ beta / N (p' - r q') / |Q_n'| + gamma / C (p' - r q') / |Q_:c'| ]
    d loss / d z = Q (g - sum_i Q g) / T                      q', p': centred vectors of length 1

Rows and columns each: where a norm is below eps, the divisor is a constant. The correlation is symmetric: the teacher's
gradient, where asked for, is the same with the sides exchanged. Columns need the whole batch, so softmax of both sides
is kept in between; the gradient is made in the same call, without the factor 1 / N, and scaled in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from .terms import wide as _wide

OP = "dist_loss"


def _centred(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centred vectors of length 1 (at most), their norms with the floor, whether they are above it."""
    x = x - x.mean(dim, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    floored = norm.clamp_min(eps)
    return x / floored, floored, norm >= eps


def _fill(student, teacher, beta, gamma, temperature, eps, grad_student, grad_teacher, loss) -> None:
    q, p = ((x.to(loss.dtype) / temperature).softmax(1) for x in (student, teacher))
    batch, classes = q.shape
    total, sides = 0.0, [0.0, 0.0]
    for dim, weight in ((1, beta / batch), (0, gamma / classes)):
        (a, *of_a), (b, *of_b) = _centred(q, dim, eps), _centred(p, dim, eps)
        correlation = (a * b).sum(dim, keepdim=True)
        total = total + weight * (1 - correlation).sum()
        for side, (own, other, (norm, above)) in enumerate(((a, b, of_a), (b, a, of_b))):
            sides[side] = sides[side] - weight * (other - torch.where(above, correlation * own, 0)) / norm
    loss.copy_(temperature**2 * total)
    for x, g, out in ((q, sides[0], grad_student), (p, sides[1], grad_teacher)):
        if out.numel():
            out.copy_(batch * temperature * x * (g - (x * g).sum(1, keepdim=True)))


forward = Kernel(OP, reference=_fill)


def _outputs(student: Tensor, teacher: Tensor, grad: bool, teacher_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=_wide(student.dtype), device=student.device)
    wanted = ((student, grad), (teacher, teacher_grad))
    grads = (torch.empty(x.shape if there else (0,), dtype=x.dtype, device=x.device) for x, there in wanted)
    return loss, *grads


@custom_op("dist_loss")
def _op(
    student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float, eps: float, grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss, *grads = _outputs(student, teacher, grad, teacher_grad)
    forward(student, teacher, beta, gamma, temperature, eps, *grads, loss)
    return loss, *grads


@_op.register_fake
def _(student, teacher, beta, gamma, temperature, eps, grad, teacher_grad):
    return _outputs(student, teacher, grad, teacher_grad)


@custom_op("dist_loss_backward")
def _op_backward(grad_loss: Tensor, grad: Tensor) -> Tensor:
    # In one dimension the scale keeps its dtype beside a 16-bit gradient: rounded once, at the end.
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    return torch.mul(grad, (grad_loss / max(grad.shape[0], 1))[None], out=out)


@_op_backward.register_fake
def _(grad_loss, grad):
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])


def _autograd(ctx, grad_loss: Tensor, *_):
    return *(_op_backward(grad_loss, g) if g.numel() else None for g in ctx.saved_tensors), *[None] * 6


_op.register_autograd(_autograd, setup_context=_setup_context)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
    teacher_grad: bool = False,
) -> Tensor:
    """DIST: one minus the correlation of class probabilities, within rows and within columns of the batch.

    Args:
        student_logits, teacher_logits: [N, C], floating, any strides. The teacher must not require grad.
        beta: weight of the correlation over the classes of an image.
        gamma: weight of the correlation over the images of a class; it needs a batch that says something of a class.
        temperature: divides both logits; the loss is multiplied by its square.
        eps: least norm of a centred vector.
        teacher_grad: lets the teacher's logits require grad, and gives them one.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that differ, no rows, temperature <= 0, a teacher that requires grad without teacher_grad.
        TypeError: not floating logits, or float64 on one side only.
    """
    _check.check_tensor(OP, "student_logits", student_logits, 2)
    _check.check_tensor(OP, "teacher_logits", teacher_logits, 2)
    _check.check_shape(OP, "teacher_logits", teacher_logits, tuple(student_logits.shape), "like student_logits")
    _check.check_same_device(OP, student_logits=student_logits, teacher_logits=teacher_logits)
    if not teacher_grad:
        _check.check_no_grad(OP, "teacher_logits", teacher_logits, "a distillation loss must not train the teacher")
    if student_logits.numel() == 0:
        shape = f"shape {tuple(student_logits.shape)}"
        _check.fail(OP, "student_logits", shape, "at least one row", "the mean of nothing is undefined")
    if not temperature > 0:
        _check.fail(OP, "temperature", temperature, "a positive number")
    if (student_logits.dtype == torch.float64) != (teacher_logits.dtype == torch.float64):
        got = f"{teacher_logits.dtype} with student_logits in {student_logits.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher_logits", got, "float64 on both sides or on none", "cast one of them", TypeError)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (student_logits, teacher_logits)]
    return _op(student_logits, teacher_logits, beta, gamma, temperature, eps, *wanted)[0]


class DISTLoss(torch.nn.Module):
    """`dist_loss` as a module; ``forward(student_logits, teacher_logits)``."""

    def __init__(
        self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, *, eps: float = 1e-8,
        teacher_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = dict(beta=beta, gamma=gamma, temperature=temperature, eps=eps, teacher_grad=teacher_grad)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return dist_loss(student_logits, teacher_logits, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(
    student_logits, teacher_logits, *, beta=1.0, gamma=1.0, temperature=1.0, eps=1e-8, teacher_grad=False
) -> Tensor:
    wide = _wide(student_logits.dtype)
    q, p = ((x.to(wide) / temperature).softmax(1) for x in (student_logits, teacher_logits))

    def correlation(dim: int) -> Tensor:
        centred = (x - x.mean(dim, keepdim=True) for x in (q, p))
        return torch.cosine_similarity(*centred, dim=dim, eps=eps).mean()

    return temperature**2 * (beta * (1 - correlation(1)) + gamma * (1 - correlation(0)))


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    teacher = 2 * torch.randn(case["batch"], case["classes"], generator=random)
    student = 0.5 * teacher + torch.randn(case["batch"], case["classes"], generator=random)
    options = {name: case[name] for name in ("beta", "gamma", "temperature") if name in case}
    return dict(student_logits=student.to(device, dtype), teacher_logits=teacher.to(device, dtype), **options)


def _law(kwargs: dict) -> None:
    """Without loss where the sides are equal; the order of the rows does not matter."""
    z, v = kwargs["student_logits"], kwargs["teacher_logits"]
    scale = kwargs.get("temperature", 1.0) ** 2
    loss = dist_loss(**kwargs)
    torch.testing.assert_close(dist_loss(**{**kwargs, "student_logits": z.flip(0), "teacher_logits": v.flip(0)}), loss,
                               rtol=1e-5, atol=1e-5 * scale)  # fmt: skip
    assert dist_loss(**{**kwargs, "teacher_logits": z}).abs() < 1e-4 * scale


SPEC = register(
    OpSpec(
        name=OP,
        function=dist_loss,
        reference=_reference,
        kernels=(forward,),
        build=_build,
        differentiable=("student_logits",),
        cases={
            "both": dict(batch=6, classes=10, temperature=2.0),
            "rows": dict(batch=3, classes=41, gamma=0.0),
            "columns": dict(batch=9, classes=5, beta=0.0),
            "many": dict(batch=33, classes=70, temperature=4.0),
        },
        space=dict(
            batch=(3, 4, 17), classes=(3, 10, 65), beta=(0.0, 1.0), gamma=(0.5, 2.0), temperature=(1.0, 4.0),
            seed=tuple(range(5)),
        ),
        bench={"imagenet": dict(batch=256, classes=1000), "cifar": dict(batch=128, classes=100, temperature=4.0)},
        bytes_moved=lambda k: 3 * tensor_bytes(k["student_logits"], k["teacher_logits"]) // 2,
        flops=lambda k: 60 * k["student_logits"].numel(),
        golden="classic_kd_extra",
        law=_law,
    )
)  # fmt: skip
