"""Triton kernels of `feature_alignment_loss`: one program per row, student and teacher rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

L1, L2, SMOOTH_L1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # order of LOSSES; the rest is cosine


@triton.jit
def _rows(student, teacher, tokens, width, s_b, s_t, s_c, t_b, t_t, t_c, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    # Both rows, normalised, and the norm of the student's.
    row = tl.program_id(0).to(tl.int64)
    b, k = row // tokens, row % tokens
    i = tl.arange(0, BLOCK)
    u = tl.load(student + b * s_b + k * s_t + i * s_c, mask=i < width, other=0.0).to(tl.float32)
    v = tl.load(teacher + b * t_b + k * t_t + i * t_c, mask=i < width, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(u * u, axis=0))
    if NORMALIZE:
        u *= 1.0 / tl.maximum(norm, 1e-12)
        v *= 1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, axis=0)), 1e-12)
    return row, i, u, v, norm


@triton.jit
def _forward_kernel(student, teacher, partial, tokens, width, s_b, s_t, s_c, t_b, t_t, t_c, beta, scale,
                    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, i, u, v, _ = _rows(student, teacher, tokens, width, s_b, s_t, s_c, t_b, t_t, t_c, NORMALIZE, BLOCK)
    d = u - v
    if KIND == L1:
        share = tl.sum(tl.abs(d), axis=0)
    elif KIND == L2:
        share = tl.sum(d * d, axis=0)
    elif KIND == SMOOTH_L1:
        size = tl.abs(d)
        value = tl.where(size < beta, 0.5 * d * d / beta, size - 0.5 * beta)
        share = tl.sum(tl.where(i < width, value, 0.0), axis=0)
    else:
        share = 1.0 - tl.sum(u * v, axis=0)
    tl.store(partial + row, share * scale)


@triton.jit
def _backward_kernel(grad_loss, student, teacher, grad_student, tokens, width, s_b, s_t, s_c, t_b, t_t, t_c, beta,
                     scale, KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, i, u, v, norm = _rows(student, teacher, tokens, width, s_b, s_t, s_c, t_b, t_t, t_c, NORMALIZE, BLOCK)
    d = u - v
    if KIND == L1:
        g = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    elif KIND == L2:
        g = 2.0 * d
    elif KIND == SMOOTH_L1:
        g = tl.minimum(tl.maximum(d / beta, -1.0), 1.0)
    else:
        g = -v
    g *= tl.load(grad_loss).to(tl.float32) * scale
    if NORMALIZE:
        along = tl.where(norm < 1e-12, 0.0, tl.sum(u * g, axis=0))
        g = (g - u * along) * (1.0 / tl.maximum(norm, 1e-12))
    tl.store(grad_student + row * width + i, g.to(grad_student.dtype.element_ty), mask=i < width)


def _options(width: int, kind: int, normalize: bool) -> dict:
    block = triton.next_power_of_2(width)
    # No fusion of a product into the difference: equal rows must differ by exactly 0, where the gradient of l1 is 0.
    return dict(
        KIND=kind, NORMALIZE=normalize, BLOCK=block, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=False
    )


def _scalars(student: torch.Tensor, teacher: torch.Tensor, kind: int, beta: float) -> tuple:
    batch, tokens, width = student.shape
    count = batch * tokens * (1 if kind > SMOOTH_L1.value else width)
    return tokens, width, *student.stride(), *teacher.stride(), beta, 1.0 / count


def forward(student, teacher, kind: int, normalize: bool, beta: float, loss: torch.Tensor) -> None:
    """Fills the scalar loss; a partial sum per row, then one ordered reduction (no atomics)."""
    rows = student.shape[0] * student.shape[1]
    partial = torch.empty(rows, dtype=torch.float32, device=student.device)
    _forward_kernel[(rows,)](
        student, teacher, partial, *_scalars(student, teacher, kind, beta),
        **_options(student.shape[2], kind, normalize),
    )  # fmt: skip
    torch.sum(partial, dim=0, out=loss)


def backward(grad_loss, student, teacher, kind: int, normalize: bool, beta: float, grad_student: torch.Tensor) -> None:
    """Fills grad_student, contiguous [B, T, D]."""
    _backward_kernel[(student.shape[0] * student.shape[1],)](
        grad_loss, student, teacher, grad_student, *_scalars(student, teacher, kind, beta),
        **_options(student.shape[2], kind, normalize),
    )  # fmt: skip
