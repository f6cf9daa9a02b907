"""One training step: teacher, student, backward and the optimiser; on a GPU as one CUDA graph.

A step of many small kernels is bound by their launches. A graph launches them all at once, provided that nothing in it
depends on the host: pictures and keys of the masks come in static buffers, the learning rate is a tensor, losses go to
a static tensor, and the scale of float16 gradients stays on the device, as does the word whether a step is left out.
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
from .optimizer import capturable, skips_on_device
from .track import LOSSES

logger = logging.getLogger("fastkd")
GRAD_NORM = "grad_norm"


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

    Several processes run eagerly: DistributedDataParallel overlaps its all-reduce with backward. So do optimisers that
    count their steps on the host, and steps that run parts of forward again: their generators are set on the host.
    """
    wanted = config.cuda_graph and group.device.type == "cuda" and group.world_size == 1
    counted = not capturable(config.optimizer, guard=config.skip_nonfinite > 0)
    return CudaGraphs(group.device) if wanted and not counted and not config.activation_checkpointing else None


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
        clip_grad: largest norm of the gradient of all parameters; a longer one is shortened to it.
        guard: leaves a step out whose losses or gradients are not finite: weights, optimiser state and buffers
            (statistics of BatchNorm) stay as they were. Decided on the device, in all processes alike; only for an
            optimiser that cannot skip there (`skips_on_device`) the host waits for the answer.
        group: processes that average their gradients; default this one alone.
        graphs: captures the step; None runs it eagerly.

    With graphs the first `WARM_UP` steps are eager, real ones. Then there is a graph for each kind of micro-batch: the
    first one makes the gradients, others add to them, and the last one updates the weights (with accumulate=1 one graph
    does all). Weights, optimiser state and scale are changed in place: load checkpoints before the first step.
    A capture that fails is reported once; training goes on eagerly.

    Attributes:
        names: of the columns of `losses`; ``grad_norm``, before clipping, is the last one with clip_grad or guard.
        losses: [number of names] float32 on the device, means over the last step; overwritten by the next.
        left_out: 0-d float32 on the device, 1 where the last step was left out (always 0 without guard).
        indices: of the images of the last step, one tensor per micro-batch.
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
        clip_grad: float | None = None,
        guard: bool = False,
        group: Processes | None = None,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.model, self.optimizer, self.mask_ratio, self.reads = model, optimizer, mask_ratio, tuple(reads)
        self.clip_grad, self.guard, self._losses = clip_grad, guard, tuple(names)
        self.names = (*self._losses, GRAD_NORM) if clip_grad is not None or guard else self._losses
        self.amp, self.accumulate, self.graphs = amp, accumulate, graphs
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self.group = group or Processes(0, 1, self.device)
        self.losses = torch.zeros(len(self.names), device=self.device)
        self.left_out = torch.zeros((), device=self.device)
        self.indices: list[Tensor] = []
        # What a forward pass changes, with the place where it is kept until the step is known to be good.
        changed = [b for b in model.buffers() if b.is_floating_point()] if guard else []
        self._buffers = changed, [torch.empty_like(b) for b in changed]
        self._inputs: tuple[Tensor, ...] | None = None
        self._replays: dict[tuple[bool, bool], Callable[[], None]] = {}
        self._done = 0

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Takes `accumulate` batches on the device, updates the weights and returns `losses`. Never waits for a GPU."""
        self.indices = []
        for micro, batch in zip(range(self.accumulate), batches):
            self.indices.append(batch.indices)
            kind = micro == 0, micro == self.accumulate - 1
            if self.graphs is None:
                self._run([getattr(batch, name) for name in self.reads], *kind)
            else:
                self._run_graphed(batch, *kind)
        self._done += 1
        return self.losses

    def _run(self, inputs: Sequence[Tensor], first: bool, last: bool) -> None:
        if first and self._buffers[0]:
            torch._foreach_copy_(*reversed(self._buffers))
        with self.group.synchronise(self.model, last):
            # A graph must not find 16-bit copies of weights that autocast made outside of it.
            cached = self.graphs is None
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=cached):
                if self.mask_ratio is None:
                    result = self.model(*inputs)
                else:
                    images, keys = inputs
                    result = self.model(images, self.mask_ratio, keys=keys)
            losses = torch.stack([result[name].detach().float() for name in self._losses]) / self.accumulate
            loss = result["loss"]
            if self.guard:  # NaN for all gradients where any loss is not finite: processes exchange those, not losses
                loss = loss * (1 + 0 * losses.sum())
            self.scaler.scale(loss / self.accumulate).backward()
        sums = self.losses[: len(losses)]
        sums.copy_(losses if first else sums + losses)
        if last:
            self._update()
            self.scaler.update()
            # To None, not to zero: backward then writes gradients instead of adding to them, in a graph as well.
            self.optimizer.zero_grad()

    def _update(self) -> None:
        """The optimiser's step, or none."""
        if self.names != self._losses:
            self._measure()
        if not self.guard or self.scaler.is_enabled():  # a scaler leaves steps out by itself
            self.scaler.step(self.optimizer)
        elif skips_on_device(self.optimizer):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, self.left_out
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not self.left_out.item():
            self.optimizer.step()
        for now, before in zip(*self._buffers):
            torch.where(self.left_out > 0, before, now, out=now)

    def _measure(self) -> None:
        """The norm of the gradient, its clipping, and whether the step is left out."""
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained])
        self.losses[-1] = norm
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(trained, self.clip_grad, norm)
        if self.guard:
            self.left_out.copy_(~norm.isfinite())

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
