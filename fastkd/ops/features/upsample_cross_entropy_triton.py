"""Triton kernels of `masked_consistency_loss`.

Forward: one program per row of an image and block of its columns; classes go by one after the other. Backward with
resizing: one program per row of small cells, block of cells and block of classes. It holds the logits of its cells and
of their neighbours, walks through the positions around each cell, and adds up what they send.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bilinear_triton import add_exp, axis_taps, corners, first_output, logit


@triton.jit
def _factor(label, weight, at_label, at_weight, inside, ignore_index, WEIGHTED: tl.constexpr):
    # Class of each position and its weight, 0 where it does not count.
    target = tl.load(label + at_label, mask=inside, other=0).to(tl.int32)
    w = tl.where(inside & (target != ignore_index), 1.0, 0.0)
    if WEIGHTED:
        w *= tl.load(weight + at_weight, mask=inside, other=0.0).to(tl.float32)
    return target, w


@triton.jit
def _forward_kernel(logits, label, weight, lse, partial, classes, h, w, height, width, ignore_index, scale,
                    s_b, s_c, s_h, s_w, l_b, l_h, l_w, w_b, w_h, w_w,
                    RESIZE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, y = row // height, row % height
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    target, factor = _factor(label, weight, b * l_b + y * l_h + x.to(tl.int64) * l_w,
                             b * w_b + y * w_h + x.to(tl.int64) * w_w, inside, ignore_index, WEIGHTED)  # fmt: skip
    o00, o01, o10, o11, down, across = corners(y.to(tl.int32), x, h, w, height, width, s_h, s_w, RESIZE)
    plane = logits + b * s_b
    best = logit(plane, o00, o01, o10, o11, down, across, inside, RESIZE)
    total = tl.full((BLOCK,), 1.0, tl.float32)
    picked = best
    for c in range(1, classes):
        plane += s_c
        z = logit(plane, o00, o01, o10, o11, down, across, inside, RESIZE)
        picked = tl.where(target == c, z, picked)
        best, total, _ = add_exp(best, total, z)
    result = best + tl.log(total)
    tl.store(lse + row * width + x, result, mask=inside)
    share = tl.where(factor != 0, (result - picked) * (factor * scale), 0.0)
    tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), tl.sum(share, axis=0))


@triton.jit
def _backward_same_kernel(grad_loss, logits, label, weight, lse, grad_logits, classes, height, width, ignore_index,
                          scale, s_b, s_c, s_h, s_w, l_b, l_h, l_w, w_b, w_h, w_w,
                          WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, y = row // height, row % height
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    x = x.to(tl.int64)
    target, factor = _factor(label, weight, b * l_b + y * l_h + x * l_w, b * w_b + y * w_h + x * w_w, inside,
                             ignore_index, WEIGHTED)  # fmt: skip
    factor *= tl.load(grad_loss).to(tl.float32) * scale
    total = tl.load(lse + row * width + x, mask=inside, other=0.0)
    plane, out = logits + b * s_b, grad_logits + b * classes * height * width
    for c in range(0, classes):
        z = tl.load(plane + y * s_h + x * s_w, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(factor != 0, (tl.exp(z - total) - tl.where(target == c, 1.0, 0.0)) * factor, 0.0)
        tl.store(out + y * width + x, grad.to(grad_logits.dtype.element_ty), mask=inside)
        plane += s_c
        out += height * width


@triton.jit
def _row(plane, j, h, at_left, at_here, at_right, s_h, mask):
    # Logits [classes, cells] of one row of cells: of the cells and of their neighbours on both sides.
    line = plane + tl.minimum(tl.maximum(j, 0), h - 1).to(tl.int64) * s_h
    left = tl.load(line + at_left, mask=mask, other=0.0).to(tl.float32)
    here = tl.load(line + at_here, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(line + at_right, mask=mask, other=0.0).to(tl.float32)
    return left, here, right


@triton.jit
def _backward_resized_kernel(grad_loss, logits, label, weight, lse, grad_logits, classes, h, w, height, width, most,
                             ignore_index, scale, s_b, s_c, s_h, s_w, l_b, l_h, l_w, w_b, w_h, w_w,
                             WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, j = row // h, (row % h).to(tl.int32)
    i = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    mask = (c < classes)[:, None] & (i < w)[None, :]
    plane = logits + b * s_b + c.to(tl.int64)[:, None] * s_c
    at_left = (tl.maximum(i - 1, 0).to(tl.int64) * s_w)[None, :]
    at_here = (i.to(tl.int64) * s_w)[None, :]
    at_right = (tl.minimum(i + 1, w - 1).to(tl.int64) * s_w)[None, :]
    up_l, up, up_r = _row(plane, j - 1, h, at_left, at_here, at_right, s_h, mask)
    mid_l, mid, mid_r = _row(plane, j, h, at_left, at_here, at_right, s_h, mask)
    low_l, low, low_r = _row(plane, j + 1, h, at_left, at_here, at_right, s_h, mask)
    first_y = tl.where(j > 0, first_output(j - 1, h, height), 0)
    end_y = tl.where(j + 1 < h, first_output(j + 1, h, height), height)
    first_x = tl.where(i > 0, first_output(i - 1, w, width), 0)
    end_x = tl.where(i + 1 < w, first_output(i + 1, w, width), width)
    upstream = tl.load(grad_loss).to(tl.float32) * scale
    sums = tl.zeros((CLASSES, CELLS), tl.float32)
    for y in range(first_y, end_y):
        # Each position lies between rows j - 1 and j, or between j and j + 1.
        top, bottom, down = axis_taps(y, h, height)
        above = top < j
        f_up = tl.where(above, 1.0 - down, 0.0)
        f_mid = tl.where(above, down, 1.0 - down)
        f_low = tl.where(above, 0.0, down)
        z_l = f_up * up_l + f_mid * mid_l + f_low * low_l
        z_m = f_up * up + f_mid * mid + f_low * low
        z_r = f_up * up_r + f_mid * mid_r + f_low * low_r
        share_y = tl.where(top == j, 1.0 - down, 0.0) + tl.where(bottom == j, down, 0.0)
        for k in range(0, most):
            x = first_x + k
            inside = (x < end_x) & (i < w)
            left, right, across = axis_taps(x, w, width)
            at = x.to(tl.int64)
            target, factor = _factor(label, weight, b * l_b + y * l_h + at * l_w, b * w_b + y * w_h + at * w_w, inside,
                                     ignore_index, WEIGHTED)  # fmt: skip
            share = tl.where(left == i, 1.0 - across, 0.0) + tl.where(right == i, across, 0.0)
            factor *= share * (share_y * upstream)
            before = (left < i)[None, :]
            z = tl.where(before, z_l, z_m) * (1.0 - across)[None, :] + tl.where(before, z_m, z_r) * across[None, :]
            total = tl.load(lse + (b * height + y) * width + at, mask=inside, other=0.0)
            grad = tl.exp(z - total[None, :]) - tl.where(target[None, :] == c[:, None], 1.0, 0.0)
            sums += tl.where((factor != 0)[None, :], grad * factor[None, :], 0.0)
    out = grad_logits + ((b * classes + c.to(tl.int64)[:, None]) * h + j) * w + i[None, :]
    tl.store(out, sums.to(grad_logits.dtype.element_ty), mask=mask)


def _given(label, weight) -> tuple:
    # The weights and strides of both; without weights, strides that are never used.
    return (*label.stride(), *((0, 0, 0) if weight is None else weight.stride()))


def forward(logits, label, weight, ignore_index: int, lse, loss) -> None:
    """Fills lse [B, H, W] and the scalar loss; a partial sum per program, then one ordered reduction (no atomics)."""
    batch, classes, h, w = logits.shape
    height, width = label.shape[1:]
    block = min(triton.next_power_of_2(width), 128)
    blocks = triton.cdiv(width, block)
    partial = torch.empty(batch * height * blocks, dtype=torch.float32, device=logits.device)
    _forward_kernel[(batch * height, blocks)](
        logits, label, lse if weight is None else weight, lse, partial, classes, h, w, height, width, ignore_index,
        1.0 / label.numel(), *logits.stride(), *_given(label, weight),
        RESIZE=(h, w) != (height, width), WEIGHTED=weight is not None, BLOCK=block, num_warps=max(block // 32, 1),
        enable_fp_fusion=True,
    )  # fmt: skip
    torch.sum(partial, dim=0, out=loss)


def backward(grad_loss, logits, label, weight, ignore_index: int, lse, grad_logits) -> None:
    """Fills grad_logits, contiguous [B, C, h, w]."""
    batch, classes, h, w = logits.shape
    height, width = label.shape[1:]
    tensors = grad_loss, logits, label, lse if weight is None else weight, lse, grad_logits
    rest = (ignore_index, 1.0 / label.numel(), *logits.stride(), *_given(label, weight))
    options = dict(WEIGHTED=weight is not None, enable_fp_fusion=True)
    if (h, w) == (height, width):
        block = min(triton.next_power_of_2(width), 128)
        _backward_same_kernel[(batch * height, triton.cdiv(width, block))](
            *tensors, classes, height, width, *rest, BLOCK=block, num_warps=max(block // 32, 1), **options
        )
        return
    class_block = min(triton.next_power_of_2(classes), 32)
    cells = min(triton.next_power_of_2(w), 1024 // class_block)
    most = triton.cdiv(2 * width, w) + 1  # positions that can lie around a cell
    _backward_resized_kernel[(batch * h, triton.cdiv(w, cells), triton.cdiv(classes, class_block))](
        *tensors, classes, h, w, height, width, most, *rest, CLASSES=class_block, CELLS=cells,
        num_warps=min(max(class_block * cells // 128, 1), 8), **options,
    )  # fmt: skip
