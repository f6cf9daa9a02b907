"""Runs of the methods beside DMAE: from a config to an exported student, resumed to the same bits."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_train import at_step
from tiny_run import write_models, write_pictures

from fastkd.models import load_vit
from fastkd.train import ConfigError, distill
from fastkd.train.configs.maskalign import MaskAlignConfig
from fastkd.train.configs.mic import MICConfig
from fastkd.train.configs.nkd import NKDConfig, USKDConfig
from fastkd.train.configs.promptkd import PromptKDConfig
from fastkd.train.configs.scalekd import ScaleKDConfig
from fastkd.train.configs.selfdist import SelfDistillationConfig
from fastkd.train.track import RunFolder


@pytest.fixture
def options(tmp_path):
    write_pictures(tmp_path / "pictures"), write_models(tmp_path)
    pictures = tmp_path / "pictures"
    return dict(data=pictures, val_data=pictures, batch_size=4, log_every=2, lr=1e-2, amp="off",
                workers=0, device="cpu", steps=6)  # fmt: skip


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_resumes(config_of, monkeypatch):
    """A run that is stopped after 3 steps goes on to the weights of one that was not."""
    whole = distill(config_of("whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert not distill(config_of("part")).finished
    again = distill(config_of("part"))
    a, b = (load_file(run.exported) for run in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return whole


def test_self_distillation(options, tmp_path, monkeypatch):
    options["student"] = str(tmp_path / "student.safetensors")
    first = distill(SelfDistillationConfig(out=tmp_path / "first", **options))
    assert all(row["distill_loss"] == 0 for row in metrics(first.run) if "loss" in row)

    def second(name):
        return SelfDistillationConfig(teacher=str(first.run), out=tmp_path / name, **options)

    rows = metrics(assert_resumes(second, monkeypatch).run)
    distances = [row["val_distill_loss"] for row in rows if "val_distill_loss" in row]
    assert 0 < distances[-1] < distances[0]  # the student comes near the teacher that it starts away from


@pytest.mark.parametrize("changes, message", [
    (dict(student="nowhere"), "--student: got nowhere, expected a checkpoint or run"),
    (dict(mask_ratio=0.99), "--mask-ratio: got 0.99, expected at least one of 16 patches"),
    (dict(teacher="nowhere.safetensors"), "--teacher: .*nowhere.safetensors"),
    (dict(weight=-1.0), "--weight: got -1.0, expected at least 0"),
])  # fmt: skip
def test_wrong_arguments_of_self_distillation(options, tmp_path, changes, message):
    options |= dict(student=str(tmp_path / "student.safetensors"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        distill(SelfDistillationConfig(**{**options, **changes}))


def test_maskalign(options, tmp_path, monkeypatch):
    def config(name):
        models = dict(student=str(tmp_path / "student.safetensors"), teacher=str(tmp_path / "teacher.safetensors"))
        return MaskAlignConfig(out=tmp_path / name, fusion="sum", layer_weights="top2", **models, **options)

    whole = assert_resumes(config, monkeypatch)
    losses = [row["val_loss"] for row in metrics(whole.run) if "val_loss" in row]
    assert losses[-1] < losses[0]
    assert load_vit(whole.exported).embed_dim == 16


def test_maskalign_by_name(options, tmp_path):
    options |= dict(steps=1, img_size=16, teacher=str(tmp_path / "teacher.safetensors"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="fusion"):  # 12 student layers, 4 of the teacher
        distill(MaskAlignConfig(student="vit_tiny_patch4", **options))
    with pytest.raises(ConfigError, match="--student: got 'vit_giant_patch4'"):
        distill(MaskAlignConfig(student="vit_giant_patch4", **options))
    assert distill(MaskAlignConfig(student="vit_tiny_patch4", fusion="sum", layer_weights="out", **options)).finished


def test_mic(options, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    other = write_pictures(tmp_path / "other", count=6)

    def config(name):
        extra = dict(student="test_resnet", img_size=32, block_size=8, target=other, scale=(0.9, 1.0))
        extra |= dict(ema=0.9, skip_nonfinite=1)  # beside the average that teaches
        return MICConfig(out=tmp_path / name, **extra, **options)

    run = assert_resumes(config, monkeypatch).run
    average, student = (load_file(run / f"exported/student{name}_timm.safetensors") for name in ("_ema", ""))
    assert average.keys() == student.keys() and not torch.equal(average["conv1.0.weight"], student["conv1.0.weight"])
    rows = metrics(run)
    first = next(row for row in rows if "consistency_loss" in row)
    assert first["consistency_loss"] > 0 and 0 < first["confidence"] <= 1
    with pytest.raises(ConfigError, match="--target: got .*nowhere, expected an existing folder"):
        distill(MICConfig(student="test_resnet", target=tmp_path / "nowhere", out=tmp_path / "x", **options))


@pytest.fixture
def classifiers(options, tmp_path):
    """Options of a run of classifiers, and a teacher."""
    timm = pytest.importorskip("timm")
    weights = tmp_path / "teacher.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit", num_classes=2, img_size=32).state_dict(), weights)
    return options | dict(student="test_resnet", img_size=32, scale=(0.9, 1.0)), weights


def test_nkd_and_scalekd(classifiers, tmp_path, monkeypatch):
    options, weights = classifiers
    for kind in (NKDConfig, ScaleKDConfig):

        def config(name, kind=kind):
            out = tmp_path / f"{name}{kind.__name__}"
            return kind(teacher="test_vit", teacher_checkpoint=weights, out=out, **options)

        run = assert_resumes(config, monkeypatch)
        assert "val_accuracy" in metrics(run.run)[-1]
    with pytest.raises(ConfigError, match="--teacher: got none, expected a teacher; --method uskd needs none"):
        distill(NKDConfig(teacher="none", out=tmp_path / "x", **options))
    with pytest.raises(ConfigError, match="--teacher: got none, expected a Swin, ViT or BEiT"):
        distill(ScaleKDConfig(teacher="none", out=tmp_path / "x", **options))


def test_uskd(classifiers, tmp_path, monkeypatch):
    options, _ = classifiers
    assert_resumes(lambda name: USKDConfig(out=tmp_path / name, tap="layer2", **options), monkeypatch)
    with pytest.raises(ConfigError, match="got 'layer9', expected a submodule"):
        distill(USKDConfig(out=tmp_path / "x", tap="layer9", **options))


def write_clip(folder, width):
    """A random CLIP of two layers for 16 x 16 pixels, with a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["."]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    shared = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2)
    text = dict(shared, vocab_size=len(words), max_position_embeddings=40, eos_token_id=len(words) - 1,
                bos_token_id=len(words) - 2, pad_token_id=len(words) - 1)  # fmt: skip
    torch.manual_seed(width)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(shared, image_size=16, patch_size=8), projection_dim=width
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_promptkd(options, tmp_path, monkeypatch):
    large, small = write_clip(tmp_path / "large", 24), write_clip(tmp_path / "small", 16)
    first = distill(PromptKDConfig(student=large, out=tmp_path / "first", depth=2, **options))
    assert RunFolder(first.run).facts()["classes"] == ["cat", "dog"]

    def second(name):
        return PromptKDConfig(student=small, teacher=str(first.run), out=tmp_path / name, depth=2, **options)

    run = assert_resumes(second, monkeypatch)
    rows = metrics(run.run)
    assert "val_accuracy" in rows[-1] and rows[-2]["loss"] >= 0
    saved = load_file(run.run / "checkpoints/last/student.safetensors")
    fresh, _ = second("other").build(torch.device("cpu"))
    changed = {name for name, value in fresh.student.state_dict().items() if not torch.equal(value, saved[name])}
    assert changed and not any("tower" in name or name == "text_features" for name in changed)
    with pytest.raises(ConfigError, match="--teacher: .*got no finished run of stage 1"):
        distill(PromptKDConfig(student=small, teacher=str(tmp_path / "pictures"), out=tmp_path / "x", **options))
    with pytest.raises(ConfigError, match="--template: got a photo, expected a text with {}"):
        distill(PromptKDConfig(student=small, template="a photo", out=tmp_path / "x", **options))
