"""The gate: nothing is timed before losses and gradients of all modes agree with `released` in float64."""

from __future__ import annotations

import torch
from baselines import released
from modes import LOSSES, Batch, Mode, copied, normalise
from torch import Tensor


def oracle(
    base: released.DMAE, batch: Batch, mask_ratio: float, device: str, chunk: int = 16
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of `released` in float64; both losses are means over images, so chunks are averaged."""
    model = copied(released.DMAE, base, device).to(torch.float64)
    losses = dict.fromkeys(LOSSES, 0.0)
    total = len(batch.raw)
    for start in range(0, total, chunk):
        part = slice(start, start + chunk)
        images, noise = normalise(batch.raw[part], torch.float64), batch.noise[part]
        out, share = model(images, noise, mask_ratio), len(images) / total
        (out["loss"] * share).backward()
        losses = {name: value + share * out[name].item() for name, value in losses.items()}
    return losses, {name: p.grad for name, p in model.trained().items()}


FLOOR = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}


def errors(got: tuple, want: tuple) -> dict[str, float]:
    """Relative errors of both losses and of every gradient, by the norm of the tensor.

    A tensor's norm counts at least 1e-4 of the norm of all gradients: below that it is rounding noise.
    """
    (losses, gradients, *_), (true_losses, true) = got, want
    found = {name: abs(losses[name] - value) / abs(value) for name, value in true_losses.items()}
    everything = sum(t.double().square().sum() for t in true.values()).sqrt()
    for name, value in true.items():
        scale = torch.maximum(value.double().norm(), 1e-4 * everything)
        found[name] = float((gradients[name].double() - value.double()).norm() / scale)
    return found


def gate(modes: list[Mode], base: released.DMAE, batch: Batch, mask_ratio: float, device: str) -> dict[str, dict]:
    """Checks every mode's losses and gradients against float64; raises where one is wrong.

    The rule: error <= 2 x error of `released` in the same dtype + a few roundings. Modes that are not exact have
    another pixel loss by design: only their alignment loss is held to the rule, and gradients must be finite.

    Returns:
        Per label: errors against float64, and the peak of bytes above the resident ones while this ran.
    """
    want = oracle(base, batch, mask_ratio, device)
    report, plain = {}, {}
    for mode in sorted(modes, key=lambda m: m.name != "released"):
        mode.restore()
        got = mode.gradients(batch, mask_ratio)
        found = errors(got, want)
        if mode.name == "released":
            plain[mode.dtype] = found
        allowed = {name: 2 * value + FLOOR[mode.dtype] for name, value in plain[mode.dtype].items()}
        checked = found if mode.exact else {"align_loss": found["align_loss"]}
        wrong = [f"{n}: error {e:.2e} > {allowed[n]:.2e}" for n, e in checked.items() if not e <= allowed[n]]
        wrong += [f"gradient of {n} is not finite" for n, g in got[1].items() if not g.isfinite().all()]
        if wrong:
            raise SystemExit(
                f"{mode.label} at {mask_ratio:.0%} is NOT the published step; nothing is timed.\n  "
                + "\n  ".join(wrong[:10])
            )
        gradients = [found[n] for n in want[1]]
        report[mode.label] = dict(
            loss_error=found["pixel_loss"] if mode.exact else None,
            align_error=found["align_loss"],
            worst_gradient_error=max(gradients) if mode.exact else None,
            peak_bytes=got[2],
        )
    return report
