"""linear_pixel_loss beyond its OpSpec: memory, chunks without gradient, loss scaling, threads, and DMAE through it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS_HERE, device_of
from op_checks import check_same, evaluate, relative_error, to_double

from fastkd import ops
from fastkd.methods.dmae import DMAE
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.ops.masked import linear_pixel_loss as slice_

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from stages import peak_bytes  # noqa: E402

SPEC = ops.SPECS["linear_pixel_loss"]
BIG = dict(batch=8, grid=(8, 8), patch=(8, 8), channels=3, ratio=0.75, dim=16, norm_pix=True, uint8=True, mixed=True)
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS_HERE, reason="the native CPU library is not built")


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_of_predictions_lives(dtype):
    """No targets, no float32 prediction, no gradient beside the residual; without gradient not even that."""
    kwargs = SPEC.build(BIG, dtype, "cpu")
    buffer = kwargs["ids"].numel() * len(kwargs["weight"]) * dtype.itemsize
    for backend_name, most in (("cpp", 1.4), ("reference", float("inf"))):
        with ops.backend(backend_name):
            evaluate(SPEC, SPEC.function, kwargs)
            peak, _ = peak_bytes(lambda: evaluate(SPEC, SPEC.function, kwargs), "cpu")
        assert buffer <= peak <= most * buffer
    assert peak > 2 * buffer  # the reference shows that more would be seen


@needs_cpp
def test_without_gradient_predictions_are_made_in_chunks(monkeypatch):
    kwargs = SPEC.build(dict(BIG, batch=5), torch.float32, "cpu")
    buffer = kwargs["ids"].numel() * len(kwargs["weight"]) * 4
    want = evaluate(SPEC, SPEC.reference, to_double(kwargs)).outputs[0]
    monkeypatch.setattr(slice_, "CHUNK", 2 * kwargs["ids"].shape[1] + 1)  # 2 + 2 + 1 images
    with ops.backend("cpp"), torch.no_grad():
        assert relative_error(ops.linear_pixel_loss(**kwargs), want) < 1e-6
        assert peak_bytes(lambda: ops.linear_pixel_loss(**kwargs), "cpu")[0] < 0.6 * buffer
        monkeypatch.setattr(slice_, "CHUNK", 1)  # an image at a time is the least
        assert relative_error(ops.linear_pixel_loss(**kwargs), want) < 1e-6


@pytest.mark.parametrize("name", BACKENDS_HERE)
@pytest.mark.parametrize("upstream", [1.0, 2.0**16])
def test_float16_keeps_its_gradients_at_any_loss_scale(name, upstream):
    """Without its unit the sum of residuals times tokens would be above 65504, scaled or not."""
    if SPEC.kernels[0].why_not(name, device_of(name), torch.float16):
        pytest.skip(f"{name} cannot run here")
    kwargs = SPEC.build(dict(BIG, batch=2 if name == "triton" else 8), torch.float16, device_of(name))
    kwargs["x"] = kwargs["x"] + 10  # one sign: sums over all rows do not cancel
    kwargs["bias"] = kwargs["bias"] + (160 if name == "triton" else 40)

    def above(output, _):
        return torch.full_like(output, upstream)

    want = evaluate(SPEC, SPEC.reference, to_double(kwargs), above).gradients
    with ops.backend(name):
        got = evaluate(SPEC, SPEC.function, kwargs, above).gradients
    for key in want:
        assert relative_error(got[key], want[key]) < 2e-3, key


@needs_cpp
@pytest.mark.parametrize("case", SPEC.cases)
def test_bfloat16_does_not_depend_on_the_number_of_threads(case):
    kwargs = SPEC.build(dict(SPEC.cases[case], mixed=True), torch.bfloat16, "cpu")
    if not slice_._linear.has_own_product(torch.bfloat16):
        pytest.skip("no AMX: the product is the vendor library's")
    results = []
    with ops.backend("cpp"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(SPEC, SPEC.function, kwargs))
    check_same(*results, 0, case)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outside", [-1, 64])
def test_a_patch_outside_the_image_is_not_followed(dtype, outside):
    kwargs = SPEC.build(BIG, dtype, "cpu")
    kwargs["ids"][3, 5] = outside
    # torch 2.10 does not carry the message out of a parallel loop.
    with ops.backend("cpp"), pytest.raises(RuntimeError, match=f"patch id {outside} outside|parallel_for"):
        ops.linear_pixel_loss(**kwargs)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("raw", [False, True], ids=["float", "uint8"])
def test_dmae_trains_on_the_loss_of_its_predictions(norm_pix, raw):
    torch.manual_seed(0)
    student = MaskedAutoencoderViT(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2,
        decoder_num_heads=2, norm_pix_loss=norm_pix,
    )  # fmt: skip
    model = DMAE(student, None, decode_fraction=0.5)
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    statistics = dict(mean=student.mean, std=student.std) if raw else {}
    images = images if raw else images.permute(0, 3, 1, 2) / 255
    noise = torch.rand(3, 16)
    plain = model(images, 0.75, noise)
    result = model(images, 0.75, noise, return_pred=True)
    assert not {"pred", "ids_pred"} & set(plain) and torch.equal(plain["loss"], result["loss"])
    assert result["pred"].shape == (3, 6, 48) and result["ids_pred"].shape == (3, 6)
    want = ops.masked_pixel_loss(result["pred"], images, result["ids_pred"], 4, norm_pix, **statistics)
    torch.testing.assert_close(result["pixel_loss"], want, rtol=1e-5, atol=1e-6)
    wanted = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, wanted, retain_graph=True) for loss in (plain["loss"], want))
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
