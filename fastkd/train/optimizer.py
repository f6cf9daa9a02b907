"""AdamW as MAE and DMAE set it up."""

from __future__ import annotations

import torch
from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups of the trainable parameters, with and without weight decay.

    One-dimensional parameters (norms, biases, layer scales) do not decay; everything else does, cls_token and
    mask_token ([1, 1, D]) included, as in the published code.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    exempt = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in exempt]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


def adamw(
    model: nn.Module, lr: float, weight_decay: float = 0.05, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW over `param_groups`, the fused implementation where every parameter's device has one."""
    groups = [group for group in param_groups(model, weight_decay) if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's learning rate to ``lr * lr_scale`` (lr_scale is 1 where a group has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
