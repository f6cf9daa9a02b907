"""Relational knowledge distillation (Park et al. 2019, eq. 4 to 9): distances and angles between samples of a batch.

With D_ij = ||x_i - x_j||^2 for the rows of a feature [N, D] and H = smooth L1 with its knee at 1 (F.smooth_l1_loss):

    distance   d_ij = sqrt(max(D_ij, eps)), d_ii = 0, divided by its mean over i != j (squared: d_ij = max(D_ij, eps))
               mean over N^2 of H(d^s_ij - d^t_ij)
    angle      a_ijk = (x_j - x_i) . (x_k - x_i) / (||x_j - x_i|| ||x_k - x_i||) = (D_ij + D_ik - D_jk) r_ij r_ik / 2
               with r_ij = 1 / sqrt(D_ij), and r_ij = 0 where D_ij <= eps;  mean over N^3 of H(a^s_ijk - a^t_ijk)

    loss = distance_weight * distance + angle_weight * angle

Everything is a function of the N x N matrix of squared distances (by a_ijk the Gram matrix of what is left around each
vertex), so no N x N x D tensor of differences exists, and with h = H' the gradient is one matrix product:

    d loss / d D_ij   = sum_k h_ijk (r_ij r_ik - a_ijk / D_ij) - 1/2 sum_k h_kij r_ki r_kj      angle
                      + (g_ij - sum g d / (N (N - 1))) / (m 2 sqrt(D_ij))                       distance, m its mean
    d loss / d x      = L x,  L = 2 (diag(S 1) - S),  S = d loss / d D + its transpose

D is summed from differences, not from a matrix product: features whose mean is far larger than their spread lose no
digits, and equal rows have a distance of exactly 0. Pairs with D_ij <= eps count as one point: they get no gradient,
where the formula in single steps divides by their distance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "rkd_loss"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _squares(x: Tensor) -> Tensor:
    """[N, N] squared distances between rows, from their differences."""
    x = x.to(_wide(x.dtype))
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _inverse_root(squares: Tensor, eps: float) -> Tensor:
    near = squares <= eps
    return torch.where(near, 0, torch.where(near, 1, squares).rsqrt())


def _distance(squares_s: Tensor, squares_t: Tensor, squared: bool, eps: float) -> tuple[Tensor, Tensor]:
    """The distance part and its gradient by D_s."""
    pairs = len(squares_s) * (len(squares_s) - 1)
    lengths = [squares.clamp_min(eps) for squares in (squares_s, squares_t)]
    lengths = lengths if squared else [length.sqrt() for length in lengths]
    for length in lengths:
        length.fill_diagonal_(0)
    mean_s, mean_t = (length.sum() / pairs for length in lengths)
    difference = lengths[0] / mean_s - lengths[1] / mean_t
    h = difference.clamp(-1, 1)
    grad = (h - (h * lengths[0]).sum() / (mean_s * pairs)) / (mean_s * h.numel())
    slope = torch.ones_like(squares_s) if squared else _inverse_root(squares_s, eps) / 2
    loss = (h * difference - h.square() / 2).mean()
    return loss, torch.where(squares_s <= eps, 0, grad * slope)


def _angle(squares_s: Tensor, squares_t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The angle part and its gradient by D_s; some j at a time, so that N^3 numbers never stand in memory."""
    count = len(squares_s)
    root_s, root_t = (_inverse_root(squares, eps) for squares in (squares_s, squares_t))
    sums, grad = [], torch.zeros_like(squares_s)
    for j in torch.arange(count, device=squares_s.device).split(max(1, 2**22 // count**2)):
        weight_s, weight_t = (root[j].unsqueeze(2) * root for root in (root_s, root_t))  # [j, i, k]: symmetric roots
        cos_s, cos_t = (
            (squares[j].unsqueeze(2) + squares - squares[j].unsqueeze(1)) * weight / 2
            for squares, weight in ((squares_s, weight_s), (squares_t, weight_t))
        )
        h = (cos_s - cos_t).clamp(-1, 1)
        sums.append((h * (cos_s - cos_t) - h.square() / 2).sum())
        grad[:, j] += (h * (weight_s - cos_s * root_s[j].square().unsqueeze(2))).sum(2).T
        grad[j] -= (h * weight_s).sum(1) / 2
    return torch.stack(sums).sum() / count**3, grad / count**3


def _fill_forward(student, teacher, distance_weight, angle_weight, squared, eps, laplacian, loss) -> None:
    squares_s, squares_t = _squares(student), _squares(teacher)
    total, grad = torch.zeros_like(loss), torch.zeros_like(squares_s)
    parts = (distance_weight, _distance, (squared, eps)), (angle_weight, _angle, (eps,))
    for weight, part, options in parts:
        if weight != 0:
            value, slope = part(squares_s, squares_t, *options)
            total, grad = total + weight * value, grad + weight * slope
    grad = 2 * (grad + grad.T)
    laplacian.copy_(torch.diag(grad.sum(1)) - grad)
    loss.copy_(total)


_TRITON = "fastkd.ops.features.rkd_loss_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")


@custom_op("rkd_loss")
def _op(
    student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, squared: bool, eps: float
) -> tuple[Tensor, Tensor]:
    loss, laplacian = _outputs(student)
    forward(student, teacher, distance_weight, angle_weight, squared, eps, laplacian, loss)
    return loss, laplacian


def _outputs(student: Tensor) -> tuple[Tensor, Tensor]:
    options = dict(dtype=_wide(student.dtype), device=student.device)
    return torch.empty((), **options), torch.empty((student.shape[0], student.shape[0]), **options)


@_op.register_fake
def _(student, teacher, distance_weight, angle_weight, squared, eps):
    return _outputs(student)


@custom_op("rkd_loss_backward")
def _op_backward(grad_loss: Tensor, student: Tensor, laplacian: Tensor) -> Tensor:
    # The rows of L sum to 0, so any shift of x is allowed: without its mean the product loses no digits.
    with torch.autocast(student.device.type, enabled=False):
        x = student.to(laplacian.dtype)
        return (laplacian @ (x - x.mean(0)) * grad_loss).to(student.dtype)


@_op_backward.register_fake
def _(grad_loss, student, laplacian):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _autograd(ctx, grad_loss: Tensor, grad_laplacian):
    return _op_backward(grad_loss, *ctx.saved_tensors), *[None] * 5


_op.register_autograd(_autograd, setup_context=_setup_context)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """Relational knowledge distillation: the batch keeps the teacher's distances (up to scale) and angles.

    Args:
        student: [N, Ds] with N >= 2, floating.
        teacher: [N, Dt], any width; floating, its dtype may differ from the student's. Must not require grad.
        distance_weight: weight of the mean over N^2 pairs.
        angle_weight: weight of the mean over N^3 triples. 0 leaves the part out.
        squared: compare squared distances.
        eps: squared distance up to which two rows count as one point, without gradient.

    Returns:
        Scalar, float32 (float64 for float64 features). Invariant under rotation, shift and scale of either side.

    Raises:
        ValueError: fewer than 2 rows, no columns, other numbers of rows, eps <= 0, or a teacher that requires grad.
        TypeError: float64 on one side only.
    """
    _check.check_tensor(OP, "student", student, 2)
    _check.check_tensor(OP, "teacher", teacher, 2)
    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
    _check.check_same_device(OP, student=student, teacher=teacher)
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.shape[0] < 2 or feature.shape[1] < 1:
            _check.fail(OP, name, f"shape {tuple(feature.shape)}", "[N, D] with N >= 2", "one sample has no relations")
    if student.shape[0] != teacher.shape[0]:
        _check.fail(OP, "student", f"{student.shape[0]} rows", f"{teacher.shape[0]} like teacher")
    if not eps > 0:
        _check.fail(OP, "eps", eps, "a positive number")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        got = f"{teacher.dtype} with a student in {student.dtype}".replace("torch.", "")
        _check.fail(OP, "teacher", got, "float64 on both sides or on none", "cast one of them", TypeError)
    return _op(student, teacher, float(distance_weight), float(angle_weight), squared, float(eps))[0]


class RKDLoss(torch.nn.Module):
    """`rkd_loss` as a module; ``forward(student, teacher)``. Features with more dimensions are flattened to rows."""

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, squared: bool = False, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.options = dict(distance_weight=distance_weight, angle_weight=angle_weight, squared=squared, eps=eps)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_loss(student.flatten(1), teacher.flatten(1), **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _reference(student, teacher, *, distance_weight=25.0, angle_weight=50.0, squared=False, eps=1e-12) -> Tensor:
    """In single steps, with an N x N x D tensor of differences a side."""
    count, total = len(student), 0 * student.to(_wide(student.dtype)).sum()
    distances, angles = [], []
    for x in (student, teacher):
        x = x.to(_wide(x.dtype))
        edges = x.unsqueeze(0) - x.unsqueeze(1)  # [i, j] = x_j - x_i
        squares = edges.square().sum(2)
        near = squares <= eps
        safe = torch.where(near, 1, squares)
        angles.append(torch.where(near, 0, safe.rsqrt()).unsqueeze(2) * edges)
        length = safe if squared else safe.sqrt()
        length = torch.where(near, eps if squared else eps**0.5, length)
        length = length * (1 - torch.eye(count, dtype=x.dtype, device=x.device))
        distances.append(length / (length.sum() / (count * (count - 1))))
    if distance_weight:
        total = total + distance_weight * F.smooth_l1_loss(*distances)
    if angle_weight:
        total = total + angle_weight * F.smooth_l1_loss(*(e @ e.transpose(1, 2) for e in angles))
    return total


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    count = case["batch"]
    student = torch.randn(count, case["width"], generator=random)
    teacher = torch.randn(count, case.get("teacher_width", case["width"]), generator=random) + 1
    if case.get("twins"):  # equal rows in both, and a pair that is equal in the student alone
        student[1:3], teacher[1] = student[0], teacher[0]
    teacher_dtype = torch.float32 if case.get("teacher_float32") and dtype != torch.float64 else dtype
    return dict(
        student=student.to(device, dtype), teacher=teacher.to(device, teacher_dtype),
        distance_weight=case.get("distance_weight", 25.0), angle_weight=case.get("angle_weight", 50.0),
        squared=case.get("squared", False),
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """A scaled and shifted teacher is imitated perfectly; the order of the samples does not matter."""
    teacher = kwargs["teacher"]
    assert rkd_loss(**(kwargs | dict(student=2 * teacher + 0.5))) < 1e-6
    plain = rkd_loss(**kwargs)
    turned = rkd_loss(**(kwargs | dict(student=kwargs["student"].flip(0), teacher=teacher.flip(0))))
    torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-7)


def _bytes_moved(kwargs: dict) -> int:
    return 3 * tensor_bytes(kwargs["student"]) + tensor_bytes(kwargs["teacher"])


def _flops(kwargs: dict) -> int:
    count, width = kwargs["student"].shape
    angles = 22 * count**3 if kwargs["angle_weight"] else 0
    return angles + 3 * count**2 * (width + kwargs["teacher"].shape[1]) + 2 * count**2 * width


SPEC = register(
    OpSpec(
        name=OP,
        function=rkd_loss,
        reference=_reference,
        kernels=(forward,),
        build=_build,
        differentiable=("student",),
        cases={
            "both": dict(batch=7, width=8, teacher_width=11),
            "distance": dict(batch=6, width=5, angle_weight=0.0, teacher_float32=True),
            "squared": dict(batch=5, width=4, squared=True, angle_weight=0.0),
            "angle": dict(batch=19, width=33, distance_weight=0.0),
            "twins": dict(batch=6, width=5, twins=True),
        },
        space=dict(
            batch=(3, 9, 18), width=(4, 7, 70), teacher_width=(1, 16), distance_weight=(0.0, 1.0, 25.0),
            angle_weight=(0.0, 50.0), squared=(False, True), teacher_float32=(False, True), seed=tuple(range(3)),
        ),
        bench={"batch_128": dict(batch=128, width=512), "batch_64": dict(batch=64, width=256, teacher_width=512)},
        bytes_moved=_bytes_moved,
        flops=_flops,
        golden="classic_kd_rkd",
        law=_law,
    )
)  # fmt: skip
