"""Ops of DMAE against golden files of the published code: every backend, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE, device_of
from golden_files import Golden, find

from fastkd import ops
from fastkd.models.positions import sincos_table
from fastkd.ops.masked.random_masking import num_visible

UPSTREAM = 2.5  # gradients are taken of UPSTREAM * loss, so that a kernel that ignores the upstream gradient fails


def each_golden(prefix: str):
    """Parametrises over files x backends x dtypes; float64 only where the backend computes in it."""
    rows = []
    for file in find(prefix):
        for name in BACKENDS_HERE:
            for dtype in (torch.float32, torch.float64) if name in ("reference", "cpp") else (torch.float32,):
                label = f"golden-{file.stem}-{name}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(file, name, dtype, id=label))
    return pytest.mark.parametrize("file, name, dtype", rows)


def each_file(prefix: str):
    return pytest.mark.parametrize("file", [pytest.param(f, id=f"golden-{f.stem}") for f in find(prefix)])


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [g / UPSTREAM for g in torch.autograd.grad(UPSTREAM * loss, inputs)]


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(int(v) for v in value)


@each_golden("dmae_random_masking")
def test_golden_random_masking(file: Golden, name, dtype):
    for case in file.suffixes("noise"):
        noise = file.tensor(f"noise{case}", device=device_of(name))
        if noise.dtype == torch.float64 and name not in ("reference", "cpp"):
            pytest.skip("float64 noise")
        ratio = file.option(f"mask_ratio{case}", "mask_ratio", "ratio")
        with ops.backend(name):
            masking = ops.random_masking(*noise.shape, ratio, noise=noise)
        found = dict(masking._asdict(), ids_masked=masking.ids_masked)
        x_key = f"x{case}"
        if x_key in file:
            x = file.tensor(x_key, dtype, noise.device)
            found["x_masked"] = x.gather(1, masking.ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
        for key, value in found.items():
            if key + case in file:
                file.check(key + case, value, dtype)
        assert file.tensor(f"mask{case}").sum() == masking.mask.sum()


@each_file("dmae_random_masking")
def test_golden_visible_count(file: Golden):
    for case in file.suffixes("len_keep_table"):
        table, patches, ratios = (file.tensor(f"len_keep_{part}{case}") for part in ("table", "L", "ratio"))
        got = [[num_visible(count, ratio) for ratio in ratios.tolist()] for count in patches.tolist()]
        assert got == table.tolist()


@each_file("dmae_patchify")
def test_golden_patchify(file: Golden):
    for case in file.suffixes("imgs"):
        images = file.tensor(f"imgs{case}")
        patch = pair(file.option(f"patch_size{case}", "patch_size", "p"))
        patches = ops.patchify(images, patch)
        grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
        assert torch.equal(patches, file.tensor(f"patches{case}"))
        assert torch.equal(ops.unpatchify(patches, patch, grid), images)


@each_file("dmae_pos_embed")
def test_golden_pos_embed(file: Golden):
    for case in file.suffixes("pos_embed"):
        want = file.tensor(f"pos_embed{case}")
        grid = pair(file.option(f"grid{case}", "grid"))
        prefix = want.shape[-2] - grid[0] * grid[1]
        got = sincos_table(file.option(f"dim{case}", "dim", default=want.shape[-1]), grid, prefix)
        file.check(f"pos_embed{case}", got.reshape(want.shape), torch.float64)


@each_golden("dmae_pixel_loss")
def test_golden_pixel_loss(file: Golden, name, dtype):
    device = device_of(name)
    images, pred, mask = (file.tensor(key, dtype, device) for key in ("imgs", "pred", "mask"))
    patch = pair(file.option("patch_size", "p"))
    eps = file.option("eps", "norm_pix_eps", default=1e-6)
    pred.requires_grad_()
    for case in file.suffixes("loss"):
        norm = "normpix" in case or (case == "" and bool(file.option("norm_pix_loss", "normpix", default=False)))
        with ops.backend(name):
            loss = ops.masked_pixel_loss(pred, images, mask, patch, norm, eps)
            (grad,) = gradients(loss, [pred])
        file.check(f"loss{case}", loss, dtype)
        file.check(f"grad_pred{case}", grad, dtype)
        counts = mask.sum(1).unique()
        if len(counts) == 1:  # the same rows, predicted for masked patches only, in another order
            ids = mask.argsort(dim=1, descending=True)[:, : int(counts)].flip(1)
            rows = ids[:, :, None].expand(-1, -1, pred.shape[2])
            few = pred.detach().gather(1, rows).requires_grad_()
            with ops.backend(name):
                loss = ops.masked_pixel_loss(few, images, ids, patch, norm, eps)
                (grad,) = gradients(loss, [few])
            file.check(f"loss{case}", loss, dtype)
            file.check(f"grad_pred{case}", torch.zeros_like(pred).scatter(1, rows, grad), dtype)


def mlp(student: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = F.gelu(F.linear(student, weights["mlp_fc1_weight"], weights.get("mlp_fc1_bias")))
    return F.linear(hidden, weights["mlp_fc2_weight"], weights.get("mlp_fc2_bias"))


@each_golden("dmae_distill_loss")
def test_golden_distill_loss(file: Golden, name, dtype):
    """Keys are loss_X (linear projection), loss_noproj_X (raw features) and loss_mlp_X, X the criterion."""
    teacher = file.tensor("feature_teacher", dtype, device_of(name))
    cases = file.suffixes("loss")
    for case in cases:
        criterion = case.rpartition("_")[2]
        kind = "mlp" if case.startswith("_mlp_") else "noproj" if case.startswith("_noproj_") else "linear"
        student_key = (
            "feature_student_noproj" if kind == "noproj" and "feature_student_noproj" in file else "feature_student"
        )
        weights = {
            "linear": [k for k in ("proj_weight", "proj_bias") if k in file],
            "mlp": [k for k in file.arrays if k.startswith("mlp_fc")],
            "noproj": [],
        }[kind]
        tensors = {k: file.tensor(k, dtype, teacher.device).requires_grad_() for k in [student_key, *weights]}
        student = tensors[student_key]
        if kind == "mlp":
            projection, student = {}, mlp(student, tensors)
        else:
            projection = dict(weight=tensors.get("proj_weight"), bias=tensors.get("proj_bias"))
        with ops.backend(name):
            loss = ops.feature_alignment_loss(
                student, teacher, **projection, loss=criterion.lower(), normalize=kind != "noproj"
            )
            found = dict(zip(tensors, gradients(loss, list(tensors.values()))))
        file.check(f"loss{case}", loss, dtype)
        only_mlp = kind == "mlp" and sum(c.startswith("_mlp_") for c in cases) == 1
        for key, grad in found.items():
            stored = {f"grad_{key}{case}"} if kind == "mlp" else {f"grad_{key}_{criterion}"}
            if kind == "mlp" and key != student_key:
                stored |= {f"grad_{key}_{criterion}"} | ({f"grad_{key}"} if only_mlp else set())
            for name_in_file in stored & file.arrays.keys():
                file.check(name_in_file, grad, dtype)
