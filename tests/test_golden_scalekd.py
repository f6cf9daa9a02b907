"""Dual-view loss and cross attention projector against golden files of the published code."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS_HERE, device_of
from golden_files import Golden, find

from fastkd import ops
from fastkd.models.cross_attention_projector import CrossAttentionProjector
from fastkd.nn import DualViewLoss

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss
LOSSES = {"spatial": 0, "alt": 1}


def each_golden(prefix: str, backends):
    rows = []
    for file in find(prefix):
        for name in backends:
            for dtype in (torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,):
                label = f"golden-{file.stem}-{name}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(file, name, dtype, id=label))
    return pytest.mark.parametrize("file, name, dtype", rows)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


@each_golden("scalekd_dfm", BACKENDS_HERE)
def test_golden_dual_view(file: Golden, name, dtype):
    device = device_of(name)
    student = file.tensor("student_tokens", dtype, device).requires_grad_()
    teacher = file.tensor("teacher_map", dtype, device)
    alpha = tuple(file.option(f"alpha_{view}") for view in LOSSES)
    with ops.backend(name):
        prepared = ops.dual_view_target(tokens_of(teacher).contiguous())
        for losses in (DualViewLoss(alpha)(student, teacher), DualViewLoss(alpha)((student, student), prepared)):
            for view, index in LOSSES.items():
                file.check(f"loss_{view}", losses[index], dtype)
                (got,) = torch.autograd.grad(UPSTREAM * losses[index], student, retain_graph=True)
                file.check(f"grad_{view}_student_tokens", got / UPSTREAM, dtype)
        # The losses are symmetric: the gradient for the teacher is that of a student in its place.
        other = file.tensor("teacher_map", dtype, device).requires_grad_()
        losses = ops.dual_view_loss(other, student.detach(), alpha=alpha, layout="map")
        for view, index in LOSSES.items():
            (got,) = torch.autograd.grad(UPSTREAM * losses[index], other, retain_graph=True)
            file.check(f"grad_{view}_teacher_map", got / UPSTREAM, dtype)


@each_golden("scalekd_dfm", ["reference"])
def test_golden_remove_dc(file: Golden, name, dtype):
    teacher = file.tensor("teacher_map", dtype)
    removed = ops.remove_dc(teacher, "map")
    file.check("teacher_dc_removed", removed, dtype)
    assert torch.equal(ops.remove_dc(tokens_of(teacher)), tokens_of(removed))
    n = teacher.shape[-1]
    k = torch.arange(n, dtype=torch.float64)
    basis = (2 * torch.cos(torch.pi * k[:, None] * (2 * k + 1) / (2 * n))).to(dtype)
    file.check("teacher_dct", basis @ teacher @ basis.T, dtype)
    assert (basis @ removed @ basis.T)[:, :, 0, 0].abs().max() < 1e-4


# Ours -> theirs; keys and values are one product here.
NAMES = {
    "stem.0": "proj_student.0", "stem.1": "proj_student.1", "query_stem.0": "proj_pos.0", "q": "pos_attention.q",
    "proj": "pos_attention.proj", "norm": "norm", "ffn.0": "ffn.layers.0.0", "ffn.2": "ffn.layers.1",
}  # fmt: skip


def published_name(name: str) -> tuple[str, ...]:
    if name in ("pos_embed", "query"):
        return (f"{name}.weight" if name == "query" else name,)
    module, _, leaf = name.rpartition(".")
    if module == "kv":
        return f"pos_attention.k.{leaf}", f"pos_attention.v.{leaf}"
    return (f"{NAMES[module]}.{leaf}",)


def projector(file: Golden, dtype: torch.dtype) -> CrossAttentionProjector:
    width, channels = (file[f"param__pos_attention.{part}.weight"].shape for part in ("proj", "k"))
    norm = "batch" if "param__proj_student.1.running_mean" in file else "layer"
    made = CrossAttentionProjector(
        channels[1], width[0], tuple(file.option("query_hw")), tuple(file.option("pos_hw")), file.option("num_heads"),
        file.option("softmax_scale"), "param__query.weight" in file, norm,
    ).to(dtype)  # fmt: skip
    state = {}
    for name, value in made.state_dict().items():
        parts = [file.tensor(f"param__{theirs}") for theirs in published_name(name)]
        state[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(value)
    made.load_state_dict(state)
    made.norm.eps = file.option("ln_eps", default=1e-5)
    made.stem[1].eps = file.option("bn_eps", default=1e-5)
    return made.train(bool(file.option("training", default=True)))


@each_golden("scalekd_cap", ["reference"])
def test_golden_cross_attention_projector(file: Golden, name, dtype):
    for case in ("learned_query", "external_query"):
        if f"{case}__output" not in file:
            continue
        model = projector(file, dtype)
        x = file.tensor("x", dtype).requires_grad_()
        query = file.tensor("query", dtype).requires_grad_() if case == "external_query" else None
        out = model(x, query)
        file.check(f"{case}__output", out, dtype)
        found = {f"grad_param__{name}": p for name, p in model.named_parameters()} | {"grad_x": x}
        if query is not None:
            found["grad_query"] = query
        gradients = torch.autograd.grad(
            (out * file.tensor("grad_output", dtype)).sum(), list(found.values()), allow_unused=True
        )
        # Biases before BatchNorm and of keys have no gradient in exact arithmetic: an error as large as a rounding of
        # the largest gradient is none.
        largest = max(abs(file[k]).max() for k in file.arrays if k.startswith(f"{case}__grad"))
        for key, gradient in zip(found, gradients):
            short = key.removeprefix("grad_param__")
            theirs = published_name(short) if short != key else (key,)
            keys = [f"{case}__grad_param__{n}" if short != key else f"{case}__{n}" for n in theirs]
            if keys[0] not in file:
                assert gradient is None and short == "query"
                continue
            want = torch.cat([file.tensor(k).double() for k in keys]).view_as(gradient)
            for got, expected in zip(gradient.chunk(len(keys)), want.chunk(len(keys))):
                allowed = max(
                    (2e-4 if dtype == torch.float32 else 2e-9) * expected.abs().max(),
                    (1e-5 if dtype == torch.float32 else 1e-9) * largest,
                )
                error = (got.double() - expected).abs().max()
                assert error <= allowed, f"{file.stem} {keys}: max error {error:.3g} > {allowed:.3g}"
