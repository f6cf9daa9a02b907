"""CUDA graphs without a GPU: what is captured is rehearsed, undone, and run at each replay."""

from __future__ import annotations

import copy

import torch


class Rehearsed:
    """Stands in for `CudaGraphs`: capture runs the step and undoes it; a replay runs it on what the buffers hold."""

    def __init__(self) -> None:
        self.captured = self.warmed_up = 0

    def warm_up(self, run) -> None:
        self.warmed_up += 1
        run()

    def capture(self, run):
        owner = run.func.__self__
        states = [t for s in owner.optimizer.state.values() for t in s.values()]
        model = owner.model
        tensors = [owner.losses, owner.left_out, *model.parameters(), *model.buffers(), *states]
        before, scaler = [t.detach().clone() for t in tensors], copy.deepcopy(owner.scaler.state_dict())
        try:
            run()
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before):
                    tensor.copy_(value)
            owner.scaler.load_state_dict(scaler)
        self.captured += 1
        return run
