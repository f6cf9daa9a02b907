"""Probabilistic knowledge transfer (Passalis & Tefas 2018, eq. 3 to 7): the student keeps who is close to whom.

    u = f / (||f||_2 + eps),  K = (1 + u u^T) / 2, each row divided by its sum
    loss = mean over N^2 of K_t log((K_t + eps) / (K_s + eps))                        eps = 1e-7

The cost is in the matrix products (`gram`); the rest works on N x N numbers and is plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._spec import OpSpec, register, tensor_bytes
from .gram import backward, forward, gram
from .sp_loss import build_rows, check_rows

OP = "pkt_loss"


def _neighbours(unit_gram: Tensor) -> Tensor:
    similar = (1 + unit_gram) / 2
    return similar / similar.sum(1, keepdim=True)


def _unit_rows(x: Tensor, eps: float) -> Tensor:
    # A row of zeros has no direction: a constant, where the root in the norm would give NaN.
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)


def pkt_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer; usual weight 30000.

    Args:
        student: [N, ...], floating; everything behind the first dimension is one row.
        teacher: [N, ...] with other features per sample as it likes; floating. Must not require grad.
        eps: added to norms and probabilities, > 0.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: other numbers of rows, nothing to compare, eps <= 0, or a teacher that requires grad.
        TypeError: float64 on one side only.
    """
    if not eps > 0:
        _check.fail(OP, "eps", eps, "a positive number")
    student, teacher = (_neighbours(gram(_unit_rows(x, eps))) for x in check_rows(OP, student, teacher))
    return (teacher * torch.log((teacher + eps) / (student + eps))).mean()


class PKTLoss(torch.nn.Module):
    """`pkt_loss` as a module; ``forward(student, teacher)``."""

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt_loss(student, teacher, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _reference(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    units = (_unit_rows(x.flatten(1), eps) for x in (student, teacher))
    student, teacher = (_neighbours(u @ u.T) for u in units)
    return (teacher * torch.log((teacher + eps) / (student + eps))).mean()


def _law(kwargs: dict) -> None:
    """A rotated and scaled teacher is imitated perfectly."""
    teacher = kwargs["teacher"]
    assert abs(pkt_loss(-2 * teacher.flip(1), teacher)) < 1e-6


SPEC = register(
    OpSpec(
        name=OP,
        function=pkt_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=build_rows,
        differentiable=("student",),
        cases={
            "rows": dict(batch=7, width=6, teacher_width=9),
            "maps": dict(batch=5, width=3, size=(2, 3), teacher_float32=True),
        },
        space=dict(
            batch=(3, 4, 9), width=(4, 17), teacher_width=(2, 30), teacher_float32=(False, True), seed=tuple(range(3)),
        ),
        bench={"batch_256": dict(batch=256, width=512)},
        bytes_moved=lambda k: 3 * tensor_bytes(k["student"]) + tensor_bytes(k["teacher"]),
        flops=lambda k: 2 * len(k["student"]) * (2 * k["student"].numel() + k["teacher"].numel()),
        golden="classic_kd_feature",
        law=_law,
    )
)  # fmt: skip
