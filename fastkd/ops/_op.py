"""torch custom ops that eager code enters directly.

A `torch.library.custom_op` is opaque to torch.compile and known to every tracer, but its Python layers cost 50 to 100
microseconds a call, a tenth of a training step on a CPU. `custom_op` keeps it for whoever traces, and lets eager code
call the same body, in an autograd function made of the same two rules, at a fifth of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CustomOp:
    """``fastkd::<name>`` in the torch registry; calling this object runs it.

    Args:
        name: name of the op.
        body: allocates the outputs and fills them; its annotations give the schema.
    """

    def __init__(self, name: str, body: Callable) -> None:
        self._body = body
        self._registered = torch.library.custom_op(f"fastkd::{name}", mutates_args=())(body)
        self._traced = getattr(torch.ops.fastkd, name)
        self._function: type[torch.autograd.Function] | None = None
        self.register_fake = self._registered.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `torch.library.custom_op` has it; both rules then serve eager code too."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        body = self._body

        # One function for both: torch binds arguments by name, slowly, for a setup_context of its own.
        def forward(ctx, *args):
            output = body(*args)
            ctx.set_materialize_grads(False)  # no tensors of zeros for outputs that nothing was made of
            setup_context(ctx, args, output)
            return output

        def grad(ctx, *gradients):
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *gradients)

        rules = dict(forward=staticmethod(forward), backward=staticmethod(grad))
        self._function = type(body.__name__, (torch.autograd.Function,), rules)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or _is_traced(args):
            return self._traced(*args)
        if not torch.is_grad_enabled():
            return self._body(*args)
        if self._function is None:  # a backward under create_graph: the registered op refuses a second derivative
            return self._traced(*args)
        return self._function.apply(*args)


def custom_op(name: str) -> Callable[[Callable], CustomOp]:
    """Decorator: makes ``fastkd::<name>`` of a body."""
    return lambda body: CustomOp(name, body)


def _is_traced(args: tuple) -> bool:
    """Whether someone watches or transforms the tensors: a dispatch mode, functorch, a tensor subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in args)
