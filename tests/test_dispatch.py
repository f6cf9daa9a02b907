"""Which backend runs: order, override, reasons, and what an import costs."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from conftest import backends_of
from process import run_python
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
import fastkd.ops.blocks.gelu
from fastkd import _native, ops
from fastkd.ops import _dispatch
from fastkd.ops._dispatch import Kernel

SPEC = ops.SPECS["masked_pixel_loss"]
FORWARD = SPEC.kernels[0]


@pytest.fixture
def kernel():
    """A kernel without native code that records which implementation ran."""
    ran = []
    made = Kernel("test_kernel_of_no_op", reference=lambda x, out: ran.append("reference"))
    made.ran = ran
    yield made
    del Kernel.all["test_kernel_of_no_op"]


def call(kernel) -> None:
    kernel(torch.zeros(1), torch.zeros(1))


def test_cpu_tensors_take_cpp_where_it_is_built():
    wanted = "cpp" if _native.why_not_loaded("cpu") is None else "reference"
    assert FORWARD.pick("cpu", torch.float32) == wanted


def test_every_kernel_is_in_the_native_library():
    if _native.why_not_loaded("cpu"):
        pytest.skip(_native.why_not_loaded("cpu"))
    missing = {name: k.why_not("cpp", "cpu", torch.float32) for name, k in Kernel.all.items()}
    missing = {name: reason for name, reason in missing.items() if reason}
    without = ("gram", "gram_backward", "quantize_rows")  # products, which are torch's; Triton alone
    assert missing == dict.fromkeys(without, "no C++ kernel is written for it")


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with fastkd.backend("triton"), pytest.raises(RuntimeError, match="triton.*Triton needs CUDA tensors, got cpu"):
        FORWARD.pick("cpu", torch.float32)
    with fastkd.backend("cuda"), pytest.raises(RuntimeError, match="cuda.*it takes cuda tensors, got cpu"):
        FORWARD.pick("cpu", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fastkd.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        FORWARD.pick("cpu", torch.float64)


def test_the_automatic_choice_falls_back_and_logs_the_reason_once(kernel, caplog):
    with caplog.at_level(logging.INFO, "fastkd"):
        call(kernel)
        call(kernel)
    assert kernel.ran == ["reference", "reference"]
    lines = [r.getMessage() for r in caplog.records if "test_kernel_of_no_op" in r.getMessage()]
    assert len(lines) == 1 and "cpp" in lines[0]


def test_a_library_from_other_sources_is_named(kernel):
    if _native.why_not_loaded("cpu"):
        pytest.skip(_native.why_not_loaded("cpu"))
    assert "has no test_kernel_of_no_op" in kernel.why_not("cpp", "cpu", torch.float32)
    with fastkd.backend("cpp"), pytest.raises(RuntimeError, match="has no test_kernel_of_no_op.*pip install"):
        call(kernel)


def test_overrides_nest_and_end_with_an_exception():
    with fastkd.backend("reference"):
        with pytest.raises(KeyError), fastkd.backend("cuda"):
            assert _dispatch.forced_backend() == "cuda"
            raise KeyError
        assert _dispatch.forced_backend() == "reference"
    assert _dispatch.forced_backend() == (os.environ.get("FASTKD_BACKEND") or None)


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of reference, cpp, triton, cuda"):
        with fastkd.backend("fast"):
            pass
    monkeypatch.setenv("FASTKD_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTKD_BACKEND: got 'fast'"):
        FORWARD.pick("cpu", torch.float32)


def test_the_environment_variable_forces_and_the_block_wins(kernel, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert FORWARD.pick("cpu", torch.float32) == "reference"
    with fastkd.backend("cuda"), pytest.raises(RuntimeError):
        FORWARD.pick("cpu", torch.float32)


def test_an_override_reaches_a_graph_that_is_already_compiled(monkeypatch):
    kwargs = SPEC.build(SPEC.cases["mask"], torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(SPEC.function, fullgraph=True, backend="aot_eager")
    compiled(**kwargs)
    used = []
    original = Kernel.implementation
    monkeypatch.setattr(Kernel, "implementation", lambda self, name: used.append(name) or original(self, name))
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in backends_of(SPEC):
            if name != "cuda":
                with fastkd.backend(name):
                    compiled(**kwargs)
    assert used == [name for name in backends_of(SPEC) if name != "cuda"]


def test_the_override_reaches_backward_threads():
    """Autograd runs backward on threads of its own where a device has one; the override is process-wide."""
    kwargs = SPEC.build(SPEC.cases["mask"], torch.float32, "cpu")
    used = []
    with pytest.MonkeyPatch.context() as patch, fastkd.backend("reference"):
        original = Kernel.implementation
        patch.setattr(
            Kernel, "implementation", lambda self, name: used.append((self.name, name)) or original(self, name)
        )
        pred = kwargs["pred"].requires_grad_()
        SPEC.function(**kwargs).backward()
    assert used == [("masked_pixel_loss", "reference"), ("masked_pixel_loss_backward", "reference")]
    assert pred.grad is not None


def python(code: str, **environment) -> str:
    done = run_python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_torch_alone_and_no_cuda_context():
    heavy = ("triton", "timm", "transformers", "matplotlib", "sklearn", "onnx", "tyro", "rich", "PIL", "torchvision")
    code = f"""
import sys, torch
before = set(sys.modules)
import fastkd, fastkd.ops, fastkd.nn, fastkd.models, fastkd.methods
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({heavy!r})), torch.cuda.is_initialized())
"""
    assert python(code) == "[] False"


def test_cpu_library_from_the_environment():
    code = "from fastkd import _native; print(_native.library_path('cpu'), _native.why_not_loaded('cpu'))"
    said = python(code, FASTKD_CPU_LIBRARY="/nowhere/libother.so")
    assert said.startswith("/nowhere/libother.so libother.so does not load:") and "pip install" in said


class Calls(TorchDispatchMode):
    """Names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_eager_code_enters_an_op_directly_and_whoever_watches_sees_it():
    """The same value and gradient both ways: through the registered op under a dispatch mode, past it without one."""
    op, x = fastkd.ops.blocks.gelu._op, torch.randn(3, 5, requires_grad=True)
    direct = op(x)
    assert type(direct.grad_fn) is not type(op._traced(x).grad_fn)
    with Calls() as calls:
        watched = op(x)
    assert "fastkd.gelu.default" in calls.names
    assert torch.equal(direct, watched)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (direct, watched)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert not op(x).requires_grad


def test_outputs_that_nothing_was_made_of_get_no_gradient():
    x, weight, bias = torch.randn(1, 2, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
    total, normed = ops.residual_layer_norm(x, torch.zeros(1, 2, 8), weight, bias)
    assert torch.equal(torch.autograd.grad(total.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    assert torch.autograd.grad(normed.sum(), x)[0].abs().max() < 1e-6


def test_the_fastest_measured_backend_comes_first_on_cuda(monkeypatch):
    assert FORWARD.order("cuda")[0] == "triton"
    monkeypatch.setattr(_dispatch, "device_record", lambda: {FORWARD.name: {"fastest": "cuda"}})
    assert FORWARD.order("cuda") == ("cuda", "triton", "reference")
    assert FORWARD.order("cpu") == ("cpp", "reference")
