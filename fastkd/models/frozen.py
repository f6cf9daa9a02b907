"""Any network as a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .pixels import normalize, renormalize, statistics_of
from .sharding import shard
from .taps import Tapped, Taps, Where, blocks_of

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


class Frozen(nn.Module):
    """A network that never trains and never changes: eval mode, no gradients, not a registered submodule.

    As an attribute of a training module it moves along (`.to`, `.cuda`) but stays out of `parameters()` and
    `state_dict()`. For the block features of a ViT alone `fastkd.models.Teacher` is faster: it is cut off at the
    deepest block, and reads visible patches only.

    Args:
        model: any module that takes images [B, C, H, W]. It is used as it is, not copied, and set to eval mode.
        taps: submodules whose outputs are wanted, see `fastkd.models.taps.Taps`.
        mean, std: pixel statistics that it expects, in units where white is 1; default what the model says of itself.
        dtype: keeps the weights in this dtype.

    Attributes:
        model: the network.
        mean, std: as resolved.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Where | Sequence[Where] = (),
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        model = model.requires_grad_(False).eval()
        own = statistics_of(model)
        self.mean, self.std = tuple(mean or own[0]), tuple(std or own[1])
        self.__dict__["model"] = model if dtype is None else model.to(dtype)
        self.__dict__["_taps"] = Taps(model, taps)
        super().train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode."""
        return self

    def _apply(self, fn, recurse: bool = True) -> Frozen:
        self.model._apply(fn, recurse)
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Spreads the weights over the processes of a mesh, see `fastkd.models.sharding`."""
        shard(self.model, blocks_of(self.model), mesh)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def taps(self) -> Taps:
        """To be entered around compiled code, see `Taps`."""
        return self._taps

    @torch.no_grad()
    def forward(
        self, images: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tapped:
        """Output and tapped features, without gradient.

        Args:
            images: uint8 [B, H, W, C], or floating [B, C, H, W].
            mean, std: statistics that floating images were normalised with; they are then exchanged for the model's
                own. Default: floating images come as the model expects them.
        """
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        elif mean is not None or std is not None:
            images = renormalize(images, (mean or self.mean, std or self.std), (self.mean, self.std))
        # Under autocast the model's own ops choose; without it weights and images must be of one dtype.
        if not torch.is_autocast_enabled(images.device.type):
            images = images.to(self.dtype)
        return self._taps(images)
