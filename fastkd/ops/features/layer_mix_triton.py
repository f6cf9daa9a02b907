"""Triton kernels of `layer_mix`: one program per tile of elements, all layers and mixtures of that tile in registers.

Layers and mixtures are separate tensors: their pointers come as tuples, and the loops over them are unrolled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(states, weight, mixed, count, MIXTURES: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    state = tl.load(states[0] + i, mask=inside, other=0.0).to(tl.float32)
    sums = ()
    for a in tl.static_range(MIXTURES):
        sums = sums + (tl.load(weight + a * LAYERS).to(tl.float32) * state,)
    for b in tl.static_range(1, LAYERS):
        state = tl.load(states[b] + i, mask=inside, other=0.0).to(tl.float32)
        longer = ()
        for a in tl.static_range(MIXTURES):
            longer = longer + (sums[a] + tl.load(weight + a * LAYERS + b).to(tl.float32) * state,)
        sums = longer
    for a in tl.static_range(MIXTURES):
        tl.store(mixed[a] + i, sums[a].to(mixed[a].dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grads, states, weight, grad_states, partial, count,
    MIXTURES: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    mine = partial + program * (MIXTURES * LAYERS)
    above = ()
    for a in tl.static_range(MIXTURES):
        above = above + (tl.load(grads[a] + i, mask=inside, other=0.0).to(tl.float32),)
    for b in tl.static_range(LAYERS):
        state = tl.load(states[b] + i, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for a in tl.static_range(MIXTURES):
            total += tl.load(weight + a * LAYERS + b).to(tl.float32) * above[a]
            share = tl.sum(above[a] * state, axis=0)
            tl.store(mine + a * LAYERS + b, share)
        tl.store(grad_states[b] + i, total.to(grad_states[b].dtype.element_ty), mask=inside)


def _options(weight: torch.Tensor) -> dict:
    mixtures, layers = weight.shape
    block = 512 if mixtures <= 6 else 256 if mixtures <= 12 else 128  # as many sums as registers hold
    # One warp: every share is a sum over the tile, and within a warp such a sum needs no barrier.
    return dict(MIXTURES=mixtures, LAYERS=layers, BLOCK=block, num_warps=1, enable_fp_fusion=True)


def forward(states: list[torch.Tensor], weight: torch.Tensor, mixed: list[torch.Tensor]) -> None:
    """Fills the mixtures; everything is contiguous."""
    options, count = _options(weight), states[0].numel()
    if count:
        grid = (triton.cdiv(count, options["BLOCK"]),)
        _forward_kernel[grid](tuple(states), weight, tuple(mixed), count, **options)


def backward(
    grads: list[torch.Tensor], states: list[torch.Tensor], weight: torch.Tensor,
    grad_states: list[torch.Tensor], grad_weight: torch.Tensor,
) -> None:  # fmt: skip
    """Fills the gradients of states and weight; a share of the latter per tile, then one ordered sum (no atomics)."""
    options, count = _options(weight), states[0].numel()
    programs = triton.cdiv(count, options["BLOCK"])
    partial = torch.empty((programs, *weight.shape), dtype=torch.float32, device=weight.device)
    if count:
        _backward_kernel[(programs,)](
            tuple(grads), tuple(states), weight, tuple(grad_states), partial, count, **options
        )
    grad_weight.copy_(partial.sum(0))
