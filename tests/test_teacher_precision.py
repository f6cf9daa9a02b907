"""8-bit products of the frozen teacher: every instruction set, the teacher that is made of them, its option."""

from __future__ import annotations

import copy
import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS_HERE, device_of
from native import ROOT, compile_shared, setup_constants
from tiny_run import tiny_config
from torch import nn

from fastkd import ops
from fastkd._native import cpu_features
from fastkd.methods.dmae import DMAE
from fastkd.models import MaskedAutoencoderViT, Teacher
from fastkd.models.quantized import QuantizedLinear, quantize_vit, why_not_fast
from fastkd.ops.blocks.linear_fp8 import why_emulated
from fastkd.ops.blocks.linear_int8 import pack_int8, unpack_int8
from fastkd.train.build import build
from fastkd.train.config import ConfigError

SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)
MAE = dict(**SHAPE, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
IDS = torch.tensor([[3, 0, 15, 8, 4], [1, 2, 14, 5, 9]])


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vit() -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(**MAE)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# -- products of integers, on each instruction set ---------------------------------------------------------------------

PRODUCT = """
#include "gemm_int8.h"
using namespace fastkd;

// a [m, depth] int8, b packed -> c [m, n] int32
extern "C" void product(int64_t m, int64_t n, int64_t depth, const int8_t* a, const int8_t* b, int32_t* c) {
  const int64_t tiles = (depth + 63) / 64;
  int8::gemm<int8::KERNEL>(
      m, n, depth, b,
      [&](int64_t row, int8_t* strip, int32_t* sums) {
        for (int64_t r = 0; r < 16 && row + r < m; ++r) {
          sums[r] = 0;
          for (int64_t k = 0; k < 64 * tiles; ++k) {
            const int8_t value = k < depth ? a[(row + r) * depth + k] : 0;
            strip[k / 64 * int8::kTile + 64 * r + k % 64] = value;
            sums[r] += value;
          }
        }
      },
      [&](int64_t i, int64_t j, const int32_t* block) {
        for (int64_t r = 0; r < 32 && i + r < m; ++r)
          for (int64_t k = 0; k < 32 && j + k < n; ++k) c[(i + r) * n + j + k] = block[32 * r + k];
      });
}
"""
# name: (kernel, compiler flags, CPU features)
SETS = {
    "plain": ("Plain", ["-march=x86-64"], set()),
    "avx2": ("Plain", ["-march=x86-64-v3"], {"avx2", "fma"}),
    "vnni": ("Vnni", ["-march=x86-64-v4"], {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
    "amx": ("Amx", ["-march=sapphirerapids"], {"amx_int8", "amx_tile", "amx_bf16", "avx512_fp16"}),
}


@pytest.mark.skipif(not (ROOT / "csrc").exists() or not shutil.which("g++"), reason="needs csrc and g++")
@pytest.mark.parametrize("name", SETS)
def test_products_of_integers_are_exact(name, tmp_path):
    """The CPU library takes the best of these; here each one that this CPU has is compared with int64 sums."""
    kernel, flags, features = SETS[name]
    if not features <= cpu_features():
        pytest.skip(f"this CPU lacks {', '.join(sorted(features - cpu_features()))}")
    source, torch_folder = tmp_path / "product.cpp", Path(torch.__file__).parent
    source.write_text(PRODUCT.replace("KERNEL", kernel))
    compile_shared(
        source, tmp_path / "product.so", *flags, setup_constants()["TARGET"], "-fopenmp-simd",
        f"-I{torch_folder / 'include'}", f"-I{ROOT / 'csrc'}", f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed",
        "-ltorch_cpu",
    )  # fmt: skip
    library, random = ctypes.CDLL(str(tmp_path / "product.so")), torch.Generator().manual_seed(0)
    if name == "amx" and not torch.ops.fastkd_cpu.has_amx():
        pytest.skip("the system does not hand out AMX tiles")
    torch.set_num_threads(3)
    for m, n, depth in ((1, 1, 1), (33, 40, 70), (70, 33, 64), (40, 70, 2300), (1500, 40, 1100)):
        a, b = (torch.randint(-127, 128, (rows, depth), generator=random, dtype=torch.int8) for rows in (m, n))
        a[0], b[-1] = 127, -127  # the largest sums
        b[:, 0] = 127  # so that the scale of every channel is 1
        packed, scale = pack_int8(b.float())
        assert torch.equal(scale, torch.ones(n)) and torch.equal(unpack_int8(packed, n, depth), b)
        got = torch.full((m, n), -1, dtype=torch.int32)
        sizes = [ctypes.c_int64(size) for size in (m, n, depth)]
        library.product(*sizes, *(ctypes.c_void_p(t.data_ptr()) for t in (a, packed, got)))
        assert torch.equal(got.long(), a.long() @ b.long().t()), (m, n, depth)


# -- quantisation ------------------------------------------------------------------------------------------------------


def test_int8_is_the_plain_formula_bit_for_bit():
    """Whatever computes it: the same integers, and the same float32 factors in the same order."""
    random = torch.Generator().manual_seed(3)
    x, weight = torch.randn(37, 200, generator=random), torch.randn(50, 200, generator=random)
    x_scale, scale = (t.abs().amax(1) / torch.tensor(127.0) for t in (x, weight))
    q, w = ((t * (torch.tensor([127.0]) / t.abs().amax(1, keepdim=True))).round() for t in (x, weight))
    want = (q.double() @ w.double().t()).float() * (x_scale[:, None] * scale)
    assert torch.equal(ops.linear_int8(x, *pack_int8(weight)), want)
    assert 0.002 < difference(want, x.double() @ weight.double().t()) < 0.02


def test_every_float8_value_and_the_ties_between_them():
    """The Triton kernel makes e4m3 of float32 bits: against torch's cast, over all magnitudes up to the largest."""
    positive = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (positive[1:] + positive[:-1]) / 2
    near = torch.cat([between * (1 - 2**-20), between * (1 + 2**-20)])
    row = torch.cat([positive, between, near])
    x = torch.cat([row, -row, torch.tensor([448.0])])[None]
    for backend in set(BACKENDS_HERE) & {"reference", "triton"}:
        with ops.backend(backend):
            codes, scale = ops.quantize_rows(x.to(device_of(backend)), "fp8")
        assert scale.item() == 1
        assert torch.equal(codes[0].cpu(), x[0].to(torch.float8_e4m3fn).view(torch.uint8)), backend


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.ones(2, 20)
    x[1, 7] = bad
    for backend in set(BACKENDS_HERE) - {"cuda"}:
        device = device_of(backend)
        packed = [t.to(device) for t in pack_int8(torch.eye(20))]
        with ops.backend(backend):
            if backend != "cpp":
                for format in ("int8", "fp8"):
                    _, scale = ops.quantize_rows(x.to(device), format)
                    assert scale[0].isfinite() and not scale[1].isfinite()
            if backend != "triton":
                out = ops.linear_int8(x.to(device), *packed)
                assert out[0].isfinite().all() and not out[1].isfinite().any()


def test_gradients_are_refused():
    packed, codes = pack_int8(torch.eye(16)), ops.quantize_rows(torch.eye(16), "fp8")
    x = torch.ones(2, 16, requires_grad=True)
    for call in (
        lambda: ops.linear_int8(x, *packed), lambda: ops.linear_fp8(x, *codes), lambda: ops.quantize_rows(x, "int8")
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x: got a tensor that requires grad"):
            call()
        with torch.no_grad():
            call()
    with pytest.raises(ValueError, match="quantize_rows: format: got 'int4', expected 'int8' or 'fp8'"):
        ops.quantize_rows(torch.ones(2, 2), "int4")
    with pytest.raises(ValueError, match="linear_int8: x: got 65537 channels, expected 1 to 65536"):
        ops.linear_int8(torch.ones(1, 65537), *packed)


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("precision, most", [("int8", 0.02), ("fp8", 0.06)])
def test_features_are_close(vit, precision, most, dtype):
    exact, ours = Teacher(vit, (0, 3)), Teacher(vit, (0, 3), precision=precision, dtype=dtype)
    plain = Teacher(vit, (0, 3), dtype=dtype)
    first, last = zip(exact(images(), IDS), ours(images(), IDS), plain(images(), IDS))
    assert torch.equal(first[1], first[2])  # the first block is not quantised
    assert 1e-3 < difference(last[1], last[0]) < most and last[1].dtype == last[2].dtype
    assert not last[1].requires_grad and f", {precision}" in repr(ours) and precision not in repr(exact)


def test_one_block_alone_is_quantised(vit):
    exact, ours = Teacher(vit, 0), Teacher(vit, 0, precision="int8")
    assert 1e-4 < difference(ours(images())[0], exact(images())[0]) < 0.02


def test_layers_of_an_8_bit_teacher(vit):
    teacher = Teacher(vit, 2, precision="int8")
    layers = [m for m in teacher.vit.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 8 and not any(isinstance(m, nn.Linear) for m in teacher.vit.blocks[1:].modules())
    assert len([m for m in teacher.vit.blocks[0].modules() if isinstance(m, nn.Linear)]) == 4
    assert quantize_vit(vit, "exact") is vit and not any(isinstance(m, QuantizedLinear) for m in vit.modules())
    for wrong in ("int4", None):
        with pytest.raises(ValueError, match="precision: got .*, expected one of exact, int8, fp8"):
            Teacher(vit, 2, precision=wrong)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_codes_and_scales_survive_casts_copies_and_state(vit, precision):
    """A training module that is cast or copied takes its teacher along; nothing of it is saved."""
    student = MaskedAutoencoderViT(**MAE)
    method = DMAE(student, Teacher(vit, 3, precision=precision), (2,), (3,))
    layer = method.teacher.vit.blocks[3].mlp[0]
    before = {name: value.clone() for name, value in layer.named_buffers()}
    want = method.teacher(images(), IDS)[0]
    assert not any("teacher" in name for name in method.state_dict()) and not method.teacher.state_dict()
    copied = copy.deepcopy(method)
    assert torch.equal(copied.teacher(images(), IDS)[0], want)
    copied.to(torch.bfloat16)
    moved = copied.teacher.vit.blocks[3].mlp[0]
    for name in ("codes", "scale"):
        assert torch.equal(getattr(moved, name), before[name]) and getattr(moved, name).dtype == before[name].dtype
    assert moved.bias.dtype == (torch.float32 if precision == "int8" else torch.bfloat16)
    assert difference(copied.teacher(images(), IDS)[0], want) < 0.05


@pytest.mark.parametrize("precision", ["exact", "int8", "fp8"])
def test_nothing_is_saved_for_a_backward(vit, precision):
    teacher = Teacher(vit, (1, 3), precision=precision)
    teacher.vit.blocks.requires_grad_(True)

    def refuse(tensor):
        raise AssertionError(f"a tensor {tuple(tensor.shape)} is saved")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t), torch.enable_grad():
        assert not any(feature.requires_grad for feature in teacher(images(), IDS))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_fullgraph_compile(vit, precision):
    teacher = Teacher(vit, (0, 3), precision=precision)
    compiled = torch.compile(lambda x, ids: teacher(x, ids), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(images(), IDS), teacher(images(), IDS)):
        assert difference(got, want) < 1e-3


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_under_autocast_it_is_the_16_bit_teacher(vit, precision):
    """Weights in float32 under autocast, as in a training step: activations are 16-bit, as with dtype=bfloat16."""
    teacher = Teacher(vit, 3, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        got = teacher(images(), IDS)[0]
    want = Teacher(vit, 3, precision=precision, dtype=torch.bfloat16)(images(), IDS)[0]
    assert got.dtype == want.dtype and difference(got, want) < 0.05


def test_gradients_of_the_student(vit):
    """With a student that never saw its teacher, the gradient moves by less than the teacher's feature does."""
    torch.manual_seed(1)
    student, noise = MaskedAutoencoderViT(**MAE), torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in ("exact", "int8", "fp8"):
        torch.manual_seed(2)
        method = DMAE(student, Teacher(vit, 3, precision=precision), (2,), (3,), loss="l2")
        parameters = [p for p in method.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(method(images(), 0.5, noise)["loss"], parameters, allow_unused=True)
        found[precision] = torch.cat([g.flatten() for g in gradients if g is not None])
    assert 0 < difference(found["int8"], found["exact"]) < 0.02 and 0 < difference(found["fp8"], found["exact"]) < 0.06


# -- the option --------------------------------------------------------------------------------------------------------


def test_option(tmp_path):
    """int8 trains on a CPU; fp8, which would be emulated there, is refused with the reason."""
    config = tiny_config(tmp_path, teacher_precision="fp8")
    with pytest.raises(ConfigError, match="--teacher-precision: got fp8, expected exact; float8 products need an NVI"):
        build(config, torch.device("cpu"))
    reason = why_not_fast("int8", torch.device("cpu"))
    config = tiny_config(tmp_path, teacher_precision="int8")
    if reason:
        with pytest.raises(ConfigError, match="--teacher-precision: got int8"):
            build(config, torch.device("cpu"))
        return
    method, resolved = build(config, torch.device("cpu"))
    assert method.teacher.precision == "int8" and resolved.as_dict()["teacher_precision"] == "int8"
    assert build(tiny_config(tmp_path), torch.device("cpu"))[0].teacher.precision == "exact"
    build(tiny_config(tmp_path, teacher_precision="fp8", teacher="none"), torch.device("cpu"))  # no teacher, no matter


def test_devices():
    assert why_not_fast("exact", torch.device("cuda")) is None
    assert "int8 products are written for CPUs, got cuda" in why_not_fast("int8", torch.device("cuda"))
    assert "got cpu" in why_emulated(torch.device("cpu"))
