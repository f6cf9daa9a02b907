"""The accuracy rule shared by every op test, the fuzzer and the GPU suite.

err(kernel, float64 reference) <= 2 x err(same-dtype PyTorch, float64 reference) + a floor of a few roundings,
for the outputs and for every gradient; errors are relative to the tensor's largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastkd.ops import OpSpec, backend

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@dataclass
class Result:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def evaluate(spec: OpSpec, function, kwargs: dict, grad_seed: int = 7) -> Result:
    """Outputs and gradients (for random upstream gradients) of function(**kwargs)."""
    kwargs = dict(kwargs)
    for name in spec.differentiable:
        if isinstance(kwargs.get(name), torch.Tensor):
            kwargs[name] = kwargs[name].detach().requires_grad_()
    result = function(**kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    wanted = {n: kwargs[n] for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)}
    gradients = {}
    if wanted:
        random = torch.Generator().manual_seed(grad_seed)
        upstream = [(torch.rand(o.shape, generator=random) + 0.5).to(o.device, o.dtype) for o in outputs]
        found = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        gradients = dict(zip(wanted, found))
    return Result([o.detach() for o in outputs], gradients)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    assert torch.isfinite(got).all(), "not finite: an unwritten or overflowing output"
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item() if want.abs().max() > 0 else got.abs().max().item()


def to_double(kwargs: dict) -> dict:
    return {
        k: v.detach().cpu().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else
        v.detach().cpu() if isinstance(v, torch.Tensor) else v
        for k, v in kwargs.items()
    }  # fmt: skip


def check_accuracy(spec: OpSpec, kwargs: dict, dtype: torch.dtype, backend_name: str) -> None:
    """Asserts the accuracy rule for one set of arguments; `kwargs` are already in `dtype` and on the device."""
    exact = evaluate(spec, spec.reference, to_double(kwargs))
    plain = evaluate(spec, spec.reference, kwargs)
    with backend(backend_name):
        ours = evaluate(spec, spec.function, kwargs)
    pairs = [(f"output {i}", *t) for i, t in enumerate(zip(ours.outputs, plain.outputs, exact.outputs))]
    pairs += [(f"gradient of {n}", ours.gradients[n], plain.gradients[n], exact.gradients[n]) for n in ours.gradients]
    for name, got, same_dtype, want in pairs:
        allowed = 2 * relative_error(same_dtype, want) + FLOOR[dtype]
        error = relative_error(got, want)
        assert error <= allowed, f"{spec.name} {backend_name} {dtype} {name}: error {error:.3g} > allowed {allowed:.3g}"
