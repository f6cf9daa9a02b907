"""Dynamic Alignment (MaskAlign, Xue et al., CVPR 2023, section 3.3): learnable mixtures of layers meet the teacher's.

    f_a  = sum_b W[a, b] s_b                  one mixture of the student's K layers per layer a of the teacher
    loss = sum_a w_a distance(head_a(f_a), target_a)

Only layers with a weight w_a other than 0 cost anything: the mixtures, heads and targets of the others are never made
(exact: their gradients are zero). So heads exist for used layers alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _check
from ..blocks.linear import Linear
from .gather_whiten import LOSSES, gather_whiten_smooth_l1
from .layer_mix import layer_mix

OP = "DynamicAlignment"
FUSIONS = ("linear", "sum", "simple")
HEADS = {
    "linear": lambda narrow, wide: Linear(narrow, wide),
    "norm_linear": lambda narrow, wide: nn.Sequential(nn.LayerNorm(narrow), Linear(narrow, wide)),
    "mlp": lambda narrow, wide: nn.Sequential(Linear(narrow, wide), nn.GELU(), Linear(wide, wide)),
    "mlp2": lambda narrow, wide: nn.Sequential(Linear(narrow, wide), nn.LayerNorm(wide), Linear(wide, wide)),
}


def layer_weights_of(name: str, layers: int) -> list[float]:
    """Weights w_a of the losses of a teacher's layers.

    Args:
        name: ``top5`` (any number k: 1 / k for each of the last k), ``mean`` (1 / layers each), ``out`` (the last one
            alone), ``linear_decay`` (proportional to the 0-based index, sum 1) or ``mid3`` (layer 3, 0-based, alone).
        layers: how many layers the teacher has.

    Raises:
        ValueError: an unknown name, or a layer that does not exist.
    """
    known = re.fullmatch(r"(top|mid)(\d+)|mean|out|linear_decay", name)
    if known is None:
        _check.fail(OP, "layer_weights", repr(name), "topK, mean, out, linear_decay or midJ, K and J numbers")
    if name == "mean":
        return [1 / layers] * layers
    if name == "linear_decay":
        total = layers * (layers - 1) / 2
        if total == 0:
            _check.fail(OP, "layer_weights", f"'linear_decay' for {layers} layer", "at least 2 layers", "use 'out'")
        return [index / total for index in range(layers)]
    kind, number = ("top", 1) if name == "out" else (known[1], int(known[2]))
    most = layers if kind == "top" else layers - 1
    if not (kind == "top") <= number <= most:
        _check.fail(OP, "layer_weights", repr(name), f"{kind}{int(kind == 'top')} to {kind}{most}: {layers} layers")
    if kind == "mid":
        return [float(index == number) for index in range(layers)]
    return [0.0] * (layers - number) + [1 / number] * number


class DynamicAlignment(nn.Module):
    """Loss between all layers of a student and the chosen layers of a teacher.

    Args:
        num_student_layers, num_teacher_layers: K and Kt.
        student_dim, teacher_dim: widths Ds and Dt.
        fusion: ``linear``: W [Kt, K] starts as the unit matrix plus 0.01 everywhere, K must be Kt; ``sum``: W starts at
            1 / K everywhere; ``simple``: layer a meets layer a, without W, K must be Kt.
        head: ``linear``, ``norm_linear`` (LayerNorm first), ``mlp`` (Linear-GELU-Linear) or ``mlp2`` (Linear-LayerNorm-
            Linear); the hidden width is Dt.
        layer_weights: see `layer_weights_of`.
        loss: ``smooth_l1`` (twice torch's), ``l2`` or ``l1``, see `gather_whiten_smooth_l1`.

    Attributes:
        used: indices of the teacher's layers with a weight, ascending.
        weights: their weights.
        align_weights: W, a parameter without weight decay (`no_weight_decay`); None with simple fusion.
        heads: one per used layer, by its index as a string.
    """

    def __init__(
        self,
        num_student_layers: int,
        num_teacher_layers: int,
        student_dim: int,
        teacher_dim: int,
        fusion: str = "linear",
        head: str = "linear",
        layer_weights: str = "top5",
        loss: str = "smooth_l1",
    ) -> None:
        super().__init__()
        for name, value, known in (("fusion", fusion, FUSIONS), ("head", head, HEADS), ("loss", loss, LOSSES)):
            if value not in known:
                _check.fail(OP, name, repr(value), "one of " + ", ".join(known))
        if fusion != "sum" and num_student_layers != num_teacher_layers:
            _check.fail(
                OP, "fusion", f"{fusion!r} with {num_student_layers} layers of the student and {num_teacher_layers} of "
                "the teacher", "as many layers on both sides", "use fusion='sum', which takes any numbers",
            )  # fmt: skip
        self.num_student_layers, self.num_teacher_layers = num_student_layers, num_teacher_layers
        self.fusion, self.head, self.loss = fusion, head, loss
        weights = layer_weights_of(layer_weights, num_teacher_layers)
        self.used = tuple(index for index, weight in enumerate(weights) if weight)
        self.weights = tuple(weights[index] for index in self.used)
        self.align_weights = None
        if fusion != "simple":
            start = torch.full((num_teacher_layers, num_student_layers), 1 / num_student_layers)
            self.align_weights = nn.Parameter(start if fusion == "sum" else torch.eye(num_teacher_layers) + 0.01)
        self.heads = nn.ModuleDict({str(index): HEADS[head](student_dim, teacher_dim) for index in self.used})

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, as in timm."""
        return {"align_weights"}

    def forward(
        self,
        student_states: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        ids_keep: Tensor | None = None,
        *,
        norm: str = "none",
        num_prefix: int = 1,
    ) -> Tensor:
        """The weighted sum of `per_layer`, with the same arguments: a float32 scalar (float64 for float64 states)."""
        losses = self.per_layer(student_states, targets, ids_keep, norm=norm, num_prefix=num_prefix)
        return sum(weight * loss for weight, loss in zip(self.weights, losses))

    def per_layer(
        self,
        student_states: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        ids_keep: Tensor | None = None,
        *,
        norm: str = "none",
        num_prefix: int = 1,
    ) -> list[Tensor]:
        """Losses of the used layers.

        Args:
            student_states: K raw block outputs [B, C + n, Ds].
            targets: Kt tensors; those of layers that are not `used` are not looked at and may be None. With ids_keep:
                the teacher's features of the intact picture [B, P + L, Dt], else targets [B, C + n, Dt] as they are.
            ids_keep, norm, num_prefix: see `gather_whiten_smooth_l1`. The default compares with finished targets.

        Returns:
            A scalar per used layer, each the mean over all its elements.
        """
        for name, value, count in (
            ("student_states", student_states, self.num_student_layers), ("targets", targets, self.num_teacher_layers),
        ):  # fmt: skip
            if len(value) != count:
                _check.fail(OP, name, f"{len(value)} layers", f"{count}, one per layer")
        losses = []
        for index, mixed in zip(self.used, self._mix(student_states)):
            predicted = self.heads[str(index)](mixed)
            losses.append(
                gather_whiten_smooth_l1(predicted, targets[index], ids_keep, norm, self.loss, num_prefix=num_prefix)
            )
        return losses

    def _mix(self, states: Sequence[Tensor]) -> list[Tensor]:
        if self.align_weights is None:
            return [states[index] for index in self.used]
        device, dtype = states[0].device.type, None
        if torch.is_autocast_enabled(device) and self.head != "norm_linear" and states[0].dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)  # the head would cast to it
        rows = self.align_weights[self.used[0] : self.used[-1] + 1]  # used layers are always neighbours
        return layer_mix(states, rows, dtype=dtype)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{index}: {weight:.3g}" for index, weight in zip(self.used, self.weights))
        return f"fusion={self.fusion}, head={self.head}, loss={self.loss}, layers={{{weights}}}"
