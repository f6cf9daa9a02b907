"""Schedule, optimiser groups, and the loop: resumed to the same bits, checkpoints survive."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import SHAPE, tiny_config

import fastkd
from fastkd.methods import DMAE
from fastkd.models import MaskedAutoencoderViT, load_vit
from fastkd.ops import patchify
from fastkd.train import ConfigError, TrainingError, adamw, checkpoint, distill, lr_at, param_groups, set_lr
from fastkd.train.held_out import HeldOut
from fastkd.train.plots import _fill_in, feature_similarity
from fastkd.train.track import Reporter, RunFolder

GOLDEN = Path(os.environ.get("FASTKD_GOLDEN_DIR", Path(__file__).parent / "golden"))
LOSSES = ("loss", "pixel_loss", "align_loss")


@pytest.fixture
def plots():
    """Requested by the tests in which plots are drawn."""


@pytest.fixture(autouse=True)
def plots_on_request(request, monkeypatch):
    """Plots take longer than these runs."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(HeldOut, "draw", lambda self, run: None)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dmae_lr_schedule*.npz")), ids=lambda path: f"golden-{path.stem}")
def test_learning_rate(path):
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        arguments = {name: meta[name] for name in ("lr", "min_lr", "warmup_epochs", "epochs")}
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.AdamW([dict(params=parameters[:1]), dict(params=parameters[1:], lr_scale=0.5)])
        for epoch, expected in zip(data["epoch"], data["lr"]):
            set_lr(optimizer, lr_at(float(epoch), **arguments))
            rates = [group["lr"] for group in optimizer.param_groups]
            np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)


def test_learning_rate_of_runs_with_and_without_warmup():
    assert lr_at(0.0, lr=2.0, warmup_epochs=0, epochs=10) == 2.0
    assert lr_at(10.0, lr=2.0, min_lr=0.5, warmup_epochs=0, epochs=10) == pytest.approx(0.5)
    assert lr_at(1.0, lr=2.0, warmup_epochs=4, epochs=4) == 0.5


def test_only_matrices_and_tokens_decay():
    shape = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=4, init_values=0.1)
    student = MaskedAutoencoderViT(**shape, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = DMAE(student, None)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in param_groups(model, 0.05))
    assert [group["weight_decay"] for group in param_groups(model, 0.05)] == [0.05, 0.0]
    assert {"student.cls_token", "student.mask_token", "student.patch_embed.proj.weight"} <= decayed
    assert {"student.norm.weight", "student.blocks.0.ls1.gamma", "student.decoder_pred.bias"} <= plain
    assert not any(name.endswith("bias") for name in decayed)
    frozen = {"student.pos_embed", "student.decoder_pos_embed"}
    assert decayed | plain == set(names.values()) - frozen
    assert adamw(model, 1e-3).defaults["betas"] == (0.9, 0.95)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple]:
    return [(row["step"], *(row[name] for name in LOSSES)) for row in metrics(run) if "loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/last/student.safetensors")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, projectors, optimiser and losses are equal, bit for bit."""
    for name, tensor in weights(theirs).items():
        assert torch.equal(weights(ours)[name], tensor), name
    states = [checkpoint.load_state(run / "checkpoints/last") for run in (ours, theirs)]
    assert states[0]["step"] == states[1]["step"] and states[0]["loader"] == states[1]["loader"]
    for name, tensor in states[1]["heads"].items():
        assert torch.equal(states[0]["heads"][name], tensor), name
    for index, values in states[1]["optimizer"]["state"].items():
        for key, tensor in values.items():
            assert torch.equal(states[0]["optimizer"]["state"][index][key], tensor)
    assert losses(ours) == losses(theirs)


def test_run_folder(tmp_path, plots):
    config = tiny_config(tmp_path, steps=24, lr=3e-2, val_data=tmp_path / "pictures", workers=1)
    (tmp_path / "pictures/broken.jpg").write_bytes(b"no")
    result = distill(config)
    run = tmp_path / "run"
    assert result.finished and result.step == 24
    resolved = RunFolder(run).config()
    assert resolved["student_blocks"] == [1] and resolved["teacher_blocks"] == [2]  # three quarters of 3 and of 4
    assert (
        resolved["img_size"] == [16, 16] and resolved["epochs"] == 8.0 and RunFolder(run).facts()["versions"]["torch"]
    )
    rows = [row for row in metrics(run) if "loss" in row]
    keys = {"step", "epoch", "lr", *LOSSES, "images_per_second", "data_wait", "skipped", "seconds"}
    assert all(set(row) == keys for row in rows) and [row["step"] for row in rows] == list(range(2, 25, 2))
    assert all(0 <= row["data_wait"] <= 1 and row["images_per_second"] > 0 for row in rows)
    assert rows[-1]["skipped"] > 0 and rows[-1]["seconds"] > rows[0]["seconds"]
    held_out = [row for row in metrics(run) if "val_loss" in row]
    assert held_out[0]["step"] == 0 and held_out[-1]["step"] == 24
    assert held_out[-1]["val_pixel_loss"] < held_out[0]["val_pixel_loss"]
    assert held_out[-1]["val_align_loss"] < 0.8 * held_out[0]["val_align_loss"]
    log = (run / "train.log").read_text()
    assert "broken.jpg" in log and "step 24" in log and "finished after 24 steps" in log
    for name in ("loss_curves", "reconstruction", "feature_similarity"):
        assert (run / f"pictures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_features_alone_have_no_reconstruction_plot(tmp_path, plots):
    distill(tiny_config(tmp_path, steps=1, reconstruct=False))
    assert (tmp_path / "run/pictures/loss_curves.png").exists() and not (
        tmp_path / "run/pictures/reconstruction.png"
    ).exists()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_of_perfect_predictions_is_the_image(monkeypatch, norm_pix_loss, channels):
    student = MaskedAutoencoderViT(embed_dim=16, depth=1, num_heads=2, in_chans=channels, **SHAPE)
    student.norm_pix_loss = norm_pix_loss
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 16, 16, channels), dtype=torch.uint8, generator=random)
    normalised = (images / 255 - torch.tensor(student.mean)) / torch.tensor(student.std)
    target = patchify(normalised.permute(0, 3, 1, 2), 4)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()

    def decode(tokens, ids):
        wanted = ids[:, tokens.shape[1] - 1 :]
        return target.gather(1, wanted[:, :, None].expand(-1, -1, target.shape[-1]))

    monkeypatch.setattr(student, "decode", decode)
    masked, filled = _fill_in(student, images, 0.75, torch.rand(2, 16, generator=random))
    assert np.abs(filled.astype(int) - images.numpy()).max() <= 1
    grey = (np.abs(masked.astype(int) - 128) <= 1).all(-1)
    assert (np.abs(masked.astype(int) - images.numpy()).max(-1)[~grey] <= 1).all()
    assert grey.mean() >= 0.75


def test_export_has_the_features_of_the_student(tmp_path):
    timm = pytest.importorskip("timm")
    result = distill(tiny_config(tmp_path))
    exported = timm.create_model(
        "vit_base_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0,
        global_pool="", checkpoint_path=str(result.exported),
    ).eval()  # fmt: skip
    student = load_vit(result.run / "checkpoints/last/student.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), student(images).tokens, rtol=1e-5, atol=1e-5)


def python(*arguments) -> subprocess.CompletedProcess:
    same_package = str(Path(fastkd.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": same_package}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def at_step(monkeypatch, number: int, action) -> None:
    """Calls action after the given step of every run that follows."""
    original, count = Reporter.step, []

    def step(self):
        original(self)
        count.append(1)
        if len(count) == number:
            action()

    monkeypatch.setattr(Reporter, "step", step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_run_is_saved_and_resumes(tmp_path, monkeypatch, number):
    def signal_all():  # as a terminal or a scheduler does
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
        signal.raise_signal(number)

    distill(tiny_config(tmp_path, "whole", projector="mlp"))
    at_step(monkeypatch, 3, signal_all)
    stopped = distill(tiny_config(tmp_path, "stopped", projector="mlp", workers=1))
    assert not stopped.finished and stopped.step == 3 and stopped.exported is None
    assert stopped.exit_code == 128 + number
    assert "the same command continues" in (tmp_path / "stopped/train.log").read_text()
    assert distill(tiny_config(tmp_path, "stopped", projector="mlp")).finished
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_resume_choices(tmp_path):
    distill(tiny_config(tmp_path, steps=4))
    with pytest.raises(ConfigError, match="--out: got .* expected a folder without a run .*; leave --resume away"):
        distill(tiny_config(tmp_path, steps=4, resume="never"))
    with pytest.raises(ConfigError) as error:
        distill(tiny_config(tmp_path, steps=5, lr=1.0))
    assert len(error.value.problems) == 2  # not the epochs and warm-up that follow from the steps
    assert any("--lr: got 1.0, expected 0.01 as in the run" in line for line in error.value.problems)
    with pytest.raises(ConfigError, match="--resume: got .* expected a run folder"):
        distill(tiny_config(tmp_path, "new", steps=4, resume=str(tmp_path / "pictures")))
    result = distill(tiny_config(tmp_path, "new", steps=6, resume=str(tmp_path / "run")))
    assert result.step == 6 and losses(tmp_path / "new")[0][0] == 6
    assert distill(tiny_config(tmp_path, "fresh", steps=2, resume="never")).finished
    changed = dict(steps=6, resume=str(tmp_path / "run"))
    with pytest.raises(
        ConfigError, match="--resume: the checkpoint .* does not fit: .*global batch: got 2, expected 4"
    ):
        distill(tiny_config(tmp_path, "other", batch_size=2, **changed))
    with pytest.raises(ConfigError, match="--resume: the checkpoint .* does not fit"):
        distill(tiny_config(tmp_path, "other", projector="mlp", **changed))
    distill(tiny_config(tmp_path, "other", weight_decay=0.5, **changed))
    state = checkpoint.load_state(tmp_path / "other/checkpoints/last")
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]
    (tmp_path / "pictures/cat/001.png").unlink()
    with pytest.raises(ConfigError, match="images: got 11, expected 12 as in the checkpoint"):
        distill(tiny_config(tmp_path, steps=4))


def test_nan_stops_at_its_step_and_keeps_the_good_checkpoint(tmp_path, monkeypatch):
    original, calls = DMAE.forward, []

    def forward(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(1)
        return {**result, "loss": result["loss"] * float("nan")} if len(calls) == 5 else result

    monkeypatch.setattr(DMAE, "forward", forward)
    with pytest.raises(TrainingError, match="step 5: loss is nan.*last good checkpoint is kept: .*step_00000004"):
        distill(tiny_config(tmp_path, steps=12, save_every=2, log_every=6))
    assert checkpoint.load_state(tmp_path / "run/checkpoints/last")["step"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_broken_weights_are_not_saved(tmp_path, monkeypatch):
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match="step 1: weights are not finite.*no checkpoint was written yet"):
        distill(tiny_config(tmp_path, save_every=1))


def test_accumulation_equals_the_large_batch(tmp_path):
    distill(tiny_config(tmp_path, "large", batch_size=4))
    distill(tiny_config(tmp_path, "small", batch_size=2, accumulate=2))
    np.testing.assert_allclose(losses(tmp_path / "small"), losses(tmp_path / "large"), rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(amp="bf16"),
        dict(amp="bf16", residual="amp"),
        dict(amp="fp16"),
        dict(teacher="none"),
        dict(reconstruct=False, loss="cosine"),
        dict(decode_fraction=0.5, mask_ratio=0.9, norm_pix_loss=True, loss="smooth_l1"),
        dict(student_blocks=(0, 2), teacher_blocks=(1, 3), projector="mlp"),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train_and_resume(tmp_path, monkeypatch, changes):
    distill(tiny_config(tmp_path, "whole", **changes))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    distill(tiny_config(tmp_path, **changes))
    assert distill(tiny_config(tmp_path, **changes)).finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    first, last = losses(tmp_path / "run")[0], losses(tmp_path / "run")[-1]
    assert last[1] < first[1]


def test_grey_images_and_a_student_by_name(tmp_path):
    config = tiny_config(
        tmp_path, teacher="none", student="vit_tiny_patch8", img_size=(16, 24), in_chans=1, steps=1, decoder_depth=1,
        decoder_embed_dim=16, decoder_num_heads=2, mask_ratio=0.5,
    )  # fmt: skip
    student = load_vit(distill(config).run / "checkpoints/last/student.safetensors")
    assert student.in_chans == 1 and student.img_size == (16, 24) and student.embed_dim == 192


@pytest.mark.parametrize("changes", [{}, dict(skip_nonfinite=2, clip_grad=1.0, ema=0.9)], ids=["plain", "guarded"])
def test_the_host_does_not_wait_for_the_device_in_a_step(tmp_path, changes):
    """Reading a device value on the host is `_local_scalar_dense`; steps between two reports must not do it."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (3, 9):
        with Count() as count:
            distill(tiny_config(tmp_path, f"run{steps}", steps=steps, log_every=9, val_every=9, **changes))
        counts.append(count.reads)
    assert counts[0] == counts[1]


def test_config_problems_come_all_at_once(tmp_path):
    config = tiny_config(tmp_path, mask_ratio=1.5, alpha=-1.0, batch_size=0, scale=(0.9, 0.2), student_blocks=(1, 2),
                         teacher_blocks=(1,), warmup_epochs=-1.0, device="gpu", data=tmp_path / "nowhere")  # fmt: skip
    with pytest.raises(ConfigError) as error:
        distill(config)
    lines = error.value.problems
    expected = ["data", "batch-size", "warmup-epochs", "scale", "device", "mask-ratio", "alpha", "teacher-blocks"]
    assert [line.split(":")[0] for line in lines] == [f"--{name}" for name in expected]
    assert all("got" in line and "expected" in line for line in lines)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(student="vit_giant_patch14", teacher="nothing.pth"), ["--student: got 'vit_giant_", "--teacher: "]),
        (dict(student_blocks=(3,), mask_ratio=0.99), ["--student-blocks: got (3,), expected indices from 0 to 2",
                                                      "--mask-ratio: got 0.99"]),
        (dict(projector="none"), ["expected equal widths"]),
    ],
    ids=["names", "blocks", "widths"],
)  # fmt: skip
def test_problems_that_need_the_models(tmp_path, changes, expected):
    with pytest.raises(ConfigError) as error:
        distill(tiny_config(tmp_path, **changes))
    assert len(error.value.problems) == len(expected)
    assert all(part in line for part, line in zip(expected, error.value.problems))
    assert not (tmp_path / "run").exists()


def test_patch_features_are_what_the_loss_aligns(tmp_path):
    """Nothing masked: patches in raster order, students projected, both sides without prefix tokens."""
    model, _ = tiny_config(tmp_path).build(torch.device("cpu"))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    ((ours, theirs),) = model.patch_features(images)
    assert ours.shape == theirs.shape == (2, 16, 32)
    whole = model.student(images, taps=model.student_blocks).taps[model.student_blocks[0]]
    head = model.aligned_feature_projection_heads[0]
    torch.testing.assert_close(ours, head(whole[:, 1:]))
    torch.testing.assert_close(theirs, model.teacher(images)[0][:, 1:])
    feature_similarity(images, ours, theirs, model.student.grid, tmp_path / "likeness.png")
    assert (tmp_path / "likeness.png").read_bytes().startswith(b"\x89PNG")
