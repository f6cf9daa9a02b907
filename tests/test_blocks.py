"""What the OpSpecs of the block ops cannot see on a CPU: the paths that CUDA tensors take."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, backends_of, device_of
from op_checks import FLOOR, check_accuracy, differentiable, evaluate, random_upstream, relative_error, to_double

from fastkd.ops import SPECS, backend
from fastkd.ops.blocks import attention, linear

PRODUCTS = [SPECS["linear"], SPECS["mlp"]]
each_product = pytest.mark.parametrize(
    "spec, name",
    [pytest.param(s, b, id=f"{s.name}-{b}") for s in PRODUCTS for b in backends_of(s) if b in ("reference", "triton")],
)
ATTENTION = SPECS["attention"]


@pytest.fixture
def vendor(monkeypatch):
    """Products as on CUDA: weights are rounded once, and the activation of the MLP is made again in backward."""
    monkeypatch.setattr(linear, "by_vendor", lambda x: True)


@each_product
def test_products_of_the_vendor_library(spec, name, vendor):
    for dtype in (torch.float32, torch.bfloat16):
        for case in spec.cases.values():
            check_accuracy(spec, spec.build(case, dtype, device_of(name)), dtype, name)


@each_product
def test_each_gradient_alone_with_the_vendor_library(spec, name, vendor):
    kwargs = spec.build(spec.cases["mixed"], torch.bfloat16, device_of(name))
    with backend(name):
        every = evaluate(spec, spec.function, kwargs).gradients
        for wanted in differentiable(spec, kwargs):
            leaf = kwargs[wanted].detach().requires_grad_()
            out = spec.function(**(kwargs | {wanted: leaf}))
            (alone,) = torch.autograd.grad(out, leaf, random_upstream(out))
            assert relative_error(alone, every[wanted]) <= FLOOR[torch.float32]


def test_weights_are_rounded_once_for_both_directions(vendor, monkeypatch):
    """Backward reads the tensor that forward made."""
    made, read = [], []
    rounded, product = linear.rounded, linear.grad_input.reference
    monkeypatch.setattr(linear, "rounded", lambda *args: made.append(rounded(*args)) or made[-1])
    monkeypatch.setattr(linear.grad_input, "reference", lambda *args: read.append(args[1]) or product(*args))
    kwargs = PRODUCTS[0].build(PRODUCTS[0].cases["mixed"], torch.bfloat16, DEVICE)
    with backend("reference"):
        gradients = evaluate(PRODUCTS[0], linear.linear, kwargs).gradients
    assert made[0].dtype == torch.bfloat16 and read[0].data_ptr() == made[0].data_ptr()
    assert gradients["weight"].dtype == torch.float32


@pytest.mark.parametrize("case", ["decoder", "masked_queries", "long", "strided"])
def test_torch_attention_of_long_sequences(case):
    kwargs = ATTENTION.build(ATTENTION.cases[case], torch.float32, DEVICE)
    exact = evaluate(ATTENTION, ATTENTION.reference, to_double(kwargs)).named()
    for name, value in evaluate(ATTENTION, attention._torch_attention, kwargs).named().items():
        assert relative_error(value, exact[name]) <= 4 * FLOOR[torch.float32], name


@pytest.mark.parametrize("rows, width", [(0, 5), (1, 1), (33, 129), (700, 20)])
def test_column_sums(rows, width):
    pytest.importorskip("triton")
    from fastkd.ops.blocks import sums_triton

    wide = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        x, out = wide.to(dtype)[:, :width], torch.empty(width, device=DEVICE)
        sums_triton.column_sum(x, out)
        assert relative_error(out, x.double().sum(0)) <= FLOOR[torch.float32]
