"""Exponential moving average of many tensors in one call (mean teachers: Tarvainen & Valpola 2017, section 3; MIC,
Hoyer et al. 2023, eq. 5).

Per averaged tensor phi and current tensor theta, element by element:

    phi <- alpha phi + (1 - alpha) theta

computed as phi + w (theta - phi) where w = 1 - alpha < 1/2 and as theta - (1 - w) (theta - phi) elsewhere, like
`torch.lerp`: alpha = 1 leaves phi as it is and alpha = 0 copies theta, to the last bit. An element costs two reads and
one write; all tensors of a list are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._spec import Case, OpSpec, register, tensor_bytes

OP = "ema_update_"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill(averaged: list[Tensor], current: list[Tensor], weight: Tensor) -> None:
    for phi, theta in zip(averaged, current):
        phi.copy_(torch.lerp(phi.to(weight.dtype), theta.to(weight.dtype), weight))


# Each pair of tensors has the same elements at the same offsets; weight = 1 - alpha, 0-d, in the compute dtype.
update = Kernel(OP, reference=_fill, triton="fastkd.ops.weights.ema_update_triton:update")


@torch.library.custom_op("fastkd::ema_update_", mutates_args=("averaged",))
def _op(averaged: list[Tensor], current: list[Tensor], weight: Tensor) -> None:
    update(averaged, current, weight)


@_op.register_fake
def _(averaged, current, weight) -> None:
    return None


@torch.no_grad()
def ema_update_(averaged: Sequence[Tensor], current: Sequence[Tensor], alpha: float | Tensor) -> None:
    """Moves every averaged tensor towards its current one, in place: phi = alpha phi + (1 - alpha) theta.

    Args:
        averaged: floating tensors of any shapes, dtypes and devices, no two of which share memory. They may require
            grad: the update is not recorded.
        current: as many tensors with the same shapes and devices; a dtype may differ from that of its partner
            (float32 averages of bfloat16 weights), but float64 goes with float64 only.
        alpha: share that stays, in [0, 1]; a float, or a 0-d tensor whose value may change from call to call inside
            one CUDA graph.

    float32 arithmetic (float64 for float64), one rounding at the end. Averages in 16 bits stand still once a step is
    smaller than half a rounding: keep them in float32.

    Raises:
        ValueError: lists of different lengths, shapes or devices that do not fit, or alpha outside [0, 1].
        TypeError: tensors that are not floating, such as counters of batches: copy those.
    """
    averaged, current = list(averaged), list(current)
    if len(averaged) != len(current):
        _check.fail(OP, "current", f"{len(current)} tensors", f"{len(averaged)} like averaged")
    if isinstance(alpha, Tensor):
        _check.check_tensor(OP, "alpha", alpha, 0)
    elif not 0 <= alpha <= 1:
        _check.fail(OP, "alpha", alpha, "a number in [0, 1]")
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    detours = []
    for index, (phi, theta) in enumerate(zip(averaged, current)):
        _check_pair(index, phi, theta)
        if not _dense(phi):
            target, phi = phi, phi.contiguous()
            detours.append((target, phi))
        if theta.stride() != phi.stride():
            theta = torch.empty_like(phi, dtype=theta.dtype).copy_(theta)
        phis, thetas = groups.setdefault((phi.device, _wide(phi.dtype)), ([], []))
        phis.append(phi)
        thetas.append(theta)
    for (device, wide), (phis, thetas) in groups.items():
        if isinstance(alpha, Tensor):
            weight = (1 - alpha).to(device, wide)
        else:
            weight = torch.full((), 1 - alpha, dtype=wide, device=device)
        _op(phis, thetas, weight)
    for target, phi in detours:
        target.copy_(phi)


def _check_pair(index: int, phi: Tensor, theta: Tensor) -> None:
    for argument, tensor in (("averaged", phi), ("current", theta)):
        if not isinstance(tensor, Tensor):
            _check.fail(OP, f"{argument}[{index}]", type(tensor).__name__, "a torch.Tensor", error=TypeError)
        if tensor.dtype not in _check.FLOATS:
            got = str(tensor.dtype).removeprefix("torch.")
            _check.fail(OP, f"{argument}[{index}]", got, "a floating tensor", "copy such buffers", TypeError)
    if phi.shape != theta.shape:
        _check.fail(OP, f"current[{index}]", f"shape {tuple(theta.shape)}", f"{tuple(phi.shape)} like averaged")
    if phi.device != theta.device:
        _check.fail(OP, f"current[{index}]", f"device {theta.device}", f"{phi.device} like averaged")
    if (phi.dtype == torch.float64) != (theta.dtype == torch.float64):
        got = f"{theta.dtype} beside {phi.dtype}".replace("torch.", "")
        _check.fail(OP, f"current[{index}]", got, "float64 on both sides or on none", "cast one of them", TypeError)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory (in torch's usual orders), so that offsets alone find them."""
    if tensor.is_contiguous():
        return True
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.ndim in orders and tensor.is_contiguous(memory_format=orders[tensor.ndim])


# The spec's function takes flat tensors, cuts them into `pieces` tensors of unequal sizes and returns the average after
# `steps` updates: lists that are changed in place would not survive a comparison of backends.


def cut(flat: Tensor, pieces: int) -> list[Tensor]:
    """Tensors of about 1, 2 ... `pieces` shares of the elements."""
    unit = 2 * flat.shape[0] // (pieces * (pieces + 1))
    sizes = [unit * (i + 1) for i in range(pieces - 1)]
    return list(flat.split([*sizes, flat.shape[0] - sum(sizes)]))


def _updated(averaged: Tensor, current: Tensor, alpha: float, pieces: int, steps: int) -> Tensor:
    _check.check_tensor(OP, "averaged", averaged, 1)
    _check.check_tensor(OP, "current", current, 1)
    averaged = averaged.clone()
    for _ in range(steps):
        ema_update_(cut(averaged, pieces), cut(current, pieces), alpha)
    return averaged


def _reference(averaged: Tensor, current: Tensor, alpha: float, pieces: int, steps: int) -> Tensor:
    averaged = averaged.clone()
    for _ in range(steps):
        for phi, theta in zip(cut(averaged, pieces), cut(current, pieces)):
            phi.mul_(alpha).add_(theta, alpha=1 - alpha)
    return averaged


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    count = case["batch"] * case["width"]
    averaged, current = (torch.randn(count, generator=random) for _ in range(2))
    current_dtype = torch.bfloat16 if case.get("current_bfloat16") and dtype != torch.float64 else dtype
    return dict(
        averaged=averaged.to(device, dtype), current=current.to(device, current_dtype), alpha=case["alpha"],
        pieces=case["pieces"], steps=case["steps"],
    )  # fmt: skip


def _law(kwargs: dict) -> None:
    """alpha = 1 keeps the average and alpha = 0 copies the current values, bit for bit."""
    averaged, current, pieces, steps = (kwargs[name] for name in ("averaged", "current", "pieces", "steps"))
    assert torch.equal(_updated(averaged, current, 1.0, pieces, steps), averaged)
    assert torch.equal(_updated(averaged, current, 0.0, pieces, 1), current.to(averaged.dtype))


SPEC = register(
    OpSpec(
        name=OP,
        function=_updated,
        reference=_reference,
        kernels=(update,),
        build=_build,
        differentiable=(),
        cases={
            "pieces": dict(batch=3, width=67, alpha=0.9, pieces=4, steps=2),
            "one": dict(batch=1, width=1, alpha=0.5, pieces=1, steps=1),
            "chunks": dict(batch=5, width=4001, alpha=0.3, pieces=3, steps=1),
            "current_bfloat16": dict(batch=2, width=70, alpha=0.99, pieces=5, steps=3, current_bfloat16=True),
        },
        space=dict(
            batch=(1, 2, 5), width=(1, 16, 130, 4096), alpha=(0.0, 0.3, 0.9, 0.999, 1.0), pieces=(1, 3, 8),
            steps=(1, 3), current_bfloat16=(False, True), seed=tuple(range(3)),
        ),
        bench={"vit_small": dict(batch=22, width=1_000_000, alpha=0.999, pieces=150, steps=8)},
        bytes_moved=lambda k: (2 + 2 * k["steps"]) * tensor_bytes(k["averaged"])
        + k["steps"] * tensor_bytes(k["current"]),
        flops=lambda k: 3 * k["steps"] * k["averaged"].numel(),
        golden="mic_ema",
        law=_law,
    )
)  # fmt: skip
