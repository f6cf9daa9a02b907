"""Feature losses against golden files of the published code: every backend, forward and every gradient."""

from __future__ import annotations

import torch
from conftest import device_of
from golden_files import Golden
from test_golden_dmae import UPSTREAM, each_golden

from fastkd import ops
from fastkd.nn import CRDLoss


def cases(file: Golden) -> list[str]:
    return sorted({key.split("__")[0] for key in file.arrays if "__" in key})


def compare(file: Golden, case: str, function, name: str, dtype: torch.dtype, symmetric: bool = False) -> None:
    """Loss and student's gradient; a symmetric loss gives the teacher's when both change places."""
    features = {side: file.tensor(f"{case}__{side}_feature", dtype, device_of(name)) for side in ("student", "teacher")}
    for side, other in (("student", "teacher"), ("teacher", "student"))[: 2 if symmetric else 1]:
        leaf = features[side].clone().requires_grad_()
        with ops.backend(name):
            loss = function(leaf, features[other])
            (grad,) = torch.autograd.grad(UPSTREAM * loss, leaf)
        file.check(f"{case}__loss", loss, dtype)
        if f"{case}__grad_{side}_feature" in file:
            file.check(f"{case}__grad_{side}_feature", grad / UPSTREAM, dtype)


@each_golden("classic_kd_feature")
def test_golden_feature_losses(file: Golden, name, dtype):
    for case in cases(file):
        kind = case.split("_")[0]
        runner = "reference" if kind in ("sp", "pkt") else name  # matrix products have no other backend
        if kind == "at":
            p = float(file[f"{case}__p"])
            compare(file, case, lambda s, t, p=p: ops.at_loss(s, t, p), runner, dtype, symmetric=True)
        elif kind == "sp":
            compare(file, case, ops.sp_loss, runner, dtype, symmetric=True)
        elif kind == "fitnet":
            compare(file, case, ops.hint_loss, runner, dtype, symmetric=True)
        else:
            assert kind == "pkt", case
            eps = float(file[f"{case}__eps"])
            compare(file, case, lambda s, t, eps=eps: ops.pkt_loss(s, t, eps=eps), runner, dtype)


@each_golden("classic_kd_rkd")
def test_golden_rkd(file: Golden, name, dtype):
    for case in cases(file):
        options = {key: float(file[f"{case}__{key}"]) for key in ("distance_weight", "angle_weight")}
        options |= dict(squared=bool(file[f"{case}__squared"]), eps=file.option("eps"))
        compare(file, case, lambda s, t, options=options: ops.rkd_loss(s, t, **options), name, dtype)


@each_golden("classic_kd_crd")
def test_golden_crd(file: Golden, name, dtype):
    device = device_of(name)
    student, teacher = (file.tensor(f"{side}_feature", dtype, device) for side in ("student", "teacher"))
    n_data = file.option("n_data")
    options = {key: file.option(key) for key in ("nce_k", "temperature", "momentum", "eps")}
    crd = CRDLoss(student.shape[1], teacher.shape[1], n_data, file["memory_v1_before"].shape[1], **options)
    crd = crd.to(device, dtype)
    with torch.no_grad():
        for side, memory in (("s", "v1"), ("t", "v2")):
            layer = getattr(crd, f"embed_{side}")
            layer.weight.copy_(file.tensor(f"embed_{side}_weight", dtype))
            layer.bias.copy_(file.tensor(f"embed_{side}_bias", dtype))
            getattr(crd, f"memory_{side}").copy_(file.tensor(f"memory_{memory}_before", dtype))
    student.requires_grad_()
    index, contrast_index = (file.tensor(key, device=device) for key in ("index", "contrast_index"))
    with ops.backend(name):
        loss = crd(student, teacher, index, contrast_index)
        grads = torch.autograd.grad(UPSTREAM * loss, [student, crd.embed_s.weight, crd.embed_t.weight])
    found = dict(loss=loss, Z_v1=crd.z_s, Z_v2=crd.z_t, memory_v1_after=crd.memory_s, memory_v2_after=crd.memory_t)
    names = ("grad_student_feature", "grad_embed_s_weight", "grad_embed_t_weight")
    found |= {key: grad / UPSTREAM for key, grad in zip(names, grads)}
    for key, value in found.items():
        file.check(key, value, dtype)
