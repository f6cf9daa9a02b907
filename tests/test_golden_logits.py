"""Golden files of the logit losses: numbers of the published code, every backend, both gradients."""

from __future__ import annotations

import golden_files
import pytest
import torch
from conftest import backends_of, device_of
from golden_files import Golden

from fastkd import ops
from fastkd.ops import SPECS, backend

BACKENDS = backends_of(SPECS["logit_loss"])
RUNS = [(b, d) for b in BACKENDS for d in (torch.float32, torch.float64) if (b, d) != ("triton", torch.float64)]
each_run = pytest.mark.parametrize("name, dtype", RUNS, ids=[f"{b}-{str(d)[6:]}" for b, d in RUNS])


class Part:
    """One case of a file: the keys ``<case>__<key>``."""

    def __init__(self, golden: Golden, case: str) -> None:
        self.golden, self.case = golden, case

    def __contains__(self, key: str) -> bool:
        return f"{self.case}__{key}" in self.golden

    def number(self, key: str) -> float:
        return self.golden[f"{self.case}__{key}"].item()

    def tensor(self, key: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        return self.golden.tensor(f"{self.case}__{key}", dtype, device)

    def check(self, key: str, got: torch.Tensor, dtype: torch.dtype) -> None:
        self.golden.check(f"{self.case}__{key}", got, dtype)


def cases(prefix: str, start: str = "") -> list:
    found = []
    for golden in golden_files.find(prefix):
        names = sorted({key.split("__")[0] for key in golden.arrays if "__" in key})
        found += [pytest.param(Part(golden, n), id=f"{golden.stem}-{n}") for n in names if n.startswith(start)]
    return found


def check(part: Part, loss_of, name: str, dtype: torch.dtype, teacher: bool = True) -> None:
    """The fused op with the student's gradient, then the plain path with both."""
    device = device_of(name)
    for teacher_grad in (False, True):
        wanted = ["student_logits"] + ["teacher_logits"] * teacher_grad
        tensors = {key: part.tensor(key, dtype, device) for key in ("student_logits", "teacher_logits")}
        leaves = [tensors[key].requires_grad_() for key in wanted]
        with backend(name):
            loss = loss_of(**tensors, teacher_grad=teacher_grad)
            gradients = torch.autograd.grad(loss, leaves)
        part.check("loss", loss, dtype)
        for key, gradient in zip(wanted, gradients):
            if f"grad_{key}" in part:
                part.check(f"grad_{key}", gradient, dtype)


@each_run
@pytest.mark.parametrize("part", cases("classic_kd_kl"))
def test_golden_kl(part, name, dtype):
    temperature = part.number("temperature")
    check(part, lambda **logits: ops.kd_loss(**logits, temperature=temperature), name, dtype)


@each_run
@pytest.mark.parametrize("part", cases("classic_kd_extra", "kdce"))
def test_golden_ce_and_kl(part, name, dtype):
    options = dict(
        temperature=part.number("temperature"), ce_weight=part.number("alpha"), kd_weight=part.number("beta")
    )
    target = part.tensor("target", dtype, device_of(name))
    check(part, lambda **logits: ops.kd_loss(**logits, target=target, **options), name, dtype)


@each_run
@pytest.mark.parametrize("part", cases("classic_kd_dkd"))
def test_golden_dkd(part, name, dtype):
    options = {key: part.number(key) for key in ("temperature", "alpha", "beta")}
    device = device_of(name)
    target = part.tensor("target", dtype, device)
    check(part, lambda **logits: ops.dkd_loss(**logits, target=target, **options), name, dtype)
    logits = {key: part.tensor(key, dtype, device) for key in ("student_logits", "teacher_logits")}
    with backend(name):
        for key, weights in {"loss_tckd": (1.0, 0.0), "loss_nckd": (0.0, 1.0)}.items():
            options |= dict(alpha=weights[0], beta=weights[1])
            part.check(key, ops.dkd_loss(**logits, target=target, **options), dtype)


@each_run
@pytest.mark.parametrize("part", cases("classic_kd_gjsd"))
def test_golden_jsd(part, name, dtype):
    word = part.case.split("_")[-1]  # the reduction is in no key
    options = dict(
        beta=part.number("beta"), temperature=part.number("temperature"),
        reduction=word if word in ("mean", "sum", "none") else "batchmean",
    )  # fmt: skip
    if "labels" in part:
        options["labels"] = part.tensor("labels", dtype, device_of(name))
    check(part, lambda **logits: ops.jsd_loss(**logits, **options), name, dtype)


@each_run
@pytest.mark.parametrize("part", cases("nkd_loss"))
def test_golden_nkd(part, name, dtype):
    device, gamma = device_of(name), part.number("gamma")
    target, temperature = part.tensor("target", dtype, device), part.number("temperature")

    def parts(first: float, second: float, **logits) -> torch.Tensor:
        return ops.logit_loss(**logits, target=target, nkd=(first, second), temperature=temperature)

    check(part, lambda **x: ops.nkd_loss(**x, target=target, temperature=temperature, gamma=gamma), name, dtype)
    logits = {key: part.tensor(key, dtype, device) for key in ("student_logits", "teacher_logits")}
    with backend(name):
        part.check("loss_target_part", parts(1.0, 0.0, **logits), dtype)
        part.check("loss_nontarget_part", parts(0.0, gamma, **logits), dtype)


@each_run
@pytest.mark.parametrize("golden", [pytest.param(g, id=g.stem) for g in golden_files.find("mic_cls_consistency")])
def test_golden_weighted_cross_entropy(golden, name, dtype):
    """MIC: every image's cross-entropy is weighted, and the mean is over all images."""
    device = device_of(name)
    student = golden.tensor("student_logits", dtype, device).requires_grad_()
    with backend(name):
        loss = ops.logit_loss(
            student, target=golden.tensor("pseudo_label", dtype, device), ce=1.0,
            sample_weight=golden.tensor("pseudo_weight", dtype, device),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, student)
    golden.check("loss", loss, dtype)
    golden.check("grad_student_logits", gradient, dtype)
