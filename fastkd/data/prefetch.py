"""Batches that are on the GPU before the step that needs them begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from .batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device | str, depth: int = 2) -> Iterator[Batch]:
    """The batches with their tensors on a device; to a GPU they are copied ahead while the steps before run.

    Args:
        batches: on the CPU; page-locked ones, or their copies to a GPU are not asynchronous.
        device: on ``cpu`` the batches pass as they are, one by one.
        depth: batches that wait on the GPU, and steps that may be queued there.

    Copies have a stream of their own. What comes out is ready for the stream that is current where it comes out. A host
    that is more than `depth` steps ahead of the GPU is held back here: it would only pile up batches, and the time that
    it then waits for the loader would say nothing.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    copies, waiting, queued = torch.cuda.Stream(device), deque(), deque()
    while True:
        while len(waiting) < depth and (batch := next(batches, None)) is not None:
            with torch.cuda.stream(copies):
                waiting.append((batch.to(device), copies.record_event()))
        if not waiting:
            return
        batch, copied = waiting.popleft()
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(copied)
        for tensor in batch.tensors.values():
            tensor.record_stream(consumer)  # its memory belongs to `copies`, which must not take it back too early
        yield batch
        queued.append(torch.cuda.Event(blocking=True))
        queued[-1].record(consumer)  # the end of the step that got the batch
        if len(queued) > depth:
            queued.popleft().synchronize()
