"""Where a step's time and memory go: a clock that the stages of a step call, and the peak of live tensor bytes."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from common import synchronize
from torch import Tensor

STAGES = ("data", "teacher", "student", "decoder", "loss", "optimiser")


class StageClock:
    """Splits a step's time by stage, forward and backward together.

    ``clock(stage, *tensors)`` says that `stage` begins. `tensors` cross the border from the stage before it, so when
    backward has made their gradients, it has left `stage` and works on the one before.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: list[tuple[str, object]] = []

    def __call__(self, stage: str, *tensors: Tensor) -> None:
        before = self._marks[-1][0] if self._marks else stage
        self._mark(stage)
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self._mark(before))

    def _mark(self, stage: str) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def end(self) -> None:
        """The step is over."""
        self._mark("end")

    def stages(self) -> dict[str, float]:
        """Seconds by stage from the first mark to the end."""
        synchronize(self.device)
        total: dict[str, float] = defaultdict(float)
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:]):
            total[stage] += start.elapsed_time(end) / 1e3 if self.device == "cuda" else end - start
        return dict(total)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds by stage over several steps."""
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in STAGES}


def peak_bytes(run: Callable[[], object], device: str) -> tuple[int, int]:
    """(peak of bytes allocated by run() above those live before, bytes that stay live after it).

    On a GPU from torch's allocator. On a CPU from the allocation events of torch's profiler: every tensor counts,
    scratch memory inside oneDNN or a kernel does not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start-up messages would fill the screen
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live
