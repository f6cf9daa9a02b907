"""The CUDA C++ kernels and their glue, compiled for the CPU with every CUDA thread as a fiber (cuda_emulation.h)."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from op_checks import check_accuracy, check_same, evaluate

from fastkd.ops import (
    SPECS,
    attention,
    backend,
    decoder_assemble,
    feature_alignment_loss,
    masked_pixel_loss,
    random_masking,
    visible_patch_embed,
)
from fastkd.ops._dispatch import Kernel

ROOT = Path(__file__).parents[1]
CSRC = Path(os.environ.get("FASTKD_CUDA_SOURCES", ROOT / "csrc"))  # mutation/run.py plants bugs in a copy
SOURCES = sorted(CSRC.glob("*.cu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = [spec for spec in SPECS.values() if all(kernel._has_cuda for kernel in spec.kernels)]

pytestmark = pytest.mark.skipif(not CSRC.exists() or not shutil.which("g++"), reason="needs csrc and g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Builds the CUDA library for the CPU and loads it as torch.ops.fastkd_emulated."""
    folder, torch_folder = tmp_path_factory.mktemp("emulated"), Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas",
        "-DFASTKD_CUDA", "-DFASTKD_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{torch_folder / 'include'}", f"-I{CSRC}", "-include", f"{ROOT / 'tests/cuda_emulation.h'}",
    ]  # fmt: skip
    running = []
    for source in (*SOURCES, CSRC / "ops.cpp"):
        command = ["g++", *flags, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o"]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    path = folder / "libfastkd_emulated.so"
    objects = [folder / f"{source.stem}.o" for source in (*SOURCES, CSRC / "ops.cpp")]
    subprocess.run(["g++", "-shared", *objects, "-o", path, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], check=True)
    torch.ops.load_library(str(path))


@pytest.fixture
def emulated(library, monkeypatch):
    """backend("cuda") means the emulated kernels, on CPU tensors."""
    monkeypatch.setattr(Kernel, "why_not", lambda self, *_: None)
    original = Kernel.implementation

    def implementation(self, name):
        if name != "cuda":
            return original(self, name)
        if self._cuda is not None:  # a launcher takes the name of the library first
            return partial(self._cuda.func, "fastkd_emulated")
        return getattr(torch.ops.fastkd_emulated, self.name)

    monkeypatch.setattr(Kernel, "implementation", implementation)


# 197 keys take a minute here, in loops that 67 keys go through as well (below).
CASES = [(spec, case) for spec in OPS for case in spec.cases if (spec.name, case) != ("attention", "long")]


@pytest.mark.parametrize("spec, case", CASES, ids=lambda v: getattr(v, "name", v))
def test_accuracy(emulated, spec, case):
    for dtype in DTYPES:
        check_accuracy(spec, spec.build(spec.cases[case], dtype, "cpu"), dtype, "cuda")


WIDE = {  # rows of one warp with idle lanes, of several warps, and beyond the registers of a block
    "feature_alignment_loss": [
        dict(batch=2, tokens=3, width=width, loss=loss, normalize=normalize, strided=strided, beta=0.05)
        for width, loss, normalize, strided in (
            (768, "l1", True, False), (1024, "cosine", True, True), (1025, "l2", True, False),
            (1032, "smooth_l1", False, False), (8200, "smooth_l1", True, False), (9001, "l1", True, True),
        )
    ],
    "masked_pixel_loss": [
        dict(batch=2, grid=grid, patch=patch, channels=channels, ratio=0.5, ids=ids, norm_pix=norm, uint8=uint8)
        for grid, patch, channels, ids, norm, uint8 in (
            ((2, 2), (16, 16), 3, True, True, True), ((2, 3), (16, 16), 3, False, False, False),
            ((2, 2), (14, 14), 3, True, True, True), ((1, 3), (32, 16), 4, True, True, True),
            ((1, 2), (64, 48), 3, False, True, True), ((2, 1), (47, 61), 3, True, True, False),
        )
    ],
    "random_masking": [dict(batch=2, patches=n, ratio=0.75, ties=ties) for n, ties in ((196, False), (1030, True))],
    "visible_patch_embed": [  # several shares of the sums, several blocks of columns, rows of several warps
        dict(batch=batch, grid=grid, patch=patch, channels=channels, width=width, keep=1.0, prefix=prefix, uint8=uint8)
        for batch, grid, patch, channels, width, prefix, uint8 in (
            (3, (5, 7), (16, 16), 3, 264, 1, True), (1, (1, 2), (14, 14), 3, 768, 2, True),
            (1, (2, 1), (4, 24), 3, 520, 0, True), (1, (1, 2), (8, 32), 3, 40, 0, False),
        )
    ],
    "decoder_assemble": [
        dict(batch=batch, patches=patches, keep=0.25, width=width, prefix=1, mixed=mixed, per_patch=per_patch)
        for batch, patches, width, mixed, per_patch in (
            (3, 40, 512, True, False), (2, 60, 300, False, False), (19, 4, 264, True, True), (9, 3, 1032, False, True),
        )
    ],
    "attention": [  # 4, 2 and 1 heads a block, the last one not full; several chunks of queries; more keys than fit
        dict(batch=batch, tokens=tokens, queries=queries, heads=heads, head_dim=dim)
        for batch, tokens, queries, heads, dim in (
            (1, 64, None, 2, 64), (3, 4, None, 3, 80), (1, 33, None, 1, 128), (3, 32, None, 1, 24), (1, 17, 40, 1, 48),
            (1, 10, 150, 2, 32), (1, 40, 70, 1, 16), (1, 67, 5, 1, 8),
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, case", [(n, c) for n, cases in WIDE.items() for c in cases], ids=lambda v: v if isinstance(v, str) else ""
)
def test_accuracy_at_real_and_awkward_sizes(emulated, name, case):
    # float32 attention is in the cases of the OpSpec; the tensor cores take 16 bits.
    for dtype in DTYPES[1:] if name == "attention" else DTYPES[:2]:
        check_accuracy(SPECS[name], SPECS[name].build(case, dtype, "cpu"), dtype, "cuda")


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
def test_every_pair_of_feature_dtypes(emulated, student, teacher):
    random = torch.Generator().manual_seed(0)
    pair = [torch.randn(2, 3, 40, generator=random).to(dtype) for dtype in (student, teacher)]
    spec = SPECS["feature_alignment_loss"]
    check_accuracy(spec, dict(student=pair[0], teacher=pair[1]), student, "cuda")


LAYOUTS = ("nchw", "nhwc", "cropped")


def images_as(pixels: torch.dtype, layout: str) -> torch.Tensor:
    """Two 32 x 64 images: dense, or cut out of larger ones, so that nothing is aligned."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 40, 72, 3), generator=random).to(pixels)
    images = images[:, 5:37, 3:67] if layout == "cropped" else images[:, :32, :64].contiguous()
    if pixels != torch.uint8:
        images = images.permute(0, 3, 1, 2)
        images = images.contiguous() if layout == "nchw" else images
    return images


@pytest.mark.parametrize("pixels", (*DTYPES, torch.uint8))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pixel_dtype_and_layout(emulated, pixels, layout):
    random = torch.Generator().manual_seed(1)
    images, patches = images_as(pixels, layout), torch.tensor([[0, 7, 3], [2, 1, 6]])
    statistics = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    kwargs = dict(pred=torch.randn(2, 3, 768, generator=random), masked=patches, patch_size=16, norm_pix_loss=True)
    check_accuracy(SPECS["masked_pixel_loss"], dict(kwargs, images=images, **statistics), torch.float32, "cuda")
    weight, bias = torch.randn(24, 3, 16, 16, generator=random), torch.randn(24, generator=random)
    kwargs = dict(ids_keep=patches, weight=weight, bias=bias, pos_embed=torch.randn(8, 24, generator=random))
    check_accuracy(SPECS["visible_patch_embed"], dict(kwargs, images=images, **statistics), torch.float32, "cuda")


@pytest.mark.parametrize("outside", (4, -1, 1 << 40))
def test_an_id_outside_the_image_gives_nan_and_is_not_followed(emulated, outside):
    ids, images = torch.tensor([[1, outside]]), torch.randn(1, 3, 16, 16)
    pred, fill = torch.randn(1, 2, 192, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with backend("cuda"):
        loss = masked_pixel_loss(pred, images, ids, 8)
        (grad,) = torch.autograd.grad(loss, pred)
        position = torch.randn(4, 8)
        embedded = [
            visible_patch_embed(x, ids, torch.randn(8, 3, 8, 8), None, position)
            for x in (images, images.contiguous(memory_format=torch.channels_last))
        ]
        assembled = [
            decoder_assemble(torch.randn(1, 1, 8), fill, position, ids, num_prefix=0),
            decoder_assemble(torch.randn(1, 0, 8), fill, None, ids, num_prefix=0),
        ]
        (grad_fill,) = torch.autograd.grad(assembled[1][:, :1].sum(), fill)
    assert loss.isnan() and grad[0, 1].isnan().all() and grad[0, 0].isfinite().all()
    for out in (*embedded, *assembled):
        assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()
    assert torch.equal(grad_fill, torch.tensor([0.0, 1, 0, 0])[:, None].expand(4, 8))


@pytest.mark.parametrize("queries", (None, 20))
def test_attention_reads_aligned_views_on_tensor_cores_and_any_other(emulated, queries):
    """Views that 16-byte words can be cut from give the bits of dense tensors; others go another way, to near them."""
    random, heads, dim, parts = torch.Generator().manual_seed(0), 2, 32, 2 if queries else 3
    packed = torch.randn(2, 18, parts * dim * heads, generator=random).to(torch.bfloat16)
    query = torch.randn(2, queries, dim * heads, generator=random).to(torch.bfloat16) if queries else None
    results = []
    for before, after in ((0, 0), (8, 16), (1, 2)):  # channels around the views
        views = [None if t is None else F.pad(t, (before, after))[..., before : t.shape[-1] + before]
                 for t in (packed, query)]  # fmt: skip
        with backend("cuda"):
            kwargs = dict(packed=views[0], num_heads=heads, query=views[1])
            results.append(evaluate(SPECS["attention"], attention, kwargs))
    dense, aligned, odd = (result.named() for result in results)
    for name, want in dense.items():
        assert torch.equal(aligned[name], want)
        torch.testing.assert_close(odd[name], want, rtol=0.05, atol=0.02)
    assert not torch.equal(odd["output 0"], dense["output 0"])  # probabilities are not rounded there


def test_an_empty_side_of_attention(emulated):
    """No query: the keys and values have zero gradients."""
    packed = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    with backend("cuda"):
        out = attention(packed, 2, torch.empty(2, 0, 16, dtype=torch.bfloat16))
        (grad,) = torch.autograd.grad(out.sum(), packed)
    assert out.shape == (2, 0, 16) and (grad == 0).all()


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_reruns_are_bit_equal(emulated, spec):
    kwargs = spec.build(next(iter(spec.cases.values())), torch.bfloat16, "cpu")
    with backend("cuda"):
        check_same(*(evaluate(spec, spec.function, kwargs) for _ in range(2)), 0, spec.name)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_an_empty_batch_launches_nothing_wrong(emulated, spec):
    kwargs = spec.build(dict(next(iter(spec.cases.values())), batch=0), torch.bfloat16, "cpu")
    try:
        with backend("cuda"):
            result = evaluate(spec, spec.function, kwargs)
    except ValueError as error:  # a mean of nothing
        assert str(error).startswith(spec.name)
    else:
        assert all((t == 0).all() for t in result.named().values())


def test_equal_rows_have_no_gradient(emulated):
    spec = SPECS["feature_alignment_loss"]
    kwargs = spec.build(spec.cases["l1"], torch.float32, "cpu")
    with backend("cuda"):
        same = evaluate(spec, feature_alignment_loss, dict(kwargs, student=kwargs["teacher"].clone()))
    assert same.outputs[0] == 0 and same.gradients["student"].abs().max() == 0


def test_below_the_norm_floor_the_divisor_is_constant(emulated):
    student, teacher = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    student[0, 1], student[1, 2] = 0, torch.linspace(-1e-13, 1e-13, 24)
    gradients = []
    for name in ("cuda", "reference"):
        x = student.clone().requires_grad_()
        with backend(name):
            gradients += torch.autograd.grad(feature_alignment_loss(x, teacher, loss="l2"), x)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0][1, 2].abs().max() > 1e6


def test_noise_with_nan_sorts_as_argsort(emulated):
    noise = torch.rand(3, 50, dtype=torch.float64)
    noise[1, 7] = noise[1, 30] = float("nan")
    with backend("cuda"):
        ids = random_masking(3, 50, 0.5, noise=noise).ids_shuffle
    assert torch.equal(ids, torch.argsort(noise, dim=1, stable=True))
