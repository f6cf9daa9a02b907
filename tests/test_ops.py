"""Every op x backend x dtype x case, from its OpSpec alone."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS_HERE, DEVICE, device_of, dtypes_of
from op_checks import check_accuracy, evaluate, to_double

from fastkd.ops import SPECS, backend

CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases]
CASE_IDS = [f"{spec.name}-{case}" for spec, case in CASES]
each_case = pytest.mark.parametrize("spec, case", CASES, ids=CASE_IDS)
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.mark.parametrize("name", BACKENDS_HERE)
@each_case
def test_accuracy(spec, case, name):
    for dtype in dtypes_of(name):
        check_accuracy(spec, spec.build(spec.cases[case], dtype, device_of(name)), dtype, name)


@pytest.mark.parametrize("name", BACKENDS_HERE)
@each_op
def test_reruns_are_bit_equal(spec, name):
    kwargs = spec.build(next(iter(spec.cases.values())), torch.float32, device_of(name))
    with backend(name):
        first, second = (evaluate(spec, spec.function, kwargs) for _ in range(2))
    for a, b in zip(first.outputs + list(first.gradients.values()), second.outputs + list(second.gradients.values())):
        assert torch.equal(a, b)


@each_case
def test_opcheck(spec, case):
    """Schema, fake tensors (strided inputs included) and autograd registration of every custom op that a call makes."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastkd":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    kwargs = spec.build(spec.cases[case], torch.float32, DEVICE)
    with Record():
        evaluate(spec, spec.function, kwargs)
    assert calls, "no custom op was called"
    for func, args, kw in calls:
        forward = not func._opname.endswith("_backward")  # saved tensors still require grad there
        args = [
            a.detach().requires_grad_(forward and a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
        ]
        torch.library.opcheck(func, args, kw)


@each_op
def test_gradcheck(spec):
    if not spec.differentiable:
        pytest.skip("no gradient to check")
    small = min(spec.cases.values(), key=lambda c: sum(t.numel() for t in to_double(spec.build(c, torch.float64, "cpu")).values() if isinstance(t, torch.Tensor)))
    kwargs = spec.build(small, torch.float64, "cpu")
    names = [n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)]
    for name in ("reference", "cpp"):
        if name in BACKENDS_HERE:
            with backend(name):
                inputs = [kwargs[n].detach().requires_grad_() for n in names]
                assert torch.autograd.gradcheck(lambda *v: spec.function(**{**kwargs, **dict(zip(names, v))}), inputs)


@each_op
def test_fullgraph_compile(spec):
    kwargs = spec.build(next(iter(spec.cases.values())), torch.float32, DEVICE)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=False)
    eager, graph = evaluate(spec, spec.function, kwargs), evaluate(spec, compiled, kwargs)
    for a, b in zip(eager.outputs + list(eager.gradients.values()), graph.outputs + list(graph.gradients.values())):
        torch.testing.assert_close(a, b)


@each_op
def test_no_grad_gives_the_same_output(spec):
    kwargs = spec.build(next(iter(spec.cases.values())), torch.float32, DEVICE)
    with torch.no_grad():
        result = spec.function(**kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    for a, b in zip(evaluate(spec, spec.function, kwargs).outputs, outputs):
        assert torch.equal(a, b) and not b.requires_grad


@each_op
def test_double_backward_raises(spec):
    if not spec.differentiable:
        pytest.skip("no gradient")
    kwargs = spec.build(next(iter(spec.cases.values())), torch.float32, DEVICE)
    name = next(n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor))
    kwargs[name] = kwargs[name].detach().requires_grad_()
    result = spec.function(**kwargs)
    output = (result[0] if isinstance(result, tuple) else result).double().square().sum()
    (gradient,) = torch.autograd.grad(output, kwargs[name], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="fastkd"):
        torch.autograd.grad(gradient.sum(), kwargs[name])
