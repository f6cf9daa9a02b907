"""Learnable mixture of a network's layers (the dynamic alignment of MaskAlign, Xue et al., CVPR 2023, section 3.3).

With s_1 .. s_K the outputs of a student's K blocks and W a row of K weights per target,

    f_a        = sum_b W[a, b] s_b                  a = 1 .. A
    d / d s_b  = sum_a W[a, b] df_a
    d / dW     = sum over elements of df_a s_b

Stacking the layers to multiply them by W reads and writes all of them once more than needed, in both directions. Here
each s_b is read once and each f_a written once; backward reads the A gradients and the K layers once for both results.
Sums are float32 (float64), and those of dW add tiles in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "layer_mix"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stacked(tensors: list[Tensor]) -> Tensor:
    """[count, elements], float32 (float64)."""
    return torch.stack([t.flatten() for t in tensors]).to(_wide(tensors[0].dtype))


def _fill_forward(states: list[Tensor], weight: Tensor, mixed: list[Tensor]) -> None:
    rows = weight.to(_wide(states[0].dtype)) @ _stacked(states)
    for out, row in zip(mixed, rows):
        out.copy_(row.view_as(out))


def _fill_backward(
    grads: list[Tensor], states: list[Tensor], weight: Tensor, grad_states: list[Tensor], grad_weight: Tensor
) -> None:
    above, below = _stacked(grads), _stacked(states)
    grad_weight.copy_(above @ below.T)
    for out, row in zip(grad_states, weight.to(above.dtype).T @ above):
        out.copy_(row.view_as(out))


_TRITON = "fastkd.ops.features.layer_mix_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


@custom_op("layer_mix")
def _op(states: list[Tensor], weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    states, weight = [s.contiguous() for s in states], weight.contiguous()
    mixed = [torch.empty(states[0].shape, dtype=dtype, device=weight.device) for _ in range(len(weight))]
    forward(states, weight, mixed)
    return mixed


@_op.register_fake
def _(states, weight, dtype):
    return [torch.empty(states[0].shape, dtype=dtype, device=weight.device) for _ in range(weight.shape[0])]


@custom_op("layer_mix_backward")
def _op_backward(grads: list[Tensor], states: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    grads, states = ([t.contiguous() for t in tensors] for tensors in (grads, states))
    weight = weight.contiguous()
    grad_states = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in states]
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    backward(grads, states, weight, grad_states, grad_weight)
    return grad_states, grad_weight


@_op_backward.register_fake
def _(grads, states, weight):
    grad_states = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in states]
    return grad_states, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _setup_context(ctx, inputs, output) -> None:
    states, weight, ctx.dtype = inputs
    ctx.save_for_backward(weight, *states)


def _autograd(ctx, grads: list[Tensor | None]):
    weight, *states = ctx.saved_tensors
    # A mixture that nothing was made of has no gradient.
    grads = [torch.zeros_like(states[0], dtype=ctx.dtype) if grad is None else grad for grad in grads]
    grad_states, grad_weight = _op_backward(grads, states, weight)
    return grad_states, grad_weight, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def layer_mix(states: Sequence[Tensor], weight: Tensor, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Weighted sums of layers: ``mixed[a] = sum_b weight[a, b] * states[b]``.

    Args:
        states: K tensors of one shape, such as the [B, T, D] outputs of K blocks, and one dtype, floating; read in
            place where they are contiguous.
        weight: [A, K], floating, one row per mixture; its dtype may differ from that of the states.
        dtype: of the mixtures, default that of the states. A 16-bit dtype saves the cast before a layer that computes
            in it.

    Returns:
        A tensors of the shape of one state; float32 sums (float64 for float64 states).

    Raises:
        ValueError: no states, shapes that differ, a weight that does not have one column per state.
        TypeError: dtypes that differ, or float64 on one side only.
    """
    states = list(states)
    if not states:
        _check.fail(OP, "states", "none", "at least one tensor")
    _check.check_tensor(OP, "weight", weight, 2)
    first = states[0]
    for index, state in enumerate(states):
        name = f"states[{index}]"
        _check.check_tensor(OP, name, state, first.ndim if index else getattr(state, "ndim", 0))
        _check.check_shape(OP, name, state, first.shape, "like states[0]")
        if state.dtype != first.dtype:
            _check.fail(OP, name, _name(state.dtype), f"{_name(first.dtype)} like states[0]", "cast it", TypeError)
    _check.check_same_device(OP, states=first, weight=weight)
    if weight.shape[0] == 0 or weight.shape[1] != len(states):
        _check.fail(OP, "weight", f"shape {tuple(weight.shape)}", f"(at least 1, {len(states)}), one column per state")
    dtype = dtype or first.dtype
    for name, other in (("weight", weight.dtype), ("dtype", dtype)):
        if (other == torch.float64) != (first.dtype == torch.float64):
            got = f"{_name(other)} with states in {_name(first.dtype)}"
            _check.fail(OP, name, got, "float64 on both sides or on none", error=TypeError)
    return _op(states, weight, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reference(states: Sequence[Tensor], weight: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    wide = _wide(states[0].dtype)
    mixed = torch.einsum("ab,b...->a...", weight.to(wide), torch.stack(list(states)).to(wide))
    return mixed.to(dtype or states[0].dtype).unbind(0)


def _with_names(function):
    """The op with a name for each state, so that checks and benchmarks find the tensors: s0, s1, ..."""
    return lambda weight, **states: tuple(function(list(states.values()), weight))


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    shape, layers, targets = (case["batch"], case["tokens"], case["width"]), case["layers"], case["targets"]
    weight = torch.eye(targets, layers) + 0.3 * torch.randn(targets, layers, generator=random)
    weight_dtype = torch.float32 if case.get("weight_float32") and dtype != torch.float64 else dtype
    kwargs = dict(weight=weight.to(device, weight_dtype))
    for index in range(layers):
        state = torch.randn(*shape, generator=random) + 0.1 * index
        kwargs[f"s{index}"] = state.to(device, dtype)
    return kwargs


def _law(kwargs: dict) -> None:
    """Rows of the unit matrix give the layers themselves, bit by bit."""
    states = [value for name, value in kwargs.items() if name.startswith("s")]
    picked = layer_mix(states, torch.eye(len(states), device=states[0].device))
    for got, want in zip(picked, states, strict=True):
        assert torch.equal(got, want)


def _sizes(kwargs: dict) -> tuple[int, int]:
    """Bytes of the states, and of the mixtures."""
    states = tensor_bytes(*(v for name, v in kwargs.items() if name.startswith("s")))
    targets, layers = kwargs["weight"].shape
    return states, states // layers * targets


SPEC = register(
    OpSpec(
        name=OP,
        function=_with_names(layer_mix),
        reference=_with_names(_reference),
        kernels=(forward, backward),
        build=_build,
        differentiable=("weight", *(f"s{index}" for index in range(24))),
        cases={
            "top2": dict(batch=2, tokens=5, width=10, layers=4, targets=2),
            "all": dict(batch=1, tokens=3, width=97, layers=3, targets=3),
            "tiles": dict(batch=2, tokens=9, width=64, layers=3, targets=2, weight_float32=True),
            "seven_of_nine": dict(batch=1, tokens=3, width=8, layers=9, targets=7),
            "one": dict(batch=1, tokens=1, width=1, layers=1, targets=1),
        },
        space=dict(
            batch=(1, 3), tokens=(1, 5), width=(1, 8, 33, 130), layers=(1, 2, 6), targets=(1, 2, 5),
            weight_float32=(False, True), seed=tuple(range(5)),
        ),
        bench={"vit_base_top5": dict(batch=16, tokens=59, width=768, layers=12, targets=5, weight_float32=True)},
        bytes_moved=lambda k: 3 * _sizes(k)[0] + 2 * _sizes(k)[1],
        flops=lambda k: 6 * k["s0"].numel() * k["weight"].numel(),
        golden="maskalign_align_loss",
        law=_law,
    )
)  # fmt: skip
