"""DIST in the steps in which the released code takes them: softmax, centring and cosines of rows, then of columns."""

from __future__ import annotations

from torch import Tensor


def _cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1).clamp_min(eps) * b.norm(dim=1).clamp_min(eps))


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    return _cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1), eps)


def published(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """Arguments of `fastkd.ops.dist_loss`."""
    student, teacher = ((x / temperature).softmax(dim=1) for x in (student_logits, teacher_logits))
    between = temperature**2 * (1 - _pearson(student, teacher, eps).mean())
    within = temperature**2 * (1 - _pearson(student.transpose(0, 1), teacher.transpose(0, 1), eps).mean())
    return beta * between + gamma * within
