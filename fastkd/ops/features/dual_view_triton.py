"""Triton kernels of `dual_view_loss`: tiles of positions x channels; both views of a tile share the teacher's numbers.

Sums over channels belong to programs that own some positions, sums over positions to programs that own some channels.
Either reads its tiles twice, once for the sum (mean, norm, mean of the gradient) and once, from the cache, for what
needs it. Tiles are 2-D, so that token-major and channel-major features are both read in whole sectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # positions of a program that sums over channels; tiles of 8 x 128
COLUMNS = 64  # channels of a program that sums over positions; tiles of 16 x 64


@triton.jit
def _tile(x, n, c, positions, channels, s_n, s_c):
    inside = (n < positions)[:, None] & (c < channels)[None, :]
    at = n[:, None].to(tl.int64) * s_n + c[None, :].to(tl.int64) * s_c
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _line(mean, c, channels):
    return tl.load(mean + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def _inverse_norms(x, mean, n, positions, channels, s_n, s_c, CENTRED: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    # 1 / max(norm, 1e-12) of ROWS positions. Columns beyond the last are 0 on both sides.
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = _tile(x, n, c, positions, channels, s_n, s_c)
        if CENTRED:
            value -= _line(mean, c, channels)
        squares += value * value
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), 1e-12)


@triton.jit
def _mean_kernel(x, mean, positions, channels, s_b, s_n, s_c, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, positions, ROWS):
        sums += _tile(x + b * s_b, start + tl.arange(0, ROWS), c, positions, channels, s_n, s_c)
    tl.store(mean + b * channels + c, tl.sum(sums, axis=0) / positions, mask=c < channels)


@triton.jit
def _norms_kernel(teacher, mean, inverse, all_rows, positions, channels, s_b, s_n, s_c, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x, m = teacher + b * s_b, mean + b * channels
    to = inverse + b * positions + n
    plain = _inverse_norms(x, m, n, positions, channels, s_n, s_c, False, ROWS, BLOCK)
    tl.store(to, plain, mask=n < positions)
    centred = _inverse_norms(x, m, n, positions, channels, s_n, s_c, True, ROWS, BLOCK)
    tl.store(to + all_rows, centred, mask=n < positions)


@triton.jit
def _forward_kernel(plain, alt, teacher, mean, teacher_mean, teacher_inverse, rows, partial, all_rows, positions,
                    channels, p_b, p_n, p_c, a_b, a_n, a_c, t_b, t_n, t_c, scale_plain, scale_alt,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = n < positions
    row = b * positions + n
    x, y, t = plain + b * p_b, alt + b * a_b, teacher + b * t_b
    m, tm = mean + b * channels, teacher_mean + b * channels
    inverse_x = _inverse_norms(x, m, n, positions, channels, p_n, p_c, False, ROWS, BLOCK)
    inverse_y = _inverse_norms(y, m, n, positions, channels, a_n, a_c, True, ROWS, BLOCK)
    teacher_x = tl.load(teacher_inverse + row, mask=inside, other=0.0)[:, None]
    teacher_y = tl.load(teacher_inverse + all_rows + row, mask=inside, other=0.0)[:, None]
    square_x = tl.zeros([ROWS, BLOCK], tl.float32)
    square_y = tl.zeros([ROWS, BLOCK], tl.float32)
    along_x = tl.zeros([ROWS, BLOCK], tl.float32)
    along_y = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = _tile(t, n, c, positions, channels, t_n, t_c)
        u = _tile(x, n, c, positions, channels, p_n, p_c) * inverse_x[:, None]
        w = (_tile(y, n, c, positions, channels, a_n, a_c) - _line(m, c, channels)) * inverse_y[:, None]
        d = u - z * teacher_x
        e = w - (z - _line(tm, c, channels)) * teacher_y
        square_x += d * d
        along_x += u * d
        square_y += e * e
        along_y += w * e
    # Rows beyond the last hold zeros minus the mean: they count for nothing.
    loss_x = tl.sum(tl.where(inside, tl.sum(square_x, axis=1), 0.0), axis=0) * scale_plain
    loss_y = tl.sum(tl.where(inside, tl.sum(square_y, axis=1), 0.0), axis=0) * scale_alt
    program = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + program, loss_x)
    tl.store(partial + tl.num_programs(0) * tl.num_programs(1) + program, loss_y)
    # Below the floor of the norm the divisor is a constant: nothing to project out.
    tl.store(rows + row, inverse_x, mask=inside)
    tl.store(rows + all_rows + row, inverse_y, mask=inside)
    tl.store(rows + 2 * all_rows + row, tl.where(inverse_x < 1e12, tl.sum(along_x, axis=1), 0.0), mask=inside)
    tl.store(rows + 3 * all_rows + row, tl.where(inverse_y < 1e12, tl.sum(along_y, axis=1), 0.0), mask=inside)


@triton.jit
def _gradient(x, t, mean, teacher_mean, rows, teacher_inverse, n, c, positions, channels, all_rows, s_n, s_c, t_n, t_c,
              VIEW: tl.constexpr):  # fmt: skip
    # (d - u (u . d)) / ||s|| on one tile; zero outside of it. VIEW 0 is plain, 1 is centred.
    inside = n < positions
    inverse = tl.load(rows + VIEW * all_rows + n, mask=inside, other=0.0)[:, None]
    along = tl.load(rows + (2 + VIEW) * all_rows + n, mask=inside, other=0.0)[:, None]
    theirs = tl.load(teacher_inverse + VIEW * all_rows + n, mask=inside, other=0.0)[:, None]
    s = _tile(x, n, c, positions, channels, s_n, s_c)
    z = _tile(t, n, c, positions, channels, t_n, t_c)
    if VIEW == 1:
        s -= _line(mean, c, channels)
        z -= _line(teacher_mean, c, channels)
    u = s * inverse
    return (u - z * theirs - u * along) * inverse


@triton.jit
def _backward_kernel(grad_losses, plain, alt, teacher, mean, teacher_mean, teacher_inverse, rows, grad_plain, grad_alt,
                     all_rows, positions, channels, p_b, p_n, p_c, a_b, a_n, a_c, t_b, t_n, t_c, scale_plain, scale_alt,
                     PAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y, t = plain + b * p_b, alt + b * a_b, teacher + b * t_b
    m, tm = mean + b * channels, teacher_mean + b * channels
    own, theirs = rows + b * positions, teacher_inverse + b * positions
    scale_x = tl.load(grad_losses) * scale_plain
    scale_y = tl.load(grad_losses + 1) * scale_alt
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, positions, ROWS):
        n = start + tl.arange(0, ROWS)
        sums += _gradient(y, t, m, tm, own, theirs, n, c, positions, channels, all_rows, a_n, a_c, t_n, t_c, 1)
    lost = tl.sum(sums, axis=0)[None, :] / positions
    for start in range(0, positions, ROWS):
        n = start + tl.arange(0, ROWS)
        first = _gradient(x, t, m, tm, own, theirs, n, c, positions, channels, all_rows, p_n, p_c, t_n, t_c, 0)
        second = _gradient(y, t, m, tm, own, theirs, n, c, positions, channels, all_rows, a_n, a_c, t_n, t_c, 1)
        first *= scale_x
        second = (second - lost) * scale_y
        inside = (n < positions)[:, None] & (c < channels)[None, :]
        at = (b * positions + n[:, None]) * channels + c[None, :]
        if PAIR:
            tl.store(grad_plain + at, first.to(grad_plain.dtype.element_ty), mask=inside)
            tl.store(grad_alt + at, second.to(grad_alt.dtype.element_ty), mask=inside)
        else:
            tl.store(grad_plain + at, (first + second).to(grad_plain.dtype.element_ty), mask=inside)


def _by_channels(batch: int, channels: int) -> tuple[tuple[int, int], dict]:
    """Grid and options of a program per image and block of channels."""
    return (batch, triton.cdiv(channels, COLUMNS)), dict(ROWS=16, BLOCK=COLUMNS, num_warps=4, enable_fp_fusion=True)


def _by_positions(batch: int, positions: int) -> tuple[tuple[int, int], dict]:
    """Grid and options of a program per image and group of positions."""
    return (batch, triton.cdiv(positions, ROWS)), dict(ROWS=ROWS, BLOCK=128, num_warps=4, enable_fp_fusion=True)


def _fill_mean(x: Tensor, mean: Tensor) -> None:
    batch, positions, channels = x.shape
    grid, options = _by_channels(batch, channels)
    _mean_kernel[grid](x, mean, positions, channels, *x.stride(), **options)


def target(teacher: Tensor, mean: Tensor, inverse_norms: Tensor) -> None:
    """Fills mean [B, C] and inverse_norms [2, B, N]."""
    batch, positions, channels = teacher.shape
    _fill_mean(teacher, mean)
    grid, options = _by_positions(batch, positions)
    _norms_kernel[grid](
        teacher, mean, inverse_norms, batch * positions, positions, channels, *teacher.stride(), **options
    )  # fmt: skip


def forward(
    plain, alt, teacher, teacher_mean, teacher_inverse, alpha_plain, alpha_alt, mean, rows, losses: Tensor
) -> None:
    """Fills mean [B, C], rows [2, 2, B, N] and losses [2]; a partial sum per program, added in order (no atomics)."""
    alt = plain if alt is None else alt
    batch, positions, channels = plain.shape
    _fill_mean(alt, mean)
    grid, options = _by_positions(batch, positions)
    partial = torch.empty(2, grid[0] * grid[1], dtype=torch.float32, device=plain.device)
    _forward_kernel[grid](
        plain, alt, teacher, mean, teacher_mean, teacher_inverse, rows, partial, batch * positions, positions, channels,
        *plain.stride(), *alt.stride(), *teacher.stride(), alpha_plain / batch, alpha_alt / batch, **options,
    )  # fmt: skip
    torch.sum(partial, dim=1, out=losses)


def backward(
    grad_losses, plain, alt, teacher, teacher_mean, teacher_inverse, mean, rows, alpha_plain, alpha_alt, grad_alt,
    grad_plain: Tensor,
) -> None:  # fmt: skip
    """Fills grad_plain and, for a pair, grad_alt: contiguous [B, N, C]."""
    pair = alt is not None
    alt = alt if pair else plain
    batch, positions, channels = plain.shape
    grid, options = _by_channels(batch, channels)
    _backward_kernel[grid](
        grad_losses, plain, alt, teacher, mean, teacher_mean, teacher_inverse, rows, grad_plain,
        grad_alt if pair else grad_plain, batch * positions, positions, channels, *plain.stride(), *alt.stride(),
        *teacher.stride(), 2 * alpha_plain / batch, 2 * alpha_alt / batch, PAIR=pair, **options,
    )  # fmt: skip
