"""One training step: teacher, student, backward and AdamW; on a GPU as one CUDA graph.

A step of many small kernels is bound by their launches. A graph launches them all at once, provided that nothing in it
depends on the host: pictures and keys of the masks come in static buffers, the learning rate is a tensor, losses go to
a static tensor, and the scale of float16 gradients stays on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastkd.data import Batch

from .config import RunConfig
from .distributed import Processes
from .track import LOSSES

logger = logging.getLogger("fastkd")


class CudaGraphs:
    """Warm-up and capture on one side stream of a device, as PyTorch's notes on whole-network capture say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs that run one after another share their memory

    def warm_up(self, run: Callable[[], None]) -> None:
        """Runs it, on the stream that capture will use: libraries set up their handles and workspaces there."""
        main = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            run()
        main.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that replays what `run` would do now; `run` itself has no effect on the device."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may page-lock memory meanwhile, which must not break the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def choose_graphs(config: RunConfig, group: Processes) -> CudaGraphs | None:
    """Graphs for one process on a GPU, unless --no-cuda-graph.

    Several processes run eagerly: DistributedDataParallel overlaps its all-reduce with backward.
    """
    wanted = config.cuda_graph and group.device.type == "cuda" and group.world_size == 1
    return CudaGraphs(group.device) if wanted else None


class TrainingStep:
    """One optimiser step over `accumulate` micro-batches.

    Args:
        model: a method, such as `DMAE`, bare or as `Processes.wrap` returns it.
        optimizer: over its parameters; with graphs one whose learning rate is a tensor (``adamw(capturable=True)``).
        mask_ratio: share of masked patches, for a model that is called as ``model(images, mask_ratio, keys=keys)``;
            None calls ``model(*reads)``.
        reads: fields of a batch that the model is called with.
        names: of the losses in the model's result, the one to minimise first.
        amp: dtype of autocast; None computes in the dtype of the weights.
        accumulate: micro-batches per step, all of one shape.
        scaler: scales the loss for float16; default none.
        group: processes that average their gradients; default this one alone.
        graphs: captures the step; None runs it eagerly.

    With graphs the first `WARM_UP` steps are eager, real ones. Then there is a graph for each kind of micro-batch: the
    first one makes the gradients, others add to them, and the last one updates the weights (with accumulate=1 one graph
    does all). Weights, optimiser state and scale are changed in place: load checkpoints before the first step.
    A capture that fails is reported once; training goes on eagerly.

    Attributes:
        losses: [number of names] float32 on the device, means over the last step; overwritten by the next.
    """

    WARM_UP = 3

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float | None,
        *,
        names: Sequence[str] = LOSSES,
        reads: Sequence[str] = ("images", "keys"),
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        group: Processes | None = None,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.model, self.optimizer, self.mask_ratio, self.names = model, optimizer, mask_ratio, tuple(names)
        self.reads = tuple(reads)
        self.amp, self.accumulate, self.graphs = amp, accumulate, graphs
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self.group = group or Processes(0, 1, self.device)
        self.losses = torch.zeros(len(self.names), device=self.device)
        self._inputs: tuple[Tensor, ...] | None = None
        self._replays: dict[tuple[bool, bool], Callable[[], None]] = {}
        self._done = 0

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Takes `accumulate` batches on the device, updates the weights and returns `losses`. Never waits for a GPU."""
        for micro, batch in zip(range(self.accumulate), batches):
            kind = micro == 0, micro == self.accumulate - 1
            if self.graphs is None:
                self._run([getattr(batch, name) for name in self.reads], *kind)
            else:
                self._run_graphed(batch, *kind)
        self._done += 1
        return self.losses

    def _run(self, inputs: Sequence[Tensor], first: bool, last: bool) -> None:
        with self.group.synchronise(self.model, last):
            # A graph must not find 16-bit copies of weights that autocast made outside of it.
            cached = self.graphs is None
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=cached):
                if self.mask_ratio is None:
                    result = self.model(*inputs)
                else:
                    images, keys = inputs
                    result = self.model(images, self.mask_ratio, keys=keys)
            self.scaler.scale(result["loss"] / self.accumulate).backward()
        losses = torch.stack([result[name].detach().float() for name in self.names]) / self.accumulate
        self.losses.copy_(losses if first else self.losses + losses)
        if last:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # To None, not to zero: backward then writes gradients instead of adding to them, in a graph as well.
            self.optimizer.zero_grad()

    def _run_graphed(self, batch: Batch, first: bool, last: bool) -> None:
        inputs = self._load(batch)
        if self._done < self.WARM_UP:
            return self.graphs.warm_up(partial(self._run, inputs, first, last))
        if not self._replays:
            self._capture(inputs)
        if self.graphs is None:
            return self._run(inputs, first, last)
        self._replays[first, last]()

    def _load(self, batch: Batch) -> tuple[Tensor, ...]:
        """The static buffers with a batch in them."""
        if self._inputs is None:
            self._inputs = tuple(torch.empty_like(getattr(batch, name)) for name in self.reads)
        for name, buffer in zip(self.reads, self._inputs):
            value = getattr(batch, name)
            if (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
                raise ValueError(
                    f"TrainingStep: {name}: got {tuple(value.shape)} {value.dtype}, expected {tuple(buffer.shape)} "
                    f"{buffer.dtype} as in the first batch; give batches of one shape, or graphs=None"
                )
            buffer.copy_(value, non_blocking=True)
        return self._inputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Captures one graph per kind of micro-batch; where that fails, back to eager steps."""
        kinds = dict.fromkeys((micro == 0, micro == self.accumulate - 1) for micro in range(self.accumulate))
        try:
            for kind in kinds:  # in the order of a step: the first one makes the gradients that the others use
                self._replays[kind] = self.graphs.capture(partial(self._run, inputs, *kind))
        except Exception as error:
            logger.warning(
                "the training step cannot be captured as a CUDA graph and runs eagerly, which is slower: %s: %s "
                "(--no-cuda-graph avoids the attempt)", type(error).__name__, error,
            )  # fmt: skip
            self._replays.clear()
            self.graphs = None
            self.optimizer.zero_grad()
            # The old one may be between step() and update().
            fresh = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
            fresh.load_state_dict(self.scaler.state_dict())
            self.scaler = fresh
