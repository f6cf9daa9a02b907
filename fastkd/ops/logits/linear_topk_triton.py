"""Triton passes over rows of logits for `linear_topk`: one program a row, in blocks of classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .linear_topk import through


@triton.jit
def _log_sum_exp_kernel(z, lse, classes, row_stride, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):  # a constant: vocabularies are few
        i = step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(z + row * row_stride + i, mask=i < classes, other=float("-inf")).to(tl.float32)
        top = tl.maximum(largest, x)
        # Lanes that have met no class yet stay at 0: the exponent of -inf - -inf is not a number.
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = top
    most = tl.max(largest, axis=0)
    tl.store(lse + row, most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0)))


@triton.jit
def _softmax_kernel(z, lse, factor, grad, classes, z_stride, grad_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + row * z_stride + i, mask=i < classes, other=0.0).to(tl.float32)
    value = tl.exp(x - tl.load(lse + row)) * tl.load(factor + row)
    tl.store(grad + row * grad_stride + i, value, mask=i < classes)


def _block(classes: int) -> int:
    return min(4096, max(16, triton.next_power_of_2(classes)))


def _options(block: int) -> dict:
    return dict(BLOCK=block, num_warps=max(1, block // 512), enable_fp_fusion=True)


def log_sum_exp(z: torch.Tensor) -> torch.Tensor:
    lse = z.new_empty(len(z), 1)
    block = _block(z.shape[1])
    _log_sum_exp_kernel[(len(z),)](
        z, lse, z.shape[1], z.stride(0), STEPS=triton.cdiv(z.shape[1], block), **_options(block)
    )
    return lse


def softmax(z: torch.Tensor, lse: torch.Tensor, factor: torch.Tensor, grad: torch.Tensor) -> None:
    block = _block(z.shape[1])
    grid = (len(z), triton.cdiv(z.shape[1], block))
    _softmax_kernel[grid](
        z, lse, factor.contiguous(), grad, z.shape[1], z.stride(0), grad.stride(0), **_options(block),
    )  # fmt: skip


fill = through(log_sum_exp, softmax)
