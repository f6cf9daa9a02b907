"""One process or many: reads what torchrun puts into the environment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one that writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, find_unused: bool) -> nn.Module:
        """The model with gradients averaged over processes, bucket by bucket while backward goes on.

        Gradients live in the buckets, which saves a copy. No `static_graph`: it fails together with `no_sync`.
        """
        if self.world_size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, find_unused_parameters=find_unused, gradient_as_bucket_view=True
        )

    def synchronise(self, model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
        """Around one backward: whether gradients are averaged now or only added up."""
        return contextlib.nullcontext() if now or self.world_size == 1 else model.no_sync()

    def total(self, count: int) -> int:
        """Sum of a count over processes."""
        values = torch.tensor(float(count), device=self.device)
        return round(self.mean(values).item() * self.world_size)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes; the tensor itself where there is one process."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
            values /= self.world_size
        return values


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the group that torchrun started (nccl on GPUs, gloo on CPUs), or stands alone without it.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; under torchrun each process takes its own GPU.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and (":" not in device):
        device = f"cuda:{local}"
    chosen = torch.device(device if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(rank, world, chosen)
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
