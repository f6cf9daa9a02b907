"""The CUDA C++ kernels and their glue, compiled for the CPU with every CUDA thread as a fiber (cuda_emulation.h)."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from op_checks import check_accuracy, evaluate

from fastkd.ops import SPECS, backend, feature_alignment_loss, masked_pixel_loss, random_masking
from fastkd.ops._dispatch import Kernel

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = [spec for spec in SPECS.values() if all(kernel._has_cuda for kernel in spec.kernels)]

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists() or not shutil.which("g++"), reason="needs csrc and g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Builds the CUDA library for the CPU and loads it as torch.ops.fastkd_emulated."""
    folder, torch_folder = tmp_path_factory.mktemp("emulated"), Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas",
        "-DFASTKD_CUDA", "-DFASTKD_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{torch_folder / 'include'}", f"-I{ROOT / 'csrc'}", "-include", f"{ROOT / 'tests/cuda_emulation.h'}",
    ]  # fmt: skip
    running = []
    for source in (*SOURCES, ROOT / "csrc/ops.cpp"):
        command = ["g++", *flags, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o"]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    path = folder / "libfastkd_emulated.so"
    objects = [folder / f"{source.stem}.o" for source in (*SOURCES, ROOT / "csrc/ops.cpp")]
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


@pytest.mark.parametrize("spec, case", [(s, c) for s in OPS for c in s.cases], ids=lambda v: getattr(v, "name", v))
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
}  # fmt: skip


@pytest.mark.parametrize(
    "name, case", [(n, c) for n, cases in WIDE.items() for c in cases], ids=lambda v: v if isinstance(v, str) else ""
)
def test_accuracy_at_real_and_awkward_sizes(emulated, name, case):
    for dtype in DTYPES[:2]:
        check_accuracy(SPECS[name], SPECS[name].build(case, dtype, "cpu"), dtype, "cuda")


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
def test_every_pair_of_feature_dtypes(emulated, student, teacher):
    random = torch.Generator().manual_seed(0)
    pair = [torch.randn(2, 3, 40, generator=random).to(dtype) for dtype in (student, teacher)]
    spec = SPECS["feature_alignment_loss"]
    check_accuracy(spec, dict(student=pair[0], teacher=pair[1]), student, "cuda")


@pytest.mark.parametrize("pixels", (*DTYPES, torch.uint8))
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "cropped"])
def test_every_pixel_dtype_and_layout(emulated, pixels, layout):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 40, 72, 3), generator=random).to(pixels)
    images = images[:, 5:37, 3:67] if layout == "cropped" else images[:, :32, :64].contiguous()
    if pixels != torch.uint8:
        images = images.permute(0, 3, 1, 2)
        images = images.contiguous() if layout == "nchw" else images
    kwargs = dict(
        pred=torch.randn(2, 3, 768, generator=random), images=images, masked=torch.tensor([[0, 7, 3], [2, 1, 6]]),
        patch_size=16, norm_pix_loss=True, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4],
    )  # fmt: skip
    check_accuracy(SPECS["masked_pixel_loss"], kwargs, torch.float32, "cuda")


def test_an_id_outside_the_image_gives_nan_and_is_not_followed(emulated):
    pred, images = torch.randn(1, 2, 48), torch.randn(1, 3, 8, 8)
    for outside in (4, -1, 1 << 40):
        with backend("cuda"):
            pred = pred.detach().requires_grad_()
            loss = masked_pixel_loss(pred, images, torch.tensor([[1, outside]]), 4)
            (grad,) = torch.autograd.grad(loss, pred)
        assert loss.isnan() and grad[0, 1].isnan().all() and grad[0, 0].isfinite().all()


def test_reruns_are_bit_equal_and_equal_rows_have_no_gradient(emulated):
    spec = SPECS["feature_alignment_loss"]
    kwargs = spec.build(spec.cases["l1"], torch.float32, "cpu")
    with backend("cuda"):
        first, second = (evaluate(spec, spec.function, kwargs) for _ in range(2))
        same = evaluate(spec, feature_alignment_loss, dict(kwargs, student=kwargs["teacher"].clone()))
    assert torch.equal(first.outputs[0], second.outputs[0])
    assert torch.equal(first.gradients["student"], second.gradients["student"])
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
