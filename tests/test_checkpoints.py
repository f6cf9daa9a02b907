"""Checkpoints in: every known layout against the code that it comes from."""

from __future__ import annotations

import pytest
import torch
from golden_files import find
from torch import nn
from vit_models import (
    HF,
    IMAGES,
    TIMM,
    close,
    official,
    same_features,
    same_predictions,
    same_state,
    shaken,
    timm_model,
    transformers_model,
)

from fastkd.models import (
    MaskedAutoencoderViT,
    VisionTransformer,
    load_vit,
    mae_vit,
    saving,
    to_timm,
)
from fastkd.models.layouts import from_state_dict, transformers_name
from fastkd.models.mae import SIZES


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


@pytest.mark.parametrize("shards", [False, True])
def test_transformers_mae_in(shards, tmp_path):
    theirs = transformers_model("ViTMAEForPreTraining")
    ours = load_vit(theirs)
    assert ours.norm_pix_loss and ours.norm_eps == theirs.config.layer_norm_eps and ours.decoder_num_heads == 2
    same_predictions(ours, theirs)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "50KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert same_state(load_vit(tmp_path), ours)


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


def test_unsupported_transformers_models():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="activation 'relu'"):
        load_vit(transformers.ViTModel(transformers.ViTConfig(**HF, hidden_act="relu")))
    with pytest.raises(ValueError, match="model_type: got 'bert'"):
        load_vit(transformers.BertModel(transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)))  # fmt: skip
