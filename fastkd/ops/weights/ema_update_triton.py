"""Triton kernel of `ema_update_`: one launch over chunks of all tensors, found through a table of addresses."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements a program
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _update_kernel(table, weight, PHI: tl.constexpr, THETA: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row = table + 3 * tl.program_id(0)
    phi = tl.load(row).to(tl.pointer_type(PHI))
    theta = tl.load(row + 1).to(tl.pointer_type(THETA))
    count = tl.load(row + 2)
    w = tl.load(weight).to(tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        a = tl.load(phi + i, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(theta + i, mask=inside, other=0.0).to(tl.float32)
        moved = tl.where(w < 0.5, a + w * (b - a), b - (1.0 - w) * (b - a))
        tl.store(phi + i, moved.to(PHI), mask=inside)


@functools.lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, int, int], ...], phi_size: int, theta_size: int, device: torch.device) -> Tensor:
    """[chunks, 3]: addresses of phi and theta, elements left. A pure function of the key: parameters stay where they
    are, so it is built and sent to the device once, and a CUDA graph that was captured later finds it in place."""
    rows = [
        (phi + start * phi_size, theta + start * theta_size, count - start)
        for phi, theta, count in addresses
        for start in range(0, count, CHUNK)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def update(averaged: list[Tensor], current: list[Tensor], weight: Tensor) -> None:
    """One launch per pair of dtypes."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, int, int]]] = {}
    for phi, theta in zip(averaged, current):
        if phi.numel():
            row = phi.data_ptr(), theta.data_ptr(), phi.numel()
            groups.setdefault((phi.dtype, theta.dtype), []).append(row)
    for (phi, theta), rows in groups.items():
        table = _table(tuple(rows), phi.itemsize, theta.itemsize, weight.device)
        _update_kernel[(len(table),)](
            table, weight, PHI=_DTYPES[phi], THETA=_DTYPES[theta], CHUNK=CHUNK, BLOCK=2048, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
