"""Triton kernels of `gather_whiten_smooth_l1`: one program per student row finds and normalises its teacher row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WHITEN, L2_NORM, BN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)  # order of NORMS; none does nothing
SMOOTH_L1, L2 = tl.constexpr(0), tl.constexpr(1)  # order of LOSSES; the rest is l1


@triton.jit
def _difference(student, teacher, ids, statistics, tokens, width, visible, num_prefix, s_b, s_t, s_c, t_b, t_t, t_c,
                i_b, i_k, NORM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # One row of the student minus its normalised teacher row; 0 beyond the width.
    row = tl.program_id(0).to(tl.int64)
    b, k = row // tokens, row % tokens
    patch = k - (tokens - visible)
    seen = tl.load(ids + b * i_b + tl.maximum(patch, 0) * i_k, mask=patch >= 0, other=0)
    source = tl.where(patch >= 0, num_prefix + seen, k)
    i = tl.arange(0, BLOCK)
    inside = i < width
    y = tl.load(student + b * s_b + k * s_t + i * s_c, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + b * t_b + source * t_t + i * t_c, mask=inside, other=0.0).to(tl.float32)
    if NORM == WHITEN:
        t = tl.where(inside, t - tl.sum(t, axis=0) / width, 0.0)
        t *= 1.0 / tl.sqrt(tl.sum(t * t, axis=0) / width + 1e-5)
    elif NORM == L2_NORM:
        t *= 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, axis=0)), 1e-12)
    elif NORM == BN:
        t = (t - tl.load(statistics).to(tl.float32)) * tl.load(statistics + 1).to(tl.float32)
    return row, i, tl.where(inside, y - t, 0.0)


@triton.jit
def _forward_kernel(student, teacher, ids, statistics, partial, tokens, width, visible, num_prefix,
                    s_b, s_t, s_c, t_b, t_t, t_c, i_b, i_k, scale,
                    NORM: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, _, d = _difference(student, teacher, ids, statistics, tokens, width, visible, num_prefix, s_b, s_t, s_c, t_b,
                            t_t, t_c, i_b, i_k, NORM, BLOCK)  # fmt: skip
    size = tl.abs(d)
    if KIND == SMOOTH_L1:
        size = tl.where(size < 1.0, d * d, 2.0 * size - 1.0)
    elif KIND == L2:
        size = d * d
    tl.store(partial + row, tl.sum(size, axis=0) * scale)


@triton.jit
def _backward_kernel(grad_loss, student, teacher, ids, statistics, grad_student, tokens, width, visible, num_prefix,
                     s_b, s_t, s_c, t_b, t_t, t_c, i_b, i_k, scale,
                     NORM: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, i, d = _difference(student, teacher, ids, statistics, tokens, width, visible, num_prefix, s_b, s_t, s_c, t_b,
                            t_t, t_c, i_b, i_k, NORM, BLOCK)  # fmt: skip
    if KIND == SMOOTH_L1:
        slope = 2.0 * tl.minimum(tl.maximum(d, -1.0), 1.0)
    elif KIND == L2:
        slope = 2.0 * d
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    g = slope * (tl.load(grad_loss).to(tl.float32) * scale)
    tl.store(grad_student + row * width + i, g.to(grad_student.dtype.element_ty), mask=i < width)


def _arguments(student, teacher, ids, num_prefix: int) -> tuple:
    _, tokens, width = student.shape
    strides = (*student.stride(), *teacher.stride(), *ids.stride())
    return tokens, width, ids.shape[1], num_prefix, *strides, 1.0 / student.numel()


def _options(student: torch.Tensor, norm: int, kind: int) -> dict:
    block = triton.next_power_of_2(student.shape[2])
    # No fusion of the norm's product into the difference: the target itself must have exactly no loss.
    return dict(NORM=norm, KIND=kind, BLOCK=block, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=False)


def forward(student, teacher, ids, statistics, norm: int, kind: int, num_prefix: int, loss: torch.Tensor) -> None:
    """Fills the scalar loss; a partial sum per row, then one ordered reduction (no atomics)."""
    rows = student.shape[0] * student.shape[1]
    partial = torch.empty(rows, dtype=torch.float32, device=student.device)
    _forward_kernel[(rows,)](
        student, teacher, ids, statistics, partial, *_arguments(student, teacher, ids, num_prefix),
        **_options(student, norm, kind),
    )  # fmt: skip
    torch.sum(partial, dim=0, out=loss)


def backward(
    grad_loss, student, teacher, ids, statistics, norm: int, kind: int, num_prefix: int, grad_student: torch.Tensor
) -> None:
    """Fills grad_student, contiguous [B, C + n, D]."""
    _backward_kernel[(student.shape[0] * student.shape[1],)](
        grad_loss, student, teacher, ids, statistics, grad_student, *_arguments(student, teacher, ids, num_prefix),
        **_options(student, norm, kind),
    )  # fmt: skip
