"""Self-distillation for further pre-training against golden files made by the steps of the published trainer."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of, prefer
from golden_files import Golden, find
from golden_models import count, encoder_options, load
from test_golden_dmae import each_golden, gradients

from fastkd import ops
from fastkd.methods.self_distillation import FurtherPretrainer
from fastkd.methods.teacher_vectors import precompute_teacher
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.vit import VisionTransformer

EPS = 1e-12  # of every LayerNorm; the files say it in words alone
STEPS = [file for file in find("sdfp_step") if "imgs" in file]


def models(file: Golden, dtype: torch.dtype, device: str) -> tuple[MaskedAutoencoderViT, VisionTransformer]:
    state, teacher = file.group("param"), file.group("teacher")
    eps, heads = dict(norm_eps=file.option("layernorm_eps", default=EPS)), file.option("num_attention_heads")
    student = MaskedAutoencoderViT(
        decoder_embed_dim=state["decoder_embed.weight"].shape[0], decoder_depth=count(state, "decoder_blocks."),
        decoder_num_heads=file.option("decoder_num_attention_heads"), **encoder_options(state, file, heads) | eps,
    )  # fmt: skip
    encoder = VisionTransformer(**encoder_options(teacher, file, heads) | eps)
    return load(student, state, dtype, device), load(encoder, teacher, dtype, device)


@each_golden("sdfp_distill_loss")
def test_golden_distill_loss(file: Golden, name, dtype):
    student, teacher = (file.tensor(f"{who}_cls", dtype, device_of(name)) for who in ("student", "teacher"))
    student.requires_grad_()
    with ops.backend(name):
        loss = ops.cls_distillation_loss(student, teacher)
        (grad,) = gradients(loss, [student])
    file.check("loss", loss, dtype)
    file.check("grad_student_cls", grad, dtype)


@pytest.mark.parametrize("source", ["teacher", "cache"])
@pytest.mark.parametrize(
    "file, name, dtype",
    [
        pytest.param(file, name, dtype, id=f"golden-{file.stem}-{name}-{str(dtype).removeprefix('torch.')}")
        for file in STEPS
        for name, dtype in (("reference", torch.float64), ("cpp", torch.float64), ("triton", torch.float32))
    ],
)
def test_golden_step(file: Golden, name, dtype, source):
    device = device_of(name)
    student, teacher = models(file, dtype, device)
    images, noise = (file.tensor(key, dtype, device) for key in ("imgs", "noise"))
    options = dict(mask_ratio=file.option("mask_ratio"), norm_pix_loss=file.option("norm_pix_loss"))
    with prefer(name):
        file.check("mask", ops.random_masking(*noise.shape, options["mask_ratio"], noise=noise).mask, dtype)
        file.check("student_cls", student.encode(images), dtype)
        file.check("teacher_cls", teacher.encode(images), dtype)
        if source == "teacher":
            method = FurtherPretrainer(student, "student", teacher, **options).to(dtype)
        else:
            cache = precompute_teacher(teacher, [images[:2], images[2:]])
            method = FurtherPretrainer(student, "student", teacher_cache=cache, **options)
        result = method(images, noise=noise, index=torch.arange(len(images)))
        trained = {key: p for key, p in student.named_parameters() if p.requires_grad}
        found = dict(zip(trained, gradients(result["loss"], list(trained.values()))))
    for key in ("mae_loss", "distill_loss"):
        file.check(key, result[key], dtype)
    grads = file.partner("sdfp_step", "sdfp_step_grads")
    if grads is not None:
        assert set(found) == set(grads.group("grad"))
        for key, grad in found.items():
            grads.check(f"grad/{key}", grad, dtype)
