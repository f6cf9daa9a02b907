"""Features from the inside of any module, caught by name while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Where = str | int  # path of a submodule, or index of a block or stage

# Where the usual families keep their blocks: timm, transformers' encoders, CLIP towers, torchvision's ViT.
BLOCK_LISTS = (
    "blocks", "stages", "layers", "encoder.layer", "encoder.layers", "model.layers", "vision_model.encoder.layers",
    "vit.encoder.layer", "vit.layers", "bert.encoder.layer", "layer", "features",
)  # fmt: skip


class Tapped(NamedTuple):
    """What a tapped call gives.

    Attributes:
        output: what the module returned.
        features: outputs of the tapped submodules, in the order in which they were asked for.
    """

    output: Any
    features: tuple[Tensor, ...]


class Taps:
    """Calls a module and returns features from its inside along with its output.

    Hooks are on the module during a call, or between ``with taps:`` and its end, and never stay behind. Enter the
    block around code that runs under ``torch.compile(fullgraph=True)``, which cannot set hooks itself.

    Under gradient checkpointing features are those of the forward pass; the recomputation in backward is not caught.

    Args:
        model: any module.
        where: submodules, each a path as in ``model.named_modules()`` (``"layer3"``, ``"blocks.7.norm1"``) or the
            index of a block or stage, negative ones from the end.

    Raises:
        ValueError: no such path or index; the message has the nearest names.
    """

    def __init__(self, model: nn.Module, where: Where | Sequence[Where]) -> None:
        self.model = model
        self.where = (where,) if isinstance(where, (str, int)) else tuple(where)
        self.modules = tuple(find(model, place) for place in self.where)
        self._caught: list[Tensor | None] = [None] * len(self.modules)
        self._open = False
        self._handles: list = []
        self._entered = 0

    def __enter__(self) -> Taps:
        if self._entered == 0:
            self._handles = [m.register_forward_hook(self._hook(i)) for i, m in enumerate(self.modules)]
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tapped:
        """``model(*args, **kwargs)``, and the features."""
        if self._entered:
            return self._run(*args, **kwargs)
        with self:
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Tapped:
        self._open = True
        try:
            output = self.model(*args, **kwargs)
        finally:
            self._open = False
        features, self._caught = tuple(self._caught), [None] * len(self.modules)
        for place, feature in zip(self.where, features):
            if feature is None:
                raise ValueError(f"taps: {place!r}: the module did not run in this call; tap one that does")
        return Tapped(output, features)

    def _hook(self, index: int):
        def catch(module: nn.Module, inputs: tuple, output: Any) -> None:
            if self._open:
                self._caught[index] = _tensor(output)

        return catch


def find(model: nn.Module, where: Where) -> nn.Module:
    """The submodule at a path, or the block or stage of an index (see `Taps`)."""
    if isinstance(where, str):
        modules = dict(model.named_modules())
        if where in modules and where:
            return modules[where]
        near = difflib.get_close_matches(where, modules, n=3, cutoff=0.3) or list(modules)[1:4]
        raise ValueError(
            f"taps: got {where!r}, expected a submodule of {type(model).__name__}, such as {', '.join(near)}"
        )
    blocks = blocks_of(model)
    if not -len(blocks) <= where < len(blocks):
        raise ValueError(f"taps: got block {where}, expected {-len(blocks)} to {len(blocks) - 1}: "
                         f"{type(model).__name__} has {len(blocks)} blocks or stages")  # fmt: skip
    return blocks[where]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Blocks of a transformer or stages of a convolutional network, in the order in which they run."""
    for path in BLOCK_LISTS:
        found = _at(model, path)
        if isinstance(found, (nn.ModuleList, nn.Sequential)):
            return list(found)
    modules = dict(model.named_modules())
    stages = [modules[f"layer{i}"] for i in range(1, 9) if f"layer{i}" in modules]  # ResNets
    if not stages:  # other convolutional networks of timm
        names = [info["module"] for info in getattr(model, "feature_info", [])]
        stages = [modules[name] for name in names if name in modules]
    if not stages:
        raise ValueError(
            f"taps: {type(model).__name__} has no list of blocks or stages that is known here; name a submodule by "
            "its path instead, as in dict(model.named_modules())"
        )
    return stages


def places(taps: Mapping[str, Where | Sequence[Where]], side: str) -> tuple[Where, ...]:
    """One side, ``student`` or ``teacher``, of a mapping like ``{"student": 8, "teacher": (17,)}``."""
    unknown = set(taps) - {"student", "teacher"}
    if unknown:
        raise ValueError(f"taps: got {', '.join(sorted(map(repr, unknown)))}, expected 'student' and 'teacher'")
    here = taps.get(side, ())
    return (here,) if isinstance(here, (str, int)) else tuple(here)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        model = getattr(model, name, None)
        if model is None:
            return None
    return model


def _tensor(output: Any) -> Tensor:
    """The tensor of an output; the first one of a tuple or of a transformers output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return next(item for item in output if isinstance(item, Tensor))
