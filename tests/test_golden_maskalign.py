"""MaskAlign against golden files of the published code: every backend, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import backends_of, device_of
from golden_files import Golden, find

from fastkd import ops
from fastkd.nn import DynamicAlignment
from fastkd.ops.features.gather_whiten import NORMS

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss, so that a kernel that ignores the upstream gradient fails
LOSS_NAMES = {"smoothl1": "smooth_l1", "l2": "l2", "l1": "l1"}


def each_golden(prefix: str, *op_names: str):
    """Parametrises over files x backends that all of these ops have x dtypes."""
    backends = [name for name in ops.BACKENDS if all(name in backends_of(ops.SPECS[op]) for op in op_names)]
    rows = [
        pytest.param(file, name, dtype, id=f"golden-{file.stem}-{name}-{str(dtype).removeprefix('torch.')}")
        for file in find(prefix)
        for name in backends
        for dtype in ((torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,))
    ]
    return pytest.mark.parametrize("file, name, dtype", rows)


def layers(file: Golden, name: str) -> int:
    """How many keys name_0, name_1, ... there are."""
    return next(index for index in range(10_000) if f"{name}_{index}" not in file)


@each_golden("maskalign_teacher_target", "gather_whiten_smooth_l1")
def test_golden_teacher_target(file: Golden, name, dtype):
    device = device_of(name)
    hidden = [file.tensor(f"hidden_state_{i}", dtype, device) for i in range(layers(file, "hidden_state"))][1:]
    ids = file.tensor("ids_keep", device=device)
    for norm in NORMS:
        if f"target_{norm}_0" not in file:
            continue
        for index, target in enumerate(ops.teacher_targets(hidden, ids, norm)):
            file.check(f"target_{norm}_{index}", target, dtype)
        # The op makes the same targets inside: a zero student is as far from them as their own square mean.
        for index, states in enumerate(hidden):
            target = file.tensor(f"target_{norm}_{index}", torch.float64)
            with ops.backend(name):
                zeros = torch.zeros_like(target, dtype=dtype, device=device)
                loss = ops.gather_whiten_smooth_l1(zeros, states, ids, norm, "l2")
            relative = 2e-7 if dtype == torch.float64 else 1e-5
            assert loss.item() == pytest.approx(target.square().mean().item(), rel=relative)


@each_golden("maskalign_align_loss", "layer_mix", "gather_whiten_smooth_l1", "linear")
def test_golden_align_loss(file: Golden, name, dtype):
    device = device_of(name)
    count, wide = layers(file, "student"), layers(file, "target")
    targets = [file.tensor(f"target_{i}", dtype, device) for i in range(wide)]
    cases = [key.removeprefix("loss_") for key in file.arrays if key.startswith("loss_")]
    assert cases
    for case in cases:
        fusion, loss, weights = case.split("_", 2)
        states = [file.tensor(f"student_{i}", dtype, device).requires_grad_() for i in range(count)]
        width = file[f"head_weight_{0}"].shape
        align = DynamicAlignment(count, wide, width[1], width[0], fusion, "linear", weights, LOSS_NAMES[loss])
        align.to(device, dtype)
        with torch.no_grad():
            for index, head in align.heads.items():
                head.weight.copy_(file.tensor(f"head_weight_{index}"))
                head.bias.copy_(file.tensor(f"head_bias_{index}"))
            if align.align_weights is not None:
                align.align_weights.copy_(file.tensor("align_weights"))
        # What is not used is not looked at.
        given = [target if index in align.used else None for index, target in enumerate(targets)]
        with ops.backend(name):
            total = align(states, given)
            inputs = [*states, *align.parameters()]
            found = torch.autograd.grad(UPSTREAM * total, inputs, allow_unused=True)
        file.check(f"loss_{case}", total, dtype)
        by_name = {f"student_{i}": grad for i, grad in enumerate(found)}
        by_name |= {key: grad for (key, _), grad in zip(align.named_parameters(), found[count:])}
        for index in range(count):
            check_gradient(file, f"grad_student_{index}_{case}", by_name[f"student_{index}"], dtype)
        for index in range(wide):
            check_gradient(file, f"grad_head_weight_{index}_{case}", by_name.get(f"heads.{index}.weight"), dtype)
        if align.align_weights is not None:
            check_gradient(file, f"grad_align_weights_{case}", by_name["align_weights"], dtype)


def check_gradient(file: Golden, key: str, grad: torch.Tensor | None, dtype: torch.dtype) -> None:
    if grad is None:  # no path, or a head that does not exist: the file must say zero
        assert not file[key].any(), key
    else:
        file.check(key, grad / UPSTREAM, dtype)


@each_golden("maskalign_attention_mask", "random_masking")
def test_golden_attention_mask(file: Golden, name, dtype):
    device = device_of(name)
    importance, noise = (file.tensor(key, dtype, device) for key in ("importance", "exp_noise"))
    with ops.backend(name):
        masking = ops.attention_masking(importance, file.option("mask_ratio"), exp_noise=noise)
    for key in ("ids_shuffle", "ids_keep"):
        file.check(key, getattr(masking, key), dtype)
    x = file.tensor("x", dtype, device)
    file.check("x_masked", x.gather(1, masking.ids_keep[:, :, None].expand(-1, -1, x.shape[2])), dtype)


@pytest.mark.parametrize("file", find("maskalign_attention_mask"), ids=lambda file: f"golden-{file.stem}")
def test_golden_importance(file: Golden):
    """The stored scores come back from queries and keys that have them as logarithms."""
    attention = file.tensor("attention_last", torch.float64)[:, :, 0]  # [B, heads, 1 + L]
    key = attention.log()[..., None]  # one number per head and token
    found = ops.cls_attention_row(torch.ones_like(key[:, :, 0]), key, 1.0)
    # Both are stored in float32, the scores before they are averaged.
    torch.testing.assert_close(found, file.tensor("importance", torch.float64), rtol=2e-7, atol=0)
