"""Losses of a linear head, and of class vectors, against golden files: every backend, forward and every gradient."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE, device_of
from golden_files import Golden, find

from fastkd import ops
from fastkd.ops.logits.linear_topk import MODES

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss, so that a backward that ignores the upstream gradient fails


def each_golden(prefix: str):
    """Parametrises over files x backends x dtypes; float64 only where the backend computes in it."""
    rows = []
    for file in find(prefix):
        for name in BACKENDS_HERE:
            for dtype in (torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,):
                label = f"golden-{file.stem}-{name}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(file, name, dtype, id=label))
    return pytest.mark.parametrize("file, name, dtype", rows)


def tensors(file: Golden, dtype: torch.dtype, backend: str, wanted: tuple[str, ...], *others: str) -> dict:
    """Tensors by their keys, those that the file has; the wanted ones require grad."""
    found = {k: file.tensor(k, dtype, device_of(backend)) for k in (*wanted, *others) if k in file}
    return {k: v.requires_grad_(k in wanted) for k, v in found.items()}


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor], upstream=None) -> list[torch.Tensor]:
    above = torch.full_like(loss, UPSTREAM) if upstream is None else UPSTREAM * upstream.to(loss)
    return [g / UPSTREAM for g in torch.autograd.grad(loss, inputs, above)]


def check_all(file: Golden, start: str, loss, inputs: dict, dtype: torch.dtype, upstream=None, rounded=False) -> None:
    """The loss, and the gradients that the file has, under keys that begin with `start`."""
    file.check(f"{start}loss", loss, dtype, rounded)
    for key, gradient in zip(inputs, gradients(loss, list(inputs.values()), upstream)):
        if f"{start}grad_{key}" in file:
            check_close(file, f"{start}grad_{key}", gradient, dtype, rounded)


def check_close(file: Golden, key: str, got: torch.Tensor, dtype: torch.dtype, rounded: bool = False) -> None:
    if not rounded:
        return file.check(key, got, dtype)
    want = file.tensor(key).double()  # made partly in float32 by its source
    error = (got.detach().cpu().double() - want).abs().max() / want.abs().max()
    assert error <= (1e-5 if dtype == torch.float64 else 2e-4), f"{file.stem} {key} in {dtype}: error {error:.3g}"


@each_golden("lm_distill_linear_ce")
def test_golden_linear_cross_entropy(file: Golden, name, dtype):
    inputs = tensors(file, dtype, name, ("hidden", "weight", "bias"))
    target = file.tensor("targets", device=device_of(name))
    options = dict(
        label_smoothing=file.option("label_smoothing", default=0.0), reduction=file.option("reduction", default="mean"),
        ignore_index=file.option("ignore_index", default=-100), chunk_size=5,
    )  # fmt: skip
    with ops.backend(name):
        loss = ops.linear_cross_entropy(inputs["hidden"], inputs["weight"], target, inputs.get("bias"), **options)
        check_all(file, "", loss, inputs, dtype, file.tensor("upstream_grad", dtype, target.device))


STUDENT = ("student_hidden", "student_weight", "student_bias")
TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")


@each_golden("lm_distill_linear_jsd")
@pytest.mark.parametrize("stored", [False, True], ids=["teacher-head", "teacher-logits"])
def test_golden_linear_jsd(file: Golden, name, dtype, stored):
    inputs = tensors(file, dtype, name, STUDENT)
    teacher = tensors(file, dtype, name, (), *TEACHER)
    target = file.tensor("targets", device=device_of(name))
    if stored:
        known = dict(teacher_logits=F.linear(*(teacher[k] for k in TEACHER if k in teacher)))
    else:
        known = {k.replace("hidden", "input"): v for k, v in teacher.items()}

    def run(**options):
        return ops.linear_jsd(
            inputs["student_hidden"], inputs["student_weight"], target=target, student_bias=inputs.get("student_bias"),
            temperature=file.option("temperature", default=1.0), ignore_index=file.option("ignore_index", default=-100),
            **known, chunk_size=8, **options,
        )  # fmt: skip

    with ops.backend(name):
        for case in sorted({m[1] for m in map(re.compile(r"(beta[\d.]+)_loss$").match, file.arrays) if m}):
            beta = float(case.removeprefix("beta"))
            check_all(file, f"{case}_", run(beta=beta), inputs, dtype)
            file.check(f"{case}_per_token", run(beta=beta, reduction="none"), dtype)
        if "combo_loss" in file:
            check_all(file, "combo_", run(beta=0.5, ce_weight=0.4, jsd_weight=0.6), inputs, dtype)


@each_golden("classic_kd_fused_linear_jsd")
def test_golden_fused_linear_jsd(file: Golden, name, dtype):
    cases = [""] if "student_input" in file else sorted({k.split("__")[0] + "__" for k in file.arrays if "__" in k})
    for case in cases:
        names = ("student_input", "student_weight", "student_bias")
        inputs = {k: file.tensor(case + k, dtype, device_of(name)).requires_grad_() for k in names if case + k in file}
        others = ("teacher_input", "teacher_weight", "teacher_bias", "target")
        known = {k: file.tensor(case + k, dtype, device_of(name)) for k in others if case + k in file}
        option = {k: file.option(case + k, k) for k in ("beta", "temperature", "weight_hard_loss", "weight_soft_loss")}
        option["ignore_index"] = file.option("ignore_index", default=-100)
        with ops.backend(name):
            if f"{case}soft_only__loss" in file:
                alone = option | dict(weight_hard_loss=0.0, weight_soft_loss=1.0)
                check_all(file, f"{case}soft_only__", ops.fused_linear_jsd(**inputs, **known, **alone), inputs, dtype)
            if f"{case}weighted__loss" in file:
                loss = ops.fused_linear_jsd(**inputs, **known, **option, chunk_size=3)
                check_all(file, f"{case}weighted__", loss, inputs, dtype, rounded=True)


@each_golden("lm_distill_topk_kl")
@pytest.mark.parametrize("mode", MODES)
def test_golden_topk_kl(file: Golden, name, dtype, mode):
    inputs = tensors(file, dtype, name, STUDENT)
    known = tensors(file, dtype, name, (), "topk_ids", "topk_logprobs")
    target = file.tensor("targets", device=device_of(name))

    def run(**options):
        return ops.linear_kl(
            inputs["student_hidden"], inputs["student_weight"], target=target, student_bias=inputs.get("student_bias"),
            topk_mode=mode, ignore_index=file.option("ignore_index", default=-100), **known, chunk_size=6, **options,
        )  # fmt: skip

    with ops.backend(name):
        check_all(file, f"{mode}_", run(), inputs, dtype)
        file.check(f"{mode}_per_token", run(reduction="none"), dtype)


@each_golden("promptkd_loss")
def test_golden_class_vector_kd(file: Golden, name, dtype):
    """The projector is the published one, of 1 x 1 convolutions, as linear layers."""
    device = device_of(name)
    feature = file.tensor("student_feature", dtype, device).requires_grad_()
    keys = [k for k in file.arrays if k.startswith("param__") and file[k].dtype.kind == "f" and "running" not in k]
    parameters = {k.removeprefix("param__"): file.tensor(k, dtype, device).requires_grad_() for k in keys}
    flat = {k.removeprefix("conv1."): v.flatten(1) if v.ndim == 4 else v for k, v in parameters.items()}
    mean, var = (file.tensor(f"param__conv1.1.running_{k}", dtype, device) for k in ("mean", "var"))
    training = bool(file.option("bn_training", default=True))
    hidden = F.batch_norm(
        F.linear(feature, flat["0.weight"], flat["0.bias"]), mean, var, flat["1.weight"], flat["1.bias"], training,
        eps=file.option("bn_eps", default=1e-5),
    )  # fmt: skip
    projected = F.linear(hidden.relu(), flat["3.weight"], flat["3.bias"])
    text, logits = (file.tensor(k, dtype, device) for k in ("text_features", "teacher_logits"))
    options = dict(
        teacher_logits=logits, logit_scale=file.option("logit_scale"), temperature=file.option("temperature")
    )
    with ops.backend(name):
        loss = ops.class_vector_kd(projected, text, weight=file.option("kd_weight"), **options)
        found = gradients(loss, [feature, *parameters.values()])
        file.check("loss", loss, dtype)
        file.check("loss_unweighted", ops.class_vector_kd(projected, text, **options), dtype)
        batchmean = ops.class_vector_kd(
            projected, text, weight=file.option("kd_weight") / len(text), reduction="batchmean", **options
        )
        file.check("loss", batchmean, dtype)
    file.check("student_image_feature_normalized", F.normalize(projected, dim=1), dtype)
    scale = max(g.abs().max().item() for g in found)
    for key, gradient in zip(["grad_student_feature", *(f"grad_param__{k}" for k in parameters)], found):
        # Zero in exact arithmetic where the batch is centred behind it: compared with the other gradients.
        if training and key.endswith("conv1.0.bias"):
            assert gradient.abs().max() <= (1e-9 if dtype == torch.float64 else 1e-4) * scale
        else:
            file.check(key, gradient, dtype)
