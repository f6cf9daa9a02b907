"""One process or many: how they find each other, average gradients, agree, and end together."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup, ReduceOp

from .config import ConfigError, problem
from .launch import Launch, launch
from .watch import EverywhereError, Watch

# What may differ between the processes of a run: paths of their own machines. Of images the names are compared.
_LOCAL = frozenset("data val_data target workers".split())


def own_cores() -> frozenset[int]:
    """The cores on which this process may run."""
    every = range(os.cpu_count() or 1)
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank, world_size: its number, and how many there are.
        device: where it trains.
        names: of all of them, for messages.
        cores: how many of the machine's cores are its share.
        watch: ends this process when another one is gone; None for one alone.
        control: group of all for what the host says, which must not wait for the device; None for one alone.
    """

    rank: int
    world_size: int
    device: torch.device
    names: tuple[str, ...] = ("this process",)
    cores: int = dataclasses.field(default_factory=lambda: len(own_cores()))
    watch: Watch | None = None
    control: ProcessGroup | None = None
    _asked: list[tuple[torch.distributed.Work, Tensor]] = dataclasses.field(default_factory=list, repr=False)

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

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes; the tensor itself where there is one process."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
            values /= self.world_size
        return values

    def total(self, count: int) -> int:
        """Sum of a count over processes."""
        return sum(self.gather(count))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, everywhere."""
        return [value] if self.world_size == 1 else _gather(value, self.world_size, self.control)

    def barrier(self) -> None:
        """Waits for all processes, and for what they have still to agree on."""
        if self.world_size > 1:
            while self._asked:
                self._asked.pop()[0].wait()
            torch.distributed.barrier(self.control)

    def agreed(self, mine: int) -> int:
        """The largest number that any process gave in the call before this one; the same in all of them.

        It is on its way while the next step is computed, so asking costs no waiting. One process alone gets its own
        number at once.
        """
        if self.world_size == 1:
            return mine
        answer = 0
        if self._asked:
            work, before = self._asked.pop()
            work.wait()
            answer = int(before)
        number = torch.tensor(mine)
        self._asked.append((torch.distributed.all_reduce(number, ReduceOp.MAX, self.control, async_op=True), number))
        return answer

    def check(self, problems: list[str], arguments: dict[str, Any]) -> None:
        """ConfigError in all processes where one of them has problems, or where their arguments differ."""
        everyone = self.gather(problems)
        found = []
        for line in dict.fromkeys(line for lines in everyone for line in lines):
            where = [name for name, lines in zip(self.names, everyone) if line in lines]
            found.append(line if len(where) == self.world_size else f"{line} ({', '.join(where)})")
        self._raise(found)
        given = {name: value for name, value in arguments.items() if name not in _LOCAL}
        self.same({**given, "device": self.device.type}, "give all processes the same command")

    def same(self, facts: dict[str, Any], fix: str) -> None:
        """ConfigError in all processes where a fact, named after its argument, is not the same in all of them."""
        everyone, found = self.gather(facts), {}
        for rank, theirs in enumerate(everyone):
            for name in (*facts, *(theirs.keys() - facts.keys())):
                first, other = _different(everyone[0].get(name), theirs.get(name))
                if first != other and name not in found:
                    got = f"{first} in {self.names[0]} and {other} in {self.names[rank]}"
                    found[name] = problem(name, got, "the same in all processes", fix)
        self._raise(list(found.values()))

    def _raise(self, problems: list[str]) -> None:
        if problems and self.world_size == 1:
            raise ConfigError(problems)
        if problems:
            raise EverywhereError(problems if self.is_main else [])

    def mesh(self) -> DeviceMesh:
        """All processes as what a teacher is spread over. ConfigError where there is one alone."""
        if self.world_size == 1:
            fix = "start several with torchrun or srun, or leave it away"
            raise ConfigError([problem("shard_teacher", "one process", "several processes", fix)])
        return torch.distributed.init_device_mesh(self.device.type, (self.world_size,))

    def guard(self) -> contextlib.AbstractContextManager:
        """Around anything that may fail: the others learn why this process ends."""
        return contextlib.nullcontext() if self.watch is None else self.watch.guard()


@contextlib.contextmanager
def processes(
    device: str = "auto", timeout_minutes: float = 60.0, advice: Callable[[], str] = str
) -> Iterator[Processes]:
    """Joins the processes that torchrun or srun started, or stands alone without them.

    Gradients travel by NCCL between GPUs and by gloo between CPUs. What the hosts have to say goes by gloo in any case.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; with several processes each takes its own GPU.
        timeout_minutes: how long one may wait for another.
        advice: what the user can do when one is gone (see `Watch`).
    """
    place = launch()
    if place.world_size == 1:
        yield Processes(0, 1, _device(device, place.local_rank))
        return
    control = _join(place, datetime.timedelta(minutes=timeout_minutes))
    everyone = _gather((socket.gethostname(), own_cores()), place.world_size, control)
    names = [f"rank {rank} on {host}" for rank, (host, _) in enumerate(everyone)]
    host, cores = everyone[place.rank]
    sharing = sum(theirs == host and not cores.isdisjoint(others) for theirs, others in everyone)
    watch = Watch(place.rank, names, control, advice)
    with watch.guard():
        chosen = _device(device, place.local_rank)
        share = max(1, len(cores) // sharing)
        yield Processes(place.rank, place.world_size, chosen, tuple(names), share, watch, control)
    watch.close()
    torch.distributed.destroy_process_group()


def fail_together(problems: list[str]) -> None:
    """Tells the other processes that this one cannot start; raises ConfigError here and there."""
    with processes("cpu") as group:
        group.check(problems, {})


def _join(place: Launch, timeout: datetime.timedelta) -> ProcessGroup:
    gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "cpu:gloo", init_method=place.meeting, timeout=timeout,
            rank=place.rank, world_size=place.world_size,
        )  # fmt: skip
        return torch.distributed.new_group(backend="gloo", timeout=timeout)
    except torch.distributed.DistError as error:
        where = place.meeting if "//" in place.meeting and place.meeting != "env://" else "MASTER_ADDR:MASTER_PORT"
        raise ConfigError([
            f"rank {place.rank} of {place.world_size} found no meeting of all processes at {where}: {error}; see that "
            "all of them start, that this machine can be reached, and that the port (MASTER_PORT) is free"
        ]) from error  # fmt: skip


def _gather(value: Any, world_size: int, group: ProcessGroup) -> list[Any]:
    values = [None] * world_size
    torch.distributed.all_gather_object(values, value, group)
    return values


def _device(wanted: str, local_rank: int) -> torch.device:
    cuda = torch.cuda.is_available() if wanted == "auto" else wanted.startswith("cuda")
    if not cuda:
        return torch.device("cpu")
    if ":" not in wanted:
        count = torch.cuda.device_count()
        index = 0 if count == 1 else local_rank  # SLURM may show each process its own GPU alone
        if index >= count:
            raise ConfigError([problem("device", f"{wanted} in process {index} of this machine", f"{count} at most")])
        wanted = f"cuda:{index}"
    torch.cuda.set_device(wanted)
    return torch.device(wanted)


def _different(first: Any, other: Any) -> tuple[Any, Any]:
    """Both, or of two dictionaries what differs."""
    if not (isinstance(first, dict) and isinstance(other, dict)):
        return first, other
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    return {n: first.get(n) for n in names}, {n: other.get(n) for n in names}
