"""torch custom ops that eager code enters directly.

A `torch.library.custom_op` is opaque to torch.compile and known to every tracer, but its Python layers cost 50 to 100
microseconds a call, a tenth of a training step on a CPU. `custom_op` keeps it for whoever traces, and lets eager code
call the same body, in an autograd function made of the same two rules, at a fifth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor


class CustomOp:
    """``fastkd::<name>`` in the torch registry; calling this object runs it.

    Args:
        name: name of the op.
        body: allocates the outputs and fills them; its annotations give the schema. Arguments and the result may be
            lists of tensors; the rule of the gradient then takes and returns lists in their places.
    """

    def __init__(self, name: str, body: Callable) -> None:
        self._body = body
        self._registered = torch.library.custom_op(f"fastkd::{name}", mutates_args=())(body)
        self._traced = getattr(torch.ops.fastkd, name)
        self._function: type[torch.autograd.Function] | None = None
        schema = self._traced.default._schema
        self._lists = frozenset(i for i, argument in enumerate(schema.arguments) if _is_list(argument))
        self._gives_list = any(map(_is_list, schema.returns))
        self.register_fake = self._registered.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `torch.library.custom_op` has it; both rules then serve eager code too."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        body, gives_list = self._body, self._gives_list

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

        # autograd.Function sees tensors among its arguments only, not inside of lists: those go in and out unpacked.
        def forward_flat(ctx, sizes, *flat):
            ctx.sizes = sizes
            output = forward(ctx, *_packed(flat, sizes))
            return tuple(output) if gives_list else output

        def grad_flat(ctx, *gradients):
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            found = backward(ctx, list(gradients)) if gives_list else backward(ctx, *gradients)
            return None, *_unpacked(found, ctx.sizes)

        rules = (forward_flat, grad_flat) if self._lists else (forward, grad)
        rules = dict(zip(("forward", "backward"), map(staticmethod, rules)))
        self._function = type(body.__name__, (torch.autograd.Function,), rules)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or _is_traced(args):
            return self._traced(*args)
        if not torch.is_grad_enabled():
            return self._body(*args)
        if self._function is None:  # a backward under create_graph: the registered op refuses a second derivative
            return self._traced(*args)
        if not self._lists:
            return self._function.apply(*args)
        sizes = tuple(len(a) if i in self._lists else None for i, a in enumerate(args))
        output = self._function.apply(sizes, *_unpacked(args, sizes))
        return list(output) if self._gives_list else output


def custom_op(name: str) -> Callable[[Callable], CustomOp]:
    """Decorator: makes ``fastkd::<name>`` of a body."""
    return lambda body: CustomOp(name, body)


def _is_list(argument: torch.Argument) -> bool:
    return str(argument.type) == "List[Tensor]"


def _packed(flat: tuple, sizes: tuple) -> list:
    """Arguments from their unpacked form; a size tells how many of them make a list."""
    items = iter(flat)
    return [next(items) if size is None else list(islice(items, size)) for size in sizes]


def _unpacked(args: tuple, sizes: tuple) -> list:
    return [item for arg, size in zip(args, sizes) for item in ((arg,) if size is None else arg or (None,) * size)]


def _is_traced(args: tuple) -> bool:
    """Whether someone watches or transforms the tensors: a dispatch mode, functorch, a tensor subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in args)
