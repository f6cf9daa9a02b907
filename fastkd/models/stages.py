"""Late features of a classifier as maps, and the last part of a transformer as a function of its own.

What timm calls features has three forms: [B, C, H, W], [B, H, W, C] (Swin) and tokens behind some prefix tokens (ViT,
mixers). `as_map` and `as_tokens` bring each to one form; `tail_of` cuts a Swin-type or a plain vision transformer
before its last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .taps import Taps, Where


def late_stages(model: nn.Module) -> tuple[Where, Where]:
    """Where the features of the last two resolutions leave a timm model; of a plain one 3/4 of the depth, and its end.

    Raises:
        ValueError: the model has neither timm's `feature_info` nor blocks.
    """
    info = list(getattr(model, "feature_info", None) or [])
    if len({entry["reduction"] for entry in info}) > 1:
        return info[-2]["module"], info[-1]["module"]
    depth = len(getattr(model, "blocks", ()))
    if depth < 2:
        raise ValueError(
            f"{type(model).__name__} does not say where its stages end; name two submodules, such as "
            'taps={"student": ("layer3", "layer4")}'
        )
    return f"blocks.{max(3 * depth // 4 - 1, 0)}", f"blocks.{depth - 1}"


def as_tokens(x: Tensor, model: nn.Module) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A feature of a model as (patch tokens [B, N, C], prefix tokens [B, P, C], (H, W)) with H * W = N."""
    if x.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return x[:, prefix:], x[:, :prefix], _grid(x.shape[1] - prefix, model)
    if getattr(model, "output_fmt", "NCHW") != "NHWC":
        x = x.permute(0, 2, 3, 1)
    tokens = x.flatten(1, 2)
    return tokens, tokens[:, :0], tuple(x.shape[1:3])


def as_map(x: Tensor, model: nn.Module) -> Tensor:
    """A feature of a model as [B, C, H, W]; prefix tokens are left out."""
    if x.ndim == 4 and getattr(model, "output_fmt", "NCHW") != "NHWC":
        return x
    tokens, _, grid = as_tokens(x, model)
    return tokens.transpose(1, 2).unflatten(2, grid)


def _grid(count: int, model: nn.Module) -> tuple[int, int]:
    for name in ("patch_embed", "stem"):
        grid = getattr(getattr(model, name, None), "grid_size", None)
        if grid is not None and math.prod(grid) == count:
            return tuple(grid)
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{type(model).__name__}: got {count} tokens, expected the square of a number")
    return side, side


class Tail:
    """The last part of a network: ``tail(tokens, prefix)`` gives what the network makes of other tokens at its entry.

    Gradients flow through to the tokens; the weights are the network's own. No module, so that it registers nothing.

    Attributes:
        entry, exit: where features enter it and leave it, for `Taps`.
        prefix: how many prefix tokens go along with the patch tokens.
    """

    def __init__(
        self,
        entry: Where,
        exit: Where,
        run: Callable[[Tensor], Tensor],
        prefix: int = 0,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.entry, self.exit, self.prefix = entry, exit, prefix
        self._run, self._finish = run, finish

    def __call__(self, tokens: Tensor, prefix: Tensor | None = None) -> Tensor:
        """[B, N, C] at the entry -> [B, N', C']; `prefix` [B, P, C] goes in first and is left out again."""
        if not self.prefix:
            return self.finish(self._run(tokens))
        return self.finish(self._run(torch.cat([prefix.to(tokens.dtype), tokens], dim=1))[:, self.prefix :])

    def finish(self, tokens: Tensor) -> Tensor:
        """What is left to do with tokens that were caught at the exit: the norm of models that pool before it."""
        return tokens if self._finish is None else self._finish(tokens)


def tail_of(model: nn.Module, blocks: int | None = None) -> Tail:
    """The last stage of a Swin-type timm model, or the last blocks of a plain vision transformer, and the final norm.

    Args:
        model: timm's swin_*, swinv2_*; vit_*, deit_*, beit_*, beitv2_*.
        blocks: of a plain transformer; default a quarter of its depth.

    Raises:
        ValueError: another kind of model, or as many blocks as it has.
    """
    stages, norm = getattr(model, "layers", None), getattr(model, "norm", None)
    if isinstance(stages, nn.Sequential) and getattr(model, "output_fmt", "") == "NHWC" and len(stages) > 1:

        def last_stage(tokens: Tensor) -> Tensor:
            return norm(stages[-1](tokens.unflatten(1, tuple(stages[-1].input_resolution)))).flatten(1, 2)

        return Tail(f"layers.{len(stages) - 2}", "norm", last_stage)
    depth = len(getattr(model, "blocks", ()))
    if not depth or norm is None or not hasattr(model, "patch_embed") or getattr(model, "rope", None) is not None:
        raise ValueError(
            f"{type(model).__name__}: its last stage is not known here, expected a Swin-type, ViT or BEiT model of "
            'timm; pass teacher_tail, and taps={"teacher": (entry, exit)}'
        )
    count = max(depth // 4, 1) if blocks is None else blocks
    if not 0 < count < depth:
        raise ValueError(f"tail_blocks: got {blocks}, expected 1 to {depth - 1}: the model has {depth} blocks")

    def last_blocks(tokens: Tensor) -> Tensor:
        shared = getattr(model, "rel_pos_bias", None)
        options = {} if shared is None else {"shared_rel_pos_bias": shared()}
        for block in model.blocks[-count:]:
            tokens = block(tokens, **options)
        return norm(tokens)

    pooled_first = isinstance(norm, nn.Identity)
    finish = getattr(model, "fc_norm", None) if pooled_first else None
    return Tail(f"blocks.{depth - count - 1}", "norm", last_blocks, getattr(model, "num_prefix_tokens", 0), finish)


@torch.no_grad()
def features_of_a_blank(model: nn.Module, where: tuple[Where, ...], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Features for one black picture: their shapes tell what has to fit. Running statistics do not see it."""
    training = {name: module.training for name, module in model.named_modules()}
    weight = next(model.parameters())
    model.eval()
    found = Taps(model, where)(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)).features
    for name, module in model.named_modules():
        module.training = training[name]
    return found
