"""Triton kernels of `at_loss`: attention maps by tiles, the two maps of a sample in one program, the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _power(x, p, P: tl.constexpr):
    # |x|^p; P is the power where it is a small integer, else 0.
    size = tl.abs(x)
    if P == 0:
        return tl.where(x == 0.0, 0.0, tl.exp2(p * tl.log2(tl.where(x == 0.0, 1.0, size))))
    power = size
    for _ in tl.static_range(P - 1):
        power *= size
    return power


@triton.jit
def _map_kernel(feature, out, channels, length, s_n, s_c, s_i, p, P: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = feature + n * s_n + i[None, :].to(tl.int64) * s_i
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, channels, ROWS):
        c = start + tl.arange(0, ROWS)
        inside = (c[:, None] < channels) & (i[None, :] < length)
        x = tl.load(at + c[:, None].to(tl.int64) * s_c, mask=inside, other=0.0).to(tl.float32)
        total += _power(x, p, P)
    mean = tl.sum(total, axis=0) / channels
    tl.store(out + n * length + i, mean, mask=i < length)


@triton.jit
def _compare_kernel(map_s, map_t, partial, q, length, samples, PAPER: tl.constexpr, BLOCK: tl.constexpr):
    # In three walks over the two maps of a sample, which stay in cache: norms, differences, gradient.
    row = tl.program_id(0).to(tl.int64)
    a_row, b_row = map_s + row * length, map_t + row * length
    lane = tl.arange(0, BLOCK)
    aa = tl.zeros((BLOCK,), dtype=tl.float32)
    bb = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        a = tl.load(a_row + start + lane, mask=start + lane < length, other=0.0)
        b = tl.load(b_row + start + lane, mask=start + lane < length, other=0.0)
        aa += a * a
        bb += b * b
    norm = tl.sqrt(tl.sum(aa, axis=0))
    inverse_a = 1.0 / tl.maximum(norm, 1e-12)
    inverse_b = 1.0 / tl.maximum(tl.sqrt(tl.sum(bb, axis=0)), 1e-12)
    dd = tl.zeros((BLOCK,), dtype=tl.float32)
    ud = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        u = tl.load(a_row + start + lane, mask=start + lane < length, other=0.0) * inverse_a
        v = tl.load(b_row + start + lane, mask=start + lane < length, other=0.0) * inverse_b
        dd += (u - v) * (u - v)
        ud += u * (u - v)
    squares = tl.sum(dd, axis=0)
    if PAPER:
        distance = tl.sqrt(squares)
        tl.store(partial + row, distance / samples)
        scale = tl.where(distance == 0.0, 0.0, 1.0 / (tl.where(distance == 0.0, 1.0, distance) * samples))
    else:
        count = samples * 1.0 * length
        tl.store(partial + row, squares / count)
        scale = 2.0 / count
    along = tl.where(norm < 1e-12, 0.0, tl.sum(ud, axis=0))
    for start in range(0, length, BLOCK):
        inside = start + lane < length
        u = tl.load(a_row + start + lane, mask=inside, other=0.0) * inverse_a
        v = tl.load(b_row + start + lane, mask=inside, other=0.0) * inverse_b
        tl.store(q + row * length + start + lane, (u - v - u * along) * scale * inverse_a, mask=inside)


@triton.jit
def _backward_kernel(grad_loss, student, q, grad_student, channels, length, s_n, s_c, s_i, g_n, g_c, g_i, p,
                     P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    i = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    inside = (c < channels) & (i < length)
    x = tl.load(student + n * s_n + c * s_c + i * s_i, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    if P == 0:
        slope *= _power(x, p - 1.0, 0)
    else:
        for _ in tl.static_range(P - 1):
            slope *= tl.abs(x)
    scale = tl.load(grad_loss).to(tl.float32) * p / channels
    g = slope * (tl.load(q + n * length + i, mask=i < length, other=0.0) * scale)
    at = grad_student + n * g_n + c * g_c + i * g_i
    tl.store(at, g.to(grad_student.dtype.element_ty), mask=inside)


def _integer(p: float) -> int:
    return int(p) if p in (1.0, 2.0, 3.0, 4.0) else 0


def _tile(feature: Tensor) -> tuple[int, int]:
    """Channels and positions of a tile of 2048 elements, the longer side along what is dense in memory."""
    _, channels, length = feature.shape
    block = min(triton.next_power_of_2(length), 128 if feature.stride(2) == 1 else 16)
    return min(2048 // block, triton.next_power_of_2(channels)), block


def _map(feature: Tensor, p: float) -> Tensor:
    samples, channels, length = feature.shape
    out = torch.empty((samples, length), dtype=torch.float32, device=feature.device)
    rows, block = _tile(feature)
    _map_kernel[(samples, triton.cdiv(length, block))](
        feature, out, channels, length, *feature.stride(), p, P=_integer(p), ROWS=rows, BLOCK=block, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def forward(student: Tensor, teacher: Tensor, p: float, paper: bool, loss: Tensor, q: Tensor) -> None:
    """Fills the scalar loss and q [N, positions]; a partial sum per sample, then one ordered reduction."""
    samples, length = q.shape
    maps = [_map(feature, p) for feature in (student, teacher)]
    partial = torch.empty(samples, dtype=torch.float32, device=q.device)
    block = min(triton.next_power_of_2(length), 1024)
    # No fusion of products into the differences: equal maps must differ by exactly 0.
    _compare_kernel[(samples,)](
        *maps, partial, q, length, samples, PAPER=paper, BLOCK=block, num_warps=4, enable_fp_fusion=False
    )
    torch.sum(partial, dim=0, out=loss)


def backward(grad_loss: Tensor, student: Tensor, q: Tensor, p: float, grad_student: Tensor) -> None:
    """Fills grad_student [N, C, positions]."""
    samples, channels, length = student.shape
    rows, block = _tile(student)
    _backward_kernel[(samples, triton.cdiv(channels, rows), triton.cdiv(length, block))](
        grad_loss, student, q, grad_student, channels, length, *student.stride(), *grad_student.stride(), p,
        P=_integer(p), ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
