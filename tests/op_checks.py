"""The accuracy rule shared by every op test, the fuzzer and the GPU suite.

err(kernel, float64 reference) <= 2 x err(same-dtype PyTorch, float64 reference) + a floor of a few roundings,
for the outputs and for every gradient; errors are relative to the tensor's largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from memory import canaries

from fastkd.ops import OpSpec, backend

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@dataclass
class Result:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]

    def named(self) -> dict[str, torch.Tensor]:
        """Outputs and gradients under readable names."""
        found = {f"output {i}": t for i, t in enumerate(self.outputs)}
        return found | {f"gradient of {name}": t for name, t in self.gradients.items()}


def differentiable(spec: OpSpec, kwargs: dict) -> list[str]:
    """Names of the arguments that receive a gradient in this call."""
    return [n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)]


def random_upstream(output: torch.Tensor, index: int = 0) -> torch.Tensor:
    """An upstream gradient in [0.5, 1.5)."""
    random = torch.Generator().manual_seed(7 + index)
    return (torch.rand(output.shape, generator=random) + 0.5).to(output.device, output.dtype)


def evaluate(spec: OpSpec, function: Callable, kwargs: dict, upstream: Callable = random_upstream) -> Result:
    """Outputs and gradients (for the given upstream gradients) of function(**kwargs)."""
    names = differentiable(spec, kwargs)
    kwargs = kwargs | {name: kwargs[name].detach().requires_grad_() for name in names}
    result = function(**kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    gradients = {}
    if names:
        above = [upstream(output, index) for index, output in enumerate(outputs)]
        gradients = dict(zip(names, torch.autograd.grad(outputs, [kwargs[n] for n in names], above)))
    return Result([o.detach() for o in outputs], gradients)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error, relative to the largest value of `want`."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    assert torch.isfinite(got).all(), "not finite: an unwritten or overflowing output"
    return ((got - want).abs().max() / (want.abs().max() or 1.0)).item()


def to_double(kwargs: dict) -> dict:
    """The arguments on the CPU, floating tensors in float64."""

    def convert(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value

    return {name: convert(value) for name, value in kwargs.items()}


def check_accuracy(spec: OpSpec, kwargs: dict, dtype: torch.dtype, backend_name: str) -> None:
    """Asserts the accuracy rule for one set of arguments; `kwargs` are already in `dtype` and on the device."""
    exact = evaluate(spec, spec.reference, to_double(kwargs)).named()
    plain = evaluate(spec, spec.reference, kwargs).named()
    with backend(backend_name), canaries():
        ours = evaluate(spec, spec.function, kwargs).named()
    for name, want in exact.items():
        where = f"{spec.name} {backend_name} {dtype} {name}"
        assert ours[name].dtype == plain[name].dtype, f"{where}: {ours[name].dtype}, expected {plain[name].dtype}"
        allowed = 2 * relative_error(plain[name], want) + FLOOR[dtype]
        error = relative_error(ours[name], want)
        assert error <= allowed, f"{where}: error {error:.3g} > allowed {allowed:.3g}"


def check_same(got: Result, want: Result, relative: float, where: str) -> None:
    """Asserts that two results agree; relative = 0 asks for the same bits."""
    for name, value in want.named().items():
        found = got.named()[name]
        if relative == 0:
            assert torch.equal(found, value), f"{where} {name}: not bit-equal"
        else:
            error = relative_error(found, value)
            assert error <= relative, f"{where} {name}: error {error:.3g} > {relative:.3g}"
