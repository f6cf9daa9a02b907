"""Every op x backend x dtype x case, from its OpSpec alone."""

from __future__ import annotations

import memory
import pytest
import torch
from conftest import DEVICE, backends_of, device_of, dtypes_of
from op_checks import FLOOR, check_accuracy, check_same, differentiable, evaluate, random_upstream, to_double

from fastkd.ops import SPECS, backend

CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases]
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_case = pytest.mark.parametrize("spec, case", CASES, ids=[f"{spec.name}-{case}" for spec, case in CASES])
OP_BACKENDS = [pytest.param(s, b, id=f"{s.name}-{b}") for s in SPECS.values() for b in backends_of(s)]
each_op_backend = pytest.mark.parametrize("spec, name", OP_BACKENDS)
# The same for ops that have a gradient.
each_loss = pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.differentiable], ids=lambda s: s.name)
each_loss_backend = pytest.mark.parametrize("spec, name", [p for p in OP_BACKENDS if p.values[0].differentiable])
each_case_backend = pytest.mark.parametrize(
    "spec, case, name",
    [pytest.param(s, c, b, id=f"{s.name}-{c}-{b}") for s, c in CASES for b in backends_of(s)],
)
HEADS = ("linear_cross_entropy", "linear_jsd", "linear_kl")  # losses of a linear head
LAYOUTS = {"surrounded": memory.surrounded, "transposed": memory.transposed, "expanded": memory.expanded}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def first_case(spec, dtype=torch.float32, device=DEVICE) -> dict:
    return spec.build(next(iter(spec.cases.values())), dtype, device)


def smallest_case(spec, dtype, device) -> dict:
    def size(case) -> int:
        return sum(v.numel() for v in spec.build(case, dtype, "cpu").values() if isinstance(v, torch.Tensor))

    return spec.build(min(spec.cases.values(), key=size), dtype, device)


@pytest.mark.usefixtures("several_threads")
@each_case_backend
def test_accuracy(spec, case, name):
    for dtype in dtypes_of(name):
        check_accuracy(spec, spec.build(spec.cases[case], dtype, device_of(name)), dtype, name)


@each_op_backend
def test_reruns_are_bit_equal(spec, name):
    kwargs = first_case(spec, device=device_of(name))
    with backend(name):
        check_same(evaluate(spec, spec.function, kwargs), evaluate(spec, spec.function, kwargs), 0, spec.name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_number_of_threads_changes_nothing(spec):
    """Reductions run in a fixed order: the same bits with 1 and 3 threads (torch's matrix products aside)."""
    if "cpp" not in backends_of(spec):
        pytest.skip("the native CPU library is not built")
    for case in spec.cases.values():
        kwargs = spec.build(case, torch.float32, "cpu")
        results = []
        with backend("cpp"):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(evaluate(spec, spec.function, kwargs))
        products = spec.name in ("class_vector_kd", "linear", "linear_pixel_loss", "visible_patch_embed", *HEADS)
        check_same(*results, 1e-6 if products else 0, spec.name)


@each_layout
@each_op_backend
def test_input_layouts(spec, name, layout):
    """Strides do not matter: embedded in garbage, transposed in memory, repeated with stride 0."""
    for case in list(spec.cases)[:3]:
        kwargs = spec.build(spec.cases[case], torch.float32, device_of(name))
        tensors = {k: LAYOUTS[layout](v) for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim}
        if layout == "expanded" and spec.name in HEADS:
            # Equal class vectors have equal logits: no gradient reaches the input, and rounding would be compared.
            tensors = {k: v for k, v in tensors.items() if not k.endswith("weight")}
        plain = kwargs | {k: v.contiguous() for k, v in tensors.items()}
        with backend(name), memory.canaries():
            got = evaluate(spec, spec.function, kwargs | tensors)
            want = evaluate(spec, spec.function, plain)
        check_same(got, want, 2 * FLOOR[torch.float32], f"{spec.name} {case} {layout}")


@pytest.mark.parametrize("layout", ["transposed", "expanded", "zero_strides"])
@each_loss_backend
def test_upstream_gradient_layouts(spec, name, layout):
    """Upstream gradients come with any strides: `sum().backward()` sends one number with all strides 0."""

    def upstream(output, index=0):
        if layout == "zero_strides":
            return torch.full((), 1.5, dtype=output.dtype, device=output.device).expand(output.shape)
        return LAYOUTS[layout](random_upstream(output, index))

    kwargs = first_case(spec, device=device_of(name))
    with backend(name):
        got = evaluate(spec, spec.function, kwargs, upstream)
        want = evaluate(spec, spec.function, kwargs, lambda *a: upstream(*a).contiguous())
    check_same(got, want, 2 * FLOOR[torch.float32], f"{spec.name} {layout}")


@each_loss_backend
def test_one_gradient_alone(spec, name):
    """Each gradient is the same when it is the only one asked for."""
    kwargs = first_case(spec, device=device_of(name))
    names = differentiable(spec, kwargs)
    with backend(name):
        every = evaluate(spec, spec.function, kwargs).gradients
        for wanted in names:
            leaf = kwargs[wanted].detach().requires_grad_()
            result = spec.function(**(kwargs | {wanted: leaf}))
            outputs = list(result) if isinstance(result, tuple) else [result]
            (alone,) = torch.autograd.grad(outputs, leaf, [random_upstream(o, i) for i, o in enumerate(outputs)])
            torch.testing.assert_close(alone, every[wanted])


def kind(argument):
    """What distinguishes calls of an op apart from sizes: dtype, layout, presence, flags."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.ndim, argument.is_contiguous(), argument.requires_grad, min(argument.numel(), 1)
    return argument if isinstance(argument, bool) else type(argument).__name__


def leaf(argument, trained: bool):
    """The argument without history; it requires grad where it did and `trained` is set. Lists of tensors too."""
    if isinstance(argument, (list, tuple)):
        return [leaf(a, trained) for a in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().requires_grad_(trained and argument.requires_grad)


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@each_op
def test_opcheck(spec, layout):
    """Schema, fake tensors and autograd registration of every custom op that the cases call."""
    calls = {}

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastkd":
                signature = [kind(a) for a in args]  # sizes alone do not make another call
                calls[f"{func}{signature}"] = (func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    for case in spec.cases.values() if layout == "plain" else list(spec.cases.values())[:1]:
        kwargs = spec.build(case, torch.float32, DEVICE)
        if layout != "plain":
            change = LAYOUTS[layout]
            kwargs |= {k: change(v) for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim}
        with Record():
            evaluate(spec, spec.function, kwargs)
    assert calls, "no custom op was called"
    for func, args, kw in calls.values():
        forward = not func._opname.endswith("_backward")  # saved tensors still require grad there
        args = [leaf(a, forward) for a in args]
        torch.library.opcheck(func, args, kw)


@pytest.mark.parametrize(
    "spec, name", [p for p in OP_BACKENDS if p.values[0].differentiable and p.values[1] in ("reference", "cpp")]
)
def test_gradcheck(spec, name):
    kwargs = smallest_case(spec, torch.float64, "cpu")
    names = differentiable(spec, kwargs)
    inputs = [kwargs[n].detach().requires_grad_() for n in names]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *v: spec.function(**(kwargs | dict(zip(names, v)))), inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_op
def test_fullgraph_compile(spec, dynamic):
    kwargs = first_case(spec)
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    check_same(evaluate(spec, compiled, kwargs), evaluate(spec, spec.function, kwargs), 1e-6, spec.name)


@each_loss
def test_autocast(spec):
    """Under autocast: gradients in the dtype of their inputs, scalar losses in float32, errors of bfloat16."""
    kwargs = first_case(spec)
    exact = evaluate(spec, spec.reference, to_double(kwargs)).named()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = evaluate(spec, spec.function, kwargs)
    for output in ours.outputs:
        if output.ndim == 0:
            assert output.dtype == torch.float32
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == kwargs[name].dtype
    for name, value in ours.named().items():
        # By norm: the sign of a tiny difference (L1) may flip in 16 bits.
        error = (value.cpu().double() - exact[name]).norm() / exact[name].norm()
        assert error <= 4 * FLOOR[torch.bfloat16], f"{spec.name} {name} under autocast: error {error:.3g}"


@each_op
def test_no_grad_gives_the_same_output(spec):
    kwargs = first_case(spec)
    with torch.no_grad():
        result = spec.function(**kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    for a, b in zip(evaluate(spec, spec.function, kwargs).outputs, outputs):
        assert torch.equal(a, b) and not b.requires_grad


@each_loss
def test_double_backward_raises(spec):
    kwargs = first_case(spec)
    name = differentiable(spec, kwargs)[0]
    kwargs[name] = kwargs[name].detach().requires_grad_()
    result = spec.function(**kwargs)
    output = (result[0] if isinstance(result, tuple) else result).double().square().sum()
    (gradient,) = torch.autograd.grad(output, kwargs[name], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="fastkd"):
        torch.autograd.grad(gradient.sum(), kwargs[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_op_backend
def test_empty_batch(spec, name, dtype):
    """No image: an empty result and zero gradients, or (a mean of nothing) an error that names the op."""
    case = dict(next(iter(spec.cases.values())), batch=0)
    kwargs = spec.build(case, dtype, device_of(name))
    with backend(name):
        try:
            result = evaluate(spec, spec.function, kwargs)
        except ValueError as error:
            assert str(error).startswith(f"{spec.name}: "), error
            return
    for output in result.outputs:
        assert (output == 0).all(), f"{spec.name} makes numbers from an empty batch"
    for gradient in result.gradients.values():
        assert (gradient == 0).all()


@each_op
def test_wrong_arguments_are_named(spec):
    """Too many dimensions (unless any shape is fine), or complex numbers: an error with op and argument."""
    kwargs = first_case(spec)
    for argument, value in kwargs.items():
        if not isinstance(value, torch.Tensor):
            continue
        for wrong in (value[None, None], value.to(torch.complex64)):
            try:
                result = spec.function(**(kwargs | {argument: wrong}))
            except (ValueError, TypeError) as error:
                assert spec.name in str(error) and "got" in str(error), error
            else:
                assert result.shape[:-1] == wrong.shape[:-1] and not wrong.is_complex()
