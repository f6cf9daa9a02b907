"""Models out: timm and transformers compute the same, and our own files come back as they were."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch import nn
from vit_models import (
    MAE,
    SMALL,
    close,
    same_features,
    same_predictions,
    same_state,
    shaken,
    timm_model,
)

from fastkd.models import (
    MaskedAutoencoderViT,
    VisionTransformer,
    export_timm,
    load_vit,
    mae_vit,
    save,
    saving,
    to_timm,
    to_transformers,
)


@pytest.mark.parametrize("case", ["plain", "registers", "dinov2", "pooled_without_cls", "oblong", "bare_qkv"])
@pytest.mark.parametrize("pool", ["avg", "token", ""])
def test_export_timm(case, pool, tmp_path):
    """The line that is printed and stored loads the file in timm, strictly, with the same features."""
    timm = pytest.importorskip("timm")
    from safetensors import safe_open

    ours = load_vit(timm_model(case))
    ours.mean, ours.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    path = tmp_path / "out.safetensors"
    if pool == "token" and case == "pooled_without_cls":
        with pytest.raises(ValueError, match="global_pool"):
            export_timm(ours, path, pool)
        return
    line = export_timm(ours, path, pool)
    theirs = eval(line, {"timm": timm}).eval()
    same_features(ours, theirs)
    tokens = ours(torch.ones(1, 3, *ours.img_size)).tokens
    pooled = {"avg": tokens[:, ours.num_prefix_tokens :].mean(1), "token": tokens[:, 0], "": tokens}[pool]
    assert close(theirs(torch.ones(1, 3, *ours.img_size)), pooled)
    assert timm.data.resolve_model_data_config(theirs)["mean"] == (0.1, 0.2, 0.3)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["timm"] == line
    assert same_state(load_vit(path), ours) and load_vit(path).std == ours.std


def test_export_timm_of_masked_autoencoder(tmp_path):
    timm = pytest.importorskip("timm")
    model = shaken(MaskedAutoencoderViT(**{**MAE, "norm_eps": 1e-12}))
    names = {"timm": timm, "torch": torch, "functools": functools}
    theirs = eval(export_timm(model, tmp_path / "student.safetensors"), names).eval()
    same_features(model, theirs)
    assert theirs.blocks[0].norm1.eps == 1e-12
    assert not any("decoder" in name for name in theirs.state_dict())
    short = export_timm(mae_vit("tiny", depth=12, decoder_depth=1), tmp_path / "tiny.safetensors")
    assert short.startswith("timm.create_model('vit_tiny_patch16_224', checkpoint_path='")
    assert "', num_classes=0, global_pool='avg', fc_norm=False, pretrained_cfg_overlay={'mean': (0.485," in short


def test_export_of_truncated_encoder():
    pytest.importorskip("timm")
    model = shaken(VisionTransformer(**SMALL))
    model.truncate(1)
    same_features(model, to_timm(model))


def test_wrong_model_is_refused(tmp_path):
    class Method(nn.Module):
        student = None

    for function in (
        lambda m: save(m, tmp_path / "x.safetensors"),
        lambda m: export_timm(m, tmp_path / "x.safetensors"),
    ):
        with pytest.raises(
            TypeError, match=r"got Method, expected a fastkd.models.VisionTransformer; pass its .student"
        ):
            function(Method())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_transformers_mae_out(norm_pix_loss, tmp_path):
    pytest.importorskip("transformers")
    ours = shaken(MaskedAutoencoderViT(**MAE, norm_pix_loss=norm_pix_loss))
    theirs = to_transformers(ours, mask_ratio=0.7)
    same_predictions(ours, theirs)
    assert same_state(load_vit(theirs), ours)
    theirs.save_pretrained(tmp_path)
    back = load_vit(tmp_path)
    assert same_state(back, ours) and back.norm_pix_loss == norm_pix_loss and back.num_heads == 3


def test_transformers_refuses_what_it_cannot_hold():
    model = MaskedAutoencoderViT(**{**MAE, "img_size": (32, 48)}, reg_tokens=2, init_values=1e-5)
    with pytest.raises(ValueError, match="register tokens, layer scale, oblong images, which ViTMAE"):
        to_transformers(model)
    with pytest.raises(TypeError, match="expected a fastkd.models.MaskedAutoencoderViT"):
        to_transformers(VisionTransformer(**SMALL))


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(
            **{**SMALL, "img_size": (16, 32), "patch_size": (8, 4)}, reg_tokens=3, init_values=0.1, in_chans=2
        ),
        VisionTransformer(**SMALL, class_token=False, no_embed_class=True, norm_eps=1e-5, qkv_bias=False),
        MaskedAutoencoderViT(**MAE, norm_pix_loss=True, decoder="cross", mean=(0.1, 0.2, 0.3), std=(1, 2, 3)),
    ],
    ids=["oblong", "bare", "mae"],
)
def test_save_and_load(model, tmp_path):
    path = save(shaken(model), tmp_path / "new" / "model.safetensors")
    assert os.listdir(path.parent) == [path.name]
    got = load_vit(path)
    assert type(got) is type(model) and same_state(got, model)
    assert saving.describe(got) == saving.describe(model)
    images = torch.randn(1, model.in_chans, *model.img_size)
    assert torch.equal(got(images).tokens, model(images).tokens)
    truncated = load_vit(got)
    truncated.truncate(1)
    assert got.depth == 2  # load_vit copied it
    assert torch.equal(load_vit(save(truncated, path))(images).tokens, truncated(images).tokens)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = save(VisionTransformer(**SMALL), tmp_path / "model.safetensors")
    before = path.read_bytes()

    def interrupted(state, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        save(VisionTransformer(**{**SMALL, "depth": 1}), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_save_wants_safetensors(tmp_path):
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors"):
        save(VisionTransformer(**SMALL), tmp_path / "model.pth")
