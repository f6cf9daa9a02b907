"""Models and method against golden files, with all exact savings on: features, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of, prefer
from golden_files import Golden
from golden_models import HEADS, StoredTeacher, dmae, noise_of, student_mae, teacher_vit
from test_golden_dmae import UPSTREAM, each_file, each_golden

from fastkd import ops
from fastkd.models.teacher import Teacher
from fastkd.train.schedule import lr_at

share = pytest.mark.parametrize("share_first_block", [False, True], ids=["separate", "shared"])


def inputs(file: Golden, name: str, dtype: torch.dtype):
    """(device, images, mask ratio) of a file; the ratio is checked against the stored mask."""
    device = device_of(name)
    visible, patches = file["ids_keep"].shape[1], file["mask"].shape[1]
    ratio = file.option("ratio", "mask_ratio", default=1 - visible / patches)
    assert int(patches * (1 - ratio)) == visible
    return device, file.tensor("imgs", dtype, device), ratio


@each_golden("dmae_teacher_forward")
def test_golden_teacher_forward(file: Golden, name, dtype):
    device, images, ratio = inputs(file, name, dtype)
    model = teacher_vit(file, dtype, device)
    blocks = tuple(file.option("al_t"))
    with prefer(name):
        masking = ops.random_masking(len(images), model.num_patches, ratio, noise=noise_of(file, device))
        for key in ("ids_keep", "ids_restore", "mask"):
            file.check(key, getattr(masking, key), dtype)
        with torch.no_grad():
            full = model(images, masking.ids_keep, taps=blocks).taps
        teacher = Teacher(model, blocks, mean=model.mean, std=model.std)
        features = teacher(images, masking.ids_keep)
    assert teacher.vit.depth == max(blocks) + 1
    for block, feature in zip(blocks, features):
        file.check(f"teacher_feature_block{block}", feature, dtype)
        assert torch.equal(feature, full[block]), "the truncated teacher differs from the full one"


def run(file: Golden, name: str, dtype: torch.dtype, **options):
    """(model, its result, student features by key, teacher features) of one forward pass."""
    device, images, ratio = inputs(file, name, dtype)
    model = dmae(file, dtype, device, **options)
    found, targets = {}, []
    encode, teach = model.student.forward, model._teacher_features

    def recording(*args, **kwargs):
        features = encode(*args, **kwargs)
        found.update({f"student_feature_block{index}": tap for index, tap in features.taps.items()})
        found["student_latent_norm"] = features.tokens
        return features

    def teaching(*args):
        targets.extend(teach(*args))
        return targets

    model.student.forward, model._teacher_features = recording, teaching
    result = model(images, ratio, noise=noise_of(file, device), return_pred=True)
    return model, result, found, targets


@share
@each_golden("dmae_student_forward")
def test_golden_student_forward(file: Golden, name, dtype, share_first_block):
    norm_pix = bool(file.option("normpix", "norm_pix_loss", default=False))
    with prefer(name), torch.no_grad():
        model, result, found, targets = run(
            file, name, dtype, norm_pix_loss=norm_pix, share_first_block=share_first_block
        )
        other = run(file, name, dtype, norm_pix_loss=not norm_pix, share_first_block=share_first_block)[1]
        rounded = isinstance(model.teacher, StoredTeacher)
        pairs = list(zip(model.aligned_feature_projection_heads, file.option("al_s", default=()), targets))
        for head, block, target in pairs:
            loss = model._align(head, found[f"student_feature_block{block}"], target)
            if sum(b == block for _, b, _ in pairs) == 1 and f"loss_align_block{block}" in file:
                file.check(f"loss_align_block{block}", loss, dtype, rounded)
    found |= {
        "mask": result["mask"],
        "loss_pixel": result["pixel_loss"],
        "loss_pixel_other_normpix": other["pixel_loss"],
    }
    for key, value in found.items():
        if key in file:
            file.check(key, value, dtype)
    file.check("loss_total", result["loss"], dtype, rounded)
    # Predictions are made for masked patches only: the file has all of them.
    full, ids = file.tensor("pred", dtype, result["pred"].device), result["ids_pred"]
    assert ids.shape[1] == int(file["mask"][0].sum())
    file.check("pred", full.scatter(1, ids[:, :, None].expand_as(result["pred"]), result["pred"]), dtype)


@share
@each_golden("dmae_student_grads")
def test_golden_student_grads(file: Golden, name, dtype, share_first_block):
    forward = file.partner("dmae_student_grads", "dmae_student_forward")
    if forward is None:
        pytest.skip("the split has no dmae_student_forward file, which holds the inputs")
    norm_pix = bool(forward.option("normpix", "norm_pix_loss", default=False))
    with prefer(name):
        model, result, _, _ = run(forward, name, dtype, norm_pix_loss=norm_pix, share_first_block=share_first_block)
        (UPSTREAM * result["loss"]).backward()
    if "loss_total" in file:
        file.check("loss_total", result["loss"], dtype, isinstance(model.teacher, StoredTeacher))
    gradients = {k.removeprefix("student."): p.grad for k, p in model.named_parameters() if p.requires_grad}
    stored = file.group("grad")
    heads = [k for k in gradients if k.startswith(HEADS)]
    renamed = dict(zip([k for k in stored if k.startswith(HEADS)], heads))
    assert {renamed.get(k, k) for k in stored} == set(gradients), "other parameters are trained than in the file"
    for key in stored:
        file.check(f"grad/{key}", gradients[renamed.get(key, key)] / UPSTREAM, dtype)


@each_file("dmae_student_forward")
def test_golden_student_layout(file: Golden):
    """The stored position tables are the ones that we compute, and the parameters load strictly."""
    model = student_mae(file, torch.float64, "cpu", False)
    stored = file.group("param", torch.float64)
    fresh = type(model)(
        img_size=model.img_size, patch_size=model.patch_size, in_chans=model.in_chans, embed_dim=model.embed_dim,
        depth=1, num_heads=1, decoder_embed_dim=model.decoder_embed_dim, decoder_depth=1, decoder_num_heads=1,
    )  # fmt: skip
    for table in ("pos_embed", "decoder_pos_embed"):
        torch.testing.assert_close(getattr(fresh, table).double(), stored[table], rtol=0, atol=1e-6)


@each_file("dmae_lr_schedule")
def test_golden_lr_schedule(file: Golden):
    options = {
        key: file.option(key) for key in ("lr", "min_lr", "warmup_epochs", "epochs") if file.option(key) is not None
    }
    options["lr"] = file.options.get("lr", options["lr"])  # "lr" is also the key of the results
    base = torch.tensor([lr_at(float(e), **options) for e in file["epoch"]], dtype=torch.float64)
    want = file.tensor("lr")
    table = want if want.ndim == 2 else want[:, None]
    scales = file.option("lr_scale", "lr_scales", default=[1.0, 0.5])
    scales = scales if isinstance(scales, list) else [scales]
    got = torch.stack([base * s for s in scales[: table.shape[1]]], 1).reshape(want.shape)
    file.check("lr", got, torch.float64)
