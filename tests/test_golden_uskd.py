"""USKD, DIST and logit standardisation against golden files of the published code: every backend, every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of
from golden_files import Golden, find

from fastkd import ops
from fastkd.ops import SPECS
from fastkd.ops.logits import uskd

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss, so that a kernel that ignores the upstream gradient fails


def each_case(prefix: str, op: str, start: str = ""):
    """Parametrises over files x cases x backends x dtypes; float64 only where the backend computes in it."""
    rows = []
    for file in find(prefix):
        names = sorted({key.split("__")[0] for key in file.arrays if "__" in key and key.startswith(start)})
        for case in names:
            for name in backends_of(SPECS[op]):
                for dtype in (torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,):
                    label = f"golden-{file.stem}-{case}-{name}-{str(dtype).removeprefix('torch.')}"
                    rows.append(pytest.param(file, case, name, dtype, id=label))
    return pytest.mark.parametrize("file, case, name, dtype", rows)


def inputs(file: Golden, case: str, dtype, device, *names: str) -> list[torch.Tensor]:
    return [file.tensor(f"{case}__{name}", dtype, device).requires_grad_() for name in names]


def options(file: Golden, case: str, **names: str) -> dict[str, float]:
    return {ours: float(file[f"{case}__{theirs}"]) for ours, theirs in names.items()}


@each_case("uskd_loss", "uskd_loss")
def test_golden_uskd(file: Golden, case, name, dtype):
    names = ("feature_mid", "student_logits", "fc_weight", "fc_bias")
    tensors = inputs(file, case, dtype, device_of(name), *names)
    feature, logits, weight, bias = tensors
    target = file.tensor(f"{case}__target", dtype, device_of(name))
    module = ops.logits.uskd.USKDLoss(
        weight.shape[1], weight.shape[0], **options(file, case, alpha="alpha", beta="beta", mu="mu")
    )
    module = module.to(feature)
    state = dict(zip(("fc.weight", "fc.bias"), (weight, bias)))
    with ops.backend(name):
        loss = torch.func.functional_call(module, state, (feature, logits, target))
        grads = torch.autograd.grad(UPSTREAM * loss, tensors)
        weak, none = F.linear(feature, weight, bias), dict(alpha=0, beta=0, mu=0)
        parts = {
            part: ops.uskd_loss(logits, weak, target, **{**none, one: 1})
            for part, one in (("loss_target", "alpha"), ("loss_nontarget", "beta"), ("loss_weak_over_mu", "mu"))
        }  # fmt: skip
    for key, value in dict(parts, loss=loss).items():
        file.check(f"{case}__{key}", value, dtype)
    for key, grad in zip(names, grads):
        file.check(f"{case}__grad_{key}", grad / UPSTREAM, dtype)


@pytest.mark.parametrize("file", find("uskd_loss"), ids=lambda f: f.stem)
def test_golden_constants(file: Golden):
    assert file.option("label_smoothing_of_weak_loss", default=uskd.SMOOTHING) == uskd.SMOOTHING
    assert file.option("rank_eps", default=uskd.RANK_EPS) == uskd.RANK_EPS


def check_pair(file: Golden, case: str, loss, tensors, dtype) -> None:
    file.check(f"{case}__loss", loss, dtype)
    for side, grad in zip(("student", "teacher"), torch.autograd.grad(UPSTREAM * loss, tensors)):
        file.check(f"{case}__grad_{side}_logits", grad / UPSTREAM, dtype)


@each_case("classic_kd_extra", "dist_loss", "dist_")
def test_golden_dist(file: Golden, case, name, dtype):
    tensors = inputs(file, case, dtype, device_of(name), "student_logits", "teacher_logits")
    settings = options(file, case, beta="beta", gamma="gamma", temperature="tau", eps="eps")
    with ops.backend(name):
        check_pair(file, case, ops.dist_loss(*tensors, **settings, teacher_grad=True), tensors, dtype)


@each_case("classic_kd_extra", "logit_standardization", "logitstd_")
def test_golden_standardized_kd(file: Golden, case, name, dtype):
    tensors = inputs(file, case, dtype, device_of(name), "student_logits", "teacher_logits")
    settings = options(file, case, temperature="temperature", ce_weight="alpha", kd_weight="beta", eps="eps")
    target = file.tensor(f"{case}__target", device=device_of(name))
    with ops.backend(name):
        loss = ops.standardized_kd_loss(*tensors, target, **settings, teacher_grad=True)
        check_pair(file, case, loss, tensors, dtype)
