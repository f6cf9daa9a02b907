"""AdamW as MAE and DMAE set it up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("adamw", "apex")


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
    model: nn.Module | list[dict],
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    *,
    kind: str = "adamw",
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over `param_groups`.

    Args:
        model: what is trained; or groups of parameters, each with its own `weight_decay`.
        lr: learning rate of all groups.
        weight_decay, betas: of AdamW; weight_decay as in `param_groups`.
        kind: ``"adamw"``, torch's, fused where every parameter's device has that; ``"apex"``, FusedAdam of NVIDIA's
            apex, which runs on GPUs alone.
        capturable: the learning rate is a tensor on the device, so that a CUDA graph of `step` reads it anew.

    Raises:
        ImportError: kind="apex" without NVIDIA's apex.
    """
    groups = model if isinstance(model, list) else param_groups(model, weight_decay)
    groups = [dict(group) for group in groups if group["params"]]
    if kind == "apex":
        return apex_fused_adam()(groups, lr=lr, betas=betas, adam_w_mode=True, capturable=capturable)
    if kind not in KINDS:
        raise ValueError(f"adamw: kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if capturable:
        for group in groups:
            group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=group["params"][0].device)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, capturable=capturable)


def apex_fused_adam() -> type[torch.optim.Optimizer]:
    """FusedAdam of NVIDIA's apex. The package named apex on PyPI is another project and has no `apex.optimizers`."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ImportError(
            f"apex.optimizers.FusedAdam does not import ({error}); build NVIDIA/apex from its sources with its CUDA "
            "extensions ('pip install apex' brings another project), or use torch's fused AdamW"
        ) from error
    return FusedAdam


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
