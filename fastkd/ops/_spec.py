"""OpSpec: everything that tests, fuzzing, benchmarks and the docs table need to know about an op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._dispatch import Kernel

Case = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """Describes one op.

    A *case* is a dict of plain values (shapes, flags, seeds) and `build` turns it into keyword arguments of
    the op, so the same cases serve every backend, dtype and device.

    Attributes:
        name: of the op, as in ``torch.ops.fastkd``.
        function: the public function.
        reference: the same maths in plain differentiable PyTorch, same signature as `function`.
        kernels: forward and backward kernels.
        build: ``build(case, dtype, device) -> kwargs``; random values come from ``case["seed"]``, default 0.
        differentiable: names of the keyword arguments that receive gradients, where they are given.
        cases: named cases that every backend must pass; edge cases (keep = 1, strided inputs ...) included.
        space: values per key that the fuzzer combines freely.
        bench: named cases of realistic size for the op benchmark.
        bytes_moved: fewest bytes that forward plus backward must move for the given kwargs.
        flops: floating-point operations of forward plus backward for the given kwargs.
        golden: prefix of the golden files that pin the op (``None``: pinned through the model's files).
        law: optional metamorphic check ``law(kwargs)``, run by the fuzzer; raises AssertionError.
    """

    name: str
    function: Callable
    reference: Callable
    kernels: Sequence[Kernel]
    build: Callable[[Case, torch.dtype, torch.device | str], dict[str, Any]]
    differentiable: Sequence[str]
    cases: Mapping[str, Case]
    space: Mapping[str, Sequence]
    bench: Mapping[str, Case]
    bytes_moved: Callable[[dict[str, Any]], int]
    flops: Callable[[dict[str, Any]], int]
    golden: str | None = None
    law: Callable[[dict[str, Any]], None] | None = None


SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds an op to the table that drives tests, fuzzing, benchmarks and docs."""
    SPECS[spec.name] = spec
    return spec


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the given tensors' elements (None counts 0)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
