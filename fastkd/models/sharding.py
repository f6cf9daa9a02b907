"""A frozen teacher that is spread over several processes: each holds a part of every weight, by FSDP2.

A block's weights are put together just before it computes and freed right after it, while those of the next block are
on their way. What is computed is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spreads a frozen model, in place. From now on all processes must call it together.

    Args:
        model: on the device of the mesh; the same in all processes, and only ever called as a whole.
        blocks: submodules that are put together one after another; the rest of the model is another such part.
        mesh: one-dimensional, over the processes.
    """
    from torch.distributed.fsdp import fully_shard

    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
