"""Small ViTs of every code base with random values everywhere, and what it means that two are the same."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from fastkd import ops
from fastkd.models import (
    MaskedAutoencoderViT,
    VisionTransformer,
)

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
