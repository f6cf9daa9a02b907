"""Triton kernel of `quantize_rows`: one program per row, the row in registers.

e4m3 is made of the bits of the float32: GPUs before sm_89 have no such type, and the codes are the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(0x0DA24260)  # the bits of 1e-30


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _quantize_kernel(x, codes, scale, width, stride, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + i, mask=i < width, other=0.0).to(tl.float32)
    # Sizes compare as integers do, and NaN as the largest of all.
    largest = tl.maximum(tl.max(_bits(v) & 0x7FFFFFFF, axis=0), TINY).to(tl.float32, bitcast=True)
    limit = tl.full((), 448.0 if FP8 else 127.0, tl.float32)
    v *= tl.div_rn(limit, largest)
    # Adding a large power of two rounds what lies below its last bit to even.
    if FP8:
        size = _bits(v) & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of mantissa, bias 7 instead of 127
        subnormal = _bits(size.to(tl.float32, bitcast=True) + 16384.0) & 0xFF  # 2^14: steps of 2^-9
        code = tl.where(size < 0x3C800000, subnormal, normal) | ((_bits(v) >> 24) & 0x80)  # 0x3C800000 is 2^-6
    else:
        code = _bits(v + 12582912.0)  # 1.5 * 2^23: steps of 1, the low byte is the number
    tl.store(codes + row * width + i, code.to(codes.dtype.element_ty), mask=i < width)
    tl.store(scale + row, tl.div_rn(largest, limit))


def quantize(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """x [N, D] with contiguous rows -> codes [N, D] int8 or uint8 (the bits of e4m3), scale [N] float32."""
    rows, width = x.shape
    if rows == 0:
        return
    fp8 = codes.dtype != torch.int8
    block = triton.next_power_of_2(width)
    _quantize_kernel[(rows,)](
        x, codes, scale, width, x.stride(0),
        FP8=fp8, BLOCK=block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
