"""Optimisers of training runs, AdamW as MAE and DMAE set it up first of all, over the same groups of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

KINDS = ("adamw", "apex")
_APEX = "build NVIDIA/apex from its sources with its CUDA extensions ('pip install apex' brings another project)"


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups of a model's trainable parameters, with `weight_decay` and without.

    One-dimensional parameters (norms, biases, layer scales) do not decay, nor do those that a module of ours names in
    `no_weight_decay()`; everything else does, cls_token and mask_token ([1, 1, D]) included, as in the published code.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay") and type(module).__module__.startswith("fastkd.")
        for name in module.no_weight_decay()
    }
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias") or name in spared]
    exempt = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in exempt]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    *,
    kind: str = "adamw",
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over `param_groups`.

    Args:
        model: what is trained.
        lr: learning rate of all groups.
        weight_decay, betas: of AdamW; weight_decay as in `param_groups`.
        kind: ``"adamw"``, torch's, fused where every parameter's device has that; ``"apex"``, FusedAdam of NVIDIA's
            apex, which runs on GPUs alone.
        capturable: the learning rate is a tensor on the device, so that a CUDA graph of `step` reads it anew.

    Raises:
        ImportError: kind="apex" without NVIDIA's apex.
    """
    if kind not in KINDS:
        raise ValueError(f"adamw: kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    return make_optimizer(kind, param_groups(model, weight_decay), lr, betas=betas, capturable=capturable)


def make_optimizer(
    kind: str,
    groups: list[dict],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.9,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser over groups of parameters, each with its own `weight_decay`.

    Args:
        kind: ``adamw`` and ``sgd``, torch's, fused where every parameter's device has that; ``lamb`` and ``lars``,
            timm's, without LAMB's own clipping; ``apex`` (AdamW) and ``apex-lamb``, NVIDIA's, on GPUs alone.
        groups: as `param_groups` gives them; empty ones are left out. LAMB and LARS adapt the rate of matrices,
            convolutions and tokens to their norms, but not that of groups with one-dimensional parameters.
        lr: learning rate; `set_lr` changes it.
        betas: of AdamW and LAMB.
        momentum: of SGD and LARS.
        capturable: the learning rate is a tensor on the device, so that a CUDA graph of `step` reads it anew. For kinds
            that the function `capturable` names.

    Weight decay is decoupled from the gradient in AdamW and LAMB, and a part of the gradient in SGD and LARS.

    Raises:
        ImportError: the kind's package is missing.
    """
    if kind not in _MAKERS:
        raise ValueError(f"make_optimizer: kind: got {kind!r}, expected one of {', '.join(_MAKERS)}")
    groups = [dict(group, params=list(group["params"])) for group in groups]
    groups = [group for group in groups if group["params"]]
    if capturable and kind != "apex":
        for group in groups:
            group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=group["params"][0].device)
    return _MAKERS[kind](groups, lr=lr, betas=betas, momentum=momentum, capturable=capturable)


def capturable(kind: str, guard: bool = False) -> bool:
    """Whether a CUDA graph may hold this optimiser's step, under a guard against values that are not finite as well."""
    return kind in ("adamw", "sgd") or (kind == "apex" and not guard)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` does nothing where the tensor ``optimizer.found_inf`` is 1, as torch's fused optimisers do."""
    return type(optimizer).__module__.startswith("torch.") and getattr(optimizer, "_step_supports_amp_scaling", False)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group of an optimizer to ``lr * lr_scale`` (1 where a group has none).

    A rate that is a tensor keeps its storage, which a CUDA graph may read.
    """
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def _adamw(groups: list[dict], *, lr, betas, capturable, momentum) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=_fused(groups), capturable=capturable)


def _sgd(groups: list[dict], *, lr, momentum, betas, capturable) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=_fused(groups))
    if momentum:  # torch leaves them uninitialised where the very first step is skipped
        for group in groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _lamb(groups: list[dict], *, lr, betas, momentum, capturable) -> torch.optim.Optimizer:
    return _imported("timm.optim", "Lamb")(_adapted(groups), lr=lr, betas=betas, max_grad_norm=None)


def _lars(groups: list[dict], *, lr, momentum, betas, capturable) -> torch.optim.Optimizer:
    return _imported("timm.optim", "Lars")(_adapted(groups), lr=lr, momentum=momentum)


def _apex_adam(groups: list[dict], *, lr, betas, capturable, momentum) -> torch.optim.Optimizer:
    made = _imported("apex.optimizers", "FusedAdam")
    return made(groups, lr=lr, betas=betas, adam_w_mode=True, capturable=capturable)


def _apex_lamb(groups: list[dict], *, lr, betas, momentum, capturable) -> torch.optim.Optimizer:
    return _imported("apex.optimizers", "FusedLAMB")(groups, lr=lr, betas=betas, max_grad_norm=float("inf"))


_MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "apex": _apex_adam,
    "lamb": _lamb,
    "lars": _lars,
    "sgd": _sgd,
    "apex-lamb": _apex_lamb,
}


def _fused(groups: list[dict]) -> bool:
    """Whether torch has one kernel for the whole step."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])


def _adapted(groups: list[dict]) -> list[dict]:
    """The groups with timm's word for which rates follow norms: those of matrices, whether these decay or not."""
    return [dict(group, always_adapt=all(p.ndim > 1 for p in group["params"])) for group in groups]


def _imported(module: str, name: str) -> type[torch.optim.Optimizer]:
    """A class of an optional package."""
    fix = "pip install 'fastkd[models]'" if module.startswith("timm") else _APEX
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{module}.{name} does not import ({error}); {fix}, or use --optimizer adamw") from error
