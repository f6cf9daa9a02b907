"""Triton kernel of `pseudo_label`: one program per row of an image and block of its columns, classes one by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bilinear_triton import add_exp, corners, logit


@triton.jit
def _label_kernel(logits, label, prob, partial, threshold, classes, h, w, height, width, s_b, s_c, s_h, s_w,
                  RESIZE: tl.constexpr, PROB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    y = (row % height).to(tl.int32)
    o00, o01, o10, o11, down, across = corners(y, x, h, w, height, width, s_h, s_w, RESIZE)
    plane = logits + row // height * s_b
    best = logit(plane, o00, o01, o10, o11, down, across, inside, RESIZE)
    total = tl.full((BLOCK,), 1.0, tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    for c in range(1, classes):
        plane += s_c
        z = logit(plane, o00, o01, o10, o11, down, across, inside, RESIZE)
        best, total, larger = add_exp(best, total, z)
        index = tl.where(larger, c, index)
    p = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), total)
    tl.store(label + row * width + x, index.to(label.dtype.element_ty), mask=inside)
    if PROB:
        tl.store(prob + row * width + x, p, mask=inside)
    confident = tl.sum((inside & (p >= threshold)).to(tl.int32), axis=0)
    tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), confident)


def pseudo_label(logits, threshold: float, label, count, prob) -> None:
    """Fills label [B, H, W], count [B] and, where it is not empty, prob [B, H, W]; all contiguous."""
    batch, classes, h, w = logits.shape
    height, width = label.shape[1:]
    block = min(triton.next_power_of_2(width), 128)
    blocks = triton.cdiv(width, block)
    partial = torch.empty((batch, height * blocks), dtype=torch.int32, device=logits.device)
    _label_kernel[(batch * height, blocks)](
        logits, label, prob, partial, threshold, classes, h, w, height, width, *logits.stride(),
        RESIZE=(h, w) != (height, width), PROB=prob.numel() > 0, BLOCK=block, num_warps=max(block // 32, 1),
        enable_fp_fusion=True,
    )  # fmt: skip
    torch.sum(partial, dim=1, dtype=torch.int64, out=count)
