"""Hypothesis over every OpSpec's space: odd shapes, strides, dtypes and extreme values, on every backend here.

Deterministic; FASTKD_FUZZ_EXAMPLES sets the examples per op and backend (default 12, fewer in the interpreter).
"""

from __future__ import annotations

import os

import memory
import pytest
import torch
from conftest import DEVICE, backends_of, device_of, dtypes_of
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from op_checks import check_accuracy, differentiable, evaluate, to_double

from fastkd.ops import SPECS, OpSpec, backend

EXAMPLES = int(os.environ.get("FASTKD_FUZZ_EXAMPLES", "12"))
INTERPRETER_SHARE = 4  # the Triton interpreter is slow
LAYOUTS = {"given": lambda t: t, "surrounded": memory.surrounded, "transposed": memory.transposed}
# What is done to every differentiable tensor, and to floating images.
STRESS = {
    "none": lambda t: t,
    "huge": lambda t: t * 1e4,
    "tiny": lambda t: t * 1e-6,
    "constant": lambda t: torch.full_like(t, 0.37),
    "zero_rows": lambda t: torch.where(
        torch.arange(len(t), device=t.device).view(-1, *[1] * (t.ndim - 1)) % 2 == 0, 0, t
    ),
}


def ill_posed(op: str, case: dict, dtype: torch.dtype, stress: str) -> bool:
    """Combinations in which little but rounding is left to compare."""
    if op == "attention":
        return stress in ("huge", "constant")  # scores of 1e8 have no gradient left, nor have equal keys for the query
    if op == "residual_layer_norm":  # without variance, the rounding of the mean is divided by sqrt(eps)
        return stress == "constant"
    if op == "pkt_loss":  # equal rows: the gradient is exactly 0
        return stress == "constant"
    if op == "feature_alignment_loss":  # a normalised single number is +-1: the gradient is exactly 0
        return case["width"] == 1
    if op in ("linear_cross_entropy", "linear_kl", "linear_jsd"):  # equal class vectors: no gradient for the input
        return stress == "constant"
    if op == "logit_standardization":  # two standardised numbers are +-0.7: the gradient is exactly 0
        return case["classes"] == 2 or stress == "constant"
    if op == "dist_loss":  # vanishing norms: what is left of equal or saturated probabilities is rounding
        return stress != "none"
    if op == "dual_view_loss":  # the second view of a constant is the rounding of its mean
        return stress == "constant"
    return False


def cases(spec: OpSpec) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({key: st.sampled_from(list(values)) for key, values in spec.space.items()})


def fuzz_settings(name: str) -> settings:
    examples = EXAMPLES // INTERPRETER_SHARE if name == "triton" and DEVICE == "cpu" else EXAMPLES
    return settings(
        max_examples=max(examples, 1), deadline=None, database=None, derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much),
    )  # fmt: skip


def built(spec: OpSpec, case: dict, dtype: torch.dtype, device: str) -> dict:
    """The arguments of a case; combinations that the op refuses with its own ValueError are not of interest."""
    kwargs = spec.build(case, dtype, device)
    try:
        with torch.no_grad(), backend("reference"):
            spec.function(**kwargs)
    except ValueError as error:
        assert str(error).startswith(f"{spec.name}: "), f"not our error: {error}"
        assume(False)
    return kwargs


@pytest.mark.parametrize(
    "spec, name", [pytest.param(s, b, id=f"{s.name}-{b}") for s in SPECS.values() for b in backends_of(s)]
)
@pytest.mark.usefixtures("several_threads")
def test_fuzz(spec, name):
    @fuzz_settings(name)
    @given(
        case=cases(spec),
        dtype=st.sampled_from(dtypes_of(name)),
        layout=st.sampled_from(list(LAYOUTS)),
        stress=st.sampled_from(list(STRESS)),
    )
    def run(case, dtype, layout, stress):
        assume(not ill_posed(spec.name, case, dtype, stress))
        kwargs = built(spec, case, dtype, device_of(name))
        touched = [*differentiable(spec, kwargs), *(["images"] if "images" in kwargs else [])]
        for key in touched:
            if kwargs[key].is_floating_point():
                kwargs[key] = STRESS[stress](kwargs[key])
        exact = evaluate(spec, spec.reference, to_double(kwargs)).named()
        largest = max((t.abs().max().item() for t in exact.values() if t.numel()), default=0)
        assume(largest < torch.finfo(dtype).max / 16)  # beyond that the plain formula overflows as well
        for key, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                kwargs[key] = LAYOUTS[layout](value)
        note(f"{spec.name} on {name}: {dtype} {layout} {stress}")
        check_accuracy(spec, kwargs, dtype, name)

    run()


@pytest.mark.parametrize(
    "spec, name",
    [pytest.param(s, b, id=f"{s.name}-{b}") for s in SPECS.values() if s.law for b in backends_of(s)],
)
def test_law(spec, name):
    """The metamorphic law of the op."""

    @fuzz_settings(name)
    @given(case=cases(spec))
    def run(case):
        kwargs = built(spec, case, torch.float32, device_of(name))
        with backend(name):
            spec.law(kwargs)

    run()


def test_the_fuzzer_finds_a_planted_bug():
    """An op that is wrong for one shape only must be caught, and its example shrunk to that shape."""
    spec = SPECS["masked_pixel_loss"]

    def wrong(**kwargs):
        loss = spec.function(**kwargs)
        return loss * 1.01 if kwargs["pred"].shape[2] == 45 else loss  # 3 x 5 patches of 3 channels

    @settings(fuzz_settings("reference"), max_examples=200)
    @given(case=cases(spec))
    def run(case):
        kwargs = built(spec, case, torch.float32, "cpu")
        torch.testing.assert_close(wrong(**kwargs), spec.reference(**kwargs))

    with pytest.raises(AssertionError):
        run()
