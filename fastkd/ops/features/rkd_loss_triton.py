"""Triton kernels of `rkd_loss`: squared distances from differences, then rows of distances and tiles of triples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN = dict(num_warps=4, enable_fp_fusion=False)


@triton.jit
def _squares_kernel(x, out, n, width, s_n, s_c, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Row i against ROWS rows j: sums of squared differences, exactly 0 for equal rows.
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    others = x + j[:, None].to(tl.int64) * s_n
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mine = tl.load(x + i * s_n + c * s_c, mask=c < width, other=0.0).to(tl.float32)
        inside = (j[:, None] < n) & (c[None, :] < width)
        theirs = tl.load(others + c[None, :] * s_c, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, theirs - mine[None, :], 0.0)
        total += d * d
    tl.store(out + i * n + j, tl.sum(total, axis=1), mask=j < n)


@triton.jit
def _lengths(squares, i, j, n, eps, SQUARED: tl.constexpr):
    # Squared distances of row i, and the distances in use: 0 on the diagonal.
    square = tl.load(squares + i * n + j, mask=j < n, other=0.0)
    length = tl.maximum(square, eps)
    if not SQUARED:
        length = tl.sqrt(length)
    return square, tl.where((j < n) & (j != i), length, 0.0)


@triton.jit
def _total(values, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(values + start + lane, mask=start + lane < n, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _row_sums_kernel(squares_s, squares_t, sums, n, eps, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    of_s = tl.zeros((BLOCK,), dtype=tl.float32)
    of_t = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        _, s = _lengths(squares_s, i, j, n, eps, SQUARED)
        _, t = _lengths(squares_t, i, j, n, eps, SQUARED)
        of_s += s
        of_t += t
    tl.store(sums + i, tl.sum(of_s, axis=0))
    tl.store(sums + n + i, tl.sum(of_t, axis=0))


@triton.jit
def _distance_kernel(squares_s, squares_t, sums, partial, n, eps, weight, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    # sums: [sum d_s, sum d_t, sum h d_s] of every row; this kernel adds the third.
    i = tl.program_id(0)
    pairs = n * (n - 1)
    mean_s = _total(sums, n, BLOCK) / pairs
    mean_t = _total(sums + n, n, BLOCK) / pairs
    loss = tl.zeros((BLOCK,), dtype=tl.float32)
    along = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        _, s = _lengths(squares_s, i, j, n, eps, SQUARED)
        _, t = _lengths(squares_t, i, j, n, eps, SQUARED)
        d = s / mean_s - t / mean_t
        h = tl.minimum(tl.maximum(d, -1.0), 1.0)
        loss += h * (d - 0.5 * h)
        along += h * s
    tl.store(sums + 2 * n + i, tl.sum(along, axis=0))
    tl.store(partial + i, tl.sum(loss, axis=0) * (weight / (n * n)))


@triton.jit
def _inverse_root(square, eps):
    return tl.where(square <= eps, 0.0, 1.0 / tl.sqrt(tl.where(square <= eps, 1.0, square)))


@triton.jit
def _angle_kernel(squares_s, squares_t, by_edge, by_far, partial, n, eps, weight, VERTICES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    # One j and BLOCK k against all vertices i: gradients by D_ij (a share per block of k) and by D_jk.
    j, chunk = tl.program_id(0), tl.program_id(1)
    k = chunk * BLOCK + tl.arange(0, BLOCK)
    far_s = tl.load(squares_s + j * n + k, mask=k < n, other=0.0)
    far_t = tl.load(squares_t + j * n + k, mask=k < n, other=0.0)
    loss = tl.zeros((VERTICES, BLOCK), dtype=tl.float32)
    far = tl.zeros((VERTICES, BLOCK), dtype=tl.float32)
    for start in range(0, n, VERTICES):
        i = start + tl.arange(0, VERTICES)
        edge_s = tl.load(squares_s + j * n + i, mask=i < n, other=0.0)
        edge_t = tl.load(squares_t + j * n + i, mask=i < n, other=0.0)
        at = i[:, None] * n + k[None, :]
        inside = (i[:, None] < n) & (k[None, :] < n)
        next_s = tl.load(squares_s + at, mask=inside, other=0.0)
        next_t = tl.load(squares_t + at, mask=inside, other=0.0)
        root_s, root_t = _inverse_root(edge_s, eps)[:, None], _inverse_root(edge_t, eps)[:, None]
        w_s = root_s * _inverse_root(next_s, eps)  # 0 outside: there `next` is 0
        w_t = root_t * _inverse_root(next_t, eps)
        cos_s = (edge_s[:, None] + next_s - far_s[None, :]) * w_s * 0.5
        cos_t = (edge_t[:, None] + next_t - far_t[None, :]) * w_t * 0.5
        d = cos_s - cos_t
        h = tl.minimum(tl.maximum(d, -1.0), 1.0)
        loss += h * (d - 0.5 * h)
        far += h * w_s
        edge = tl.sum(h * (w_s - cos_s * root_s * root_s), axis=1)
        tl.store(by_edge + (chunk * n + j) * n + i, edge, mask=i < n)
    scale = weight / (n * 1.0 * n * n)
    tl.store(by_far + j * n + k, tl.sum(far, axis=0) * -0.5, mask=k < n)
    tl.store(partial + j * tl.num_programs(1) + chunk, tl.sum(tl.sum(loss, axis=1), axis=0) * scale)


@triton.jit
def _laplacian_kernel(squares_s, squares_t, sums, angles, laplacian, n, eps, distance_weight, angle_weight,
                      SQUARED: tl.constexpr, DISTANCE: tl.constexpr, ANGLE: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    # Row i of 2 (diag(S 1) - S): S off the diagonal first, its sum at last.
    i = tl.program_id(0)
    count = tl.zeros((BLOCK,), dtype=tl.float32)
    if DISTANCE:
        pairs = n * (n - 1)
        mean_s = _total(sums, n, BLOCK) / pairs
        mean_t = _total(sums + n, n, BLOCK) / pairs
        along = _total(sums + 2 * n, n, BLOCK) / (mean_s * pairs)
        distance_scale = distance_weight / (mean_s * (n * n))
    angle_scale = angle_weight / (n * 1.0 * n * n)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = tl.zeros((BLOCK,), dtype=tl.float32)
        if DISTANCE:
            square, length_s = _lengths(squares_s, i, j, n, eps, SQUARED)
            _, length_t = _lengths(squares_t, i, j, n, eps, SQUARED)
            d = length_s / mean_s - length_t / mean_t
            slope = (tl.minimum(tl.maximum(d, -1.0), 1.0) - along) * distance_scale
            if SQUARED:
                slope *= 2.0
            else:
                slope *= _inverse_root(square, eps)
            s += tl.where(square <= eps, 0.0, slope)
        if ANGLE:
            s += tl.load(angles + i * n + j, mask=j < n, other=0.0) * angle_scale
            s += tl.load(angles + j * n + i, mask=j < n, other=0.0) * angle_scale
        s = tl.where((j < n) & (j != i), 2.0 * s, 0.0)
        count += s
        tl.store(laplacian + i * n + j, -s, mask=(j < n) & (j != i))
    tl.store(laplacian + i * n + i, tl.sum(count, axis=0))


def _squares(x: Tensor) -> Tensor:
    n, width = x.shape
    out = torch.empty((n, n), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(width), 64)
    _squares_kernel[(n, triton.cdiv(n, 16))](x, out, n, width, *x.stride(), ROWS=16, BLOCK=block, **PLAIN)
    return out


def forward(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, squared: bool, eps: float,
            laplacian: Tensor, loss: Tensor) -> None:  # fmt: skip
    """Fills the scalar loss and the Laplacian [N, N] whose product with the student is the gradient."""
    n, device = student.shape[0], student.device
    squares = _squares(student), _squares(teacher)
    block = min(triton.next_power_of_2(n), 1024)
    tile = max(min(block, 64), 16)
    chunks = triton.cdiv(n, tile)
    partial = torch.zeros(n * (1 + chunks), dtype=torch.float32, device=device)
    sums = torch.empty((3, n), dtype=torch.float32, device=device)
    angles = sums
    if distance_weight:
        _row_sums_kernel[(n,)](*squares, sums, n, eps, SQUARED=squared, BLOCK=block, **PLAIN)
        _distance_kernel[(n,)](*squares, sums, partial, n, eps, distance_weight, SQUARED=squared, BLOCK=block, **PLAIN)
    if angle_weight:
        angles = torch.empty((n, n), dtype=torch.float32, device=device)
        by_edge = torch.empty((chunks + 1, n, n), dtype=torch.float32, device=device)
        _angle_kernel[(n, chunks)](
            *squares, by_edge, by_edge[chunks], partial[n:], n, eps, angle_weight, VERTICES=16, BLOCK=tile,
            **PLAIN,
        )  # fmt: skip
        torch.sum(by_edge, dim=0, out=angles)
    _laplacian_kernel[(n,)](
        *squares, sums, angles, laplacian, n, eps, distance_weight, angle_weight, SQUARED=squared,
        DISTANCE=bool(distance_weight), ANGLE=bool(angle_weight), BLOCK=block, **PLAIN,
    )  # fmt: skip
    torch.sum(partial, dim=0, out=loss)
