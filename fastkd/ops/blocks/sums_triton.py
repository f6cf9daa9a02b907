"""Column sums in Triton in two ordered steps: programs of a fixed number add up rows, then their sums are added.

Neither step uses atomics, and the number of programs follows from the shape alone: the same bits on every run and on
every device. A sum over [N, D] reads it once; the partial sums between the steps are a few per cent of that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128  # a program's share of a row: 256 bytes of a 16-bit matrix
ROWS = 32  # rows that it reads at a time
PROGRAMS = 512  # enough to fill a large GPU four times over


@triton.jit
def _partials_kernel(x, partial, rows, width, stride, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # partial[p] = sum of the row tiles p, p + parts, p + 2 parts ...
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * ROWS, rows, parts * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (d < width)[None, :]
        sums += tl.load(x + row[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(partial + part.to(tl.int64) * width + d, tl.sum(sums, axis=0), mask=d < width)


@triton.jit
def _reduce_kernel(partial, first, second, parts, half, width, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    # Sums of the columns of partial [parts, width]: the first half of them goes to first, the rest to second.
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (d < width)[None, :]
        sums += tl.load(partial + part[:, None].to(tl.int64) * width + d[None, :], mask=inside, other=0)
    total = tl.sum(sums, axis=0)
    tl.store(first + d, total.to(first.dtype.element_ty), mask=d < half)
    tl.store(second + d - half, total.to(second.dtype.element_ty), mask=(d >= half) & (d < width))


def parts_of(rows: int, width: int) -> int:
    """Programs that share the rows of each block of columns."""
    return min(max(PROGRAMS // triton.cdiv(width, COLUMNS), 1), max(triton.cdiv(rows, ROWS), 1))


def reduce(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Fills first (and second, side by side with it) with the column sums of partial [P, D] or [P, 2, D], float32."""
    width = partial[0].numel()
    # 128 rows at a time: the few programs that there are must keep many loads in flight.
    _reduce_kernel[(triton.cdiv(width, 32),)](
        partial, first, first if second is None else second, len(partial), first.numel(), width, PARTS=128, COLUMNS=32,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def column_sum(x: Tensor, out: Tensor) -> None:
    """Fills out [D] with the sums over the rows of x [N, D], which has unit stride in D."""
    rows, width = x.shape
    parts = parts_of(rows, width)
    partial = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    _partials_kernel[(triton.cdiv(width, COLUMNS), parts)](
        x, partial, rows, width, x.stride(0), parts, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=True
    )
    reduce(partial, out)
