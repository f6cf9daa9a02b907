"""Cross entropy of up-sampled logits with weighted labels (MIC, Hoyer et al. 2023, equation 5).

With z the student's logits [B, C, h, w], resized bilinearly to the label's H x W, N = B H W and w the weight:

    loss        = 1/N sum_i w_i (lse_i - z_i[label_i])                  lse_i = log sum_c exp z_ic
    d loss/d z  = w_i / N (exp(z_ic - lse_i) - [c = label_i])           resized back by the transposed interpolation

Ignored positions add 0 but stay in N, and the weights are not normalised: both as the released code has it, and
unlike `torch.nn.functional.cross_entropy`, whose mean divides by the sum of the weights that count.

Logits of full size are never stored. Forward keeps lse, one number per position; backward interpolates again and
gathers: each small cell sums what the positions around it send, in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import bilinear
from .pseudo_label import as_images

OP = "masked_consistency_loss"
LABELS = (torch.int64, torch.uint8)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(label: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Factor of each position in the loss: weight / N, 0 where ignored."""
    counts = (label.long() != ignore_index).to(dtype) / max(label.numel(), 1)
    return counts if weight is None else counts * weight


def _fill_forward(logits, label, weight, ignore_index, lse, loss) -> None:
    z = bilinear.resize(logits.to(loss.dtype), label.shape[1:])
    lse.copy_(z.logsumexp(1))
    index = label.long()
    index = torch.where(index == ignore_index, 0, index)
    entropy = lse - z.gather(1, index[:, None])[:, 0]
    factor = _weights(label, weight, ignore_index, loss.dtype)
    loss.copy_(torch.where(factor == 0, 0, entropy * factor).sum())


def _fill_backward(grad_loss, logits, label, weight, ignore_index, lse, grad_logits) -> None:
    z = bilinear.resize(logits.to(lse.dtype), label.shape[1:])
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    grad = (z - lse[:, None]).exp() - (label.long()[:, None] == classes).to(lse.dtype)
    factor = grad_loss * _weights(label, weight, ignore_index, lse.dtype)[:, None]
    grad = torch.where(factor == 0, 0, grad * factor)
    grad_logits.copy_(bilinear.resize_backward(grad, logits.shape[2:]))


_TRITON = "fastkd.ops.features.upsample_cross_entropy_triton"
forward = Kernel(OP, reference=_fill_forward, triton=f"{_TRITON}:forward")
backward = Kernel(f"{OP}_backward", reference=_fill_backward, triton=f"{_TRITON}:backward")


def _outputs(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    options = dict(dtype=_wide(logits.dtype), device=logits.device)
    return torch.empty((), **options), torch.empty(label.shape, **options)


@custom_op(OP)
def _op(logits: Tensor, label: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    loss, lse = _outputs(logits, label)
    forward(logits, label, weight, ignore_index, lse, loss)
    return loss, lse


@_op.register_fake
def _(logits, label, weight, ignore_index):
    return _outputs(logits, label)


@custom_op(f"{OP}_backward")
def _op_backward(
    grad_loss: Tensor, logits: Tensor, label: Tensor, weight: Tensor | None, lse: Tensor, ignore_index: int
) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(grad_loss, logits, label, weight, ignore_index, lse, grad_logits)
    return grad_logits


@_op_backward.register_fake
def _(grad_loss, logits, label, weight, lse, ignore_index):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, label, weight, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, label, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_loss: Tensor, _grad_lse):
    return _op_backward(grad_loss, *ctx.saved_tensors, ctx.ignore_index), None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def masked_consistency_loss(
    student_logits: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = 255,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Weighted cross entropy, averaged over all positions, of logits that are first resized to the label.

    Args:
        student_logits: [B, C], [B, C, L] or [B, C, h, w], floating, any strides.
        label: [B], [B, L] or [B, H, W], int64 or uint8. Logits [B, C, h, w] are resized to its H x W, bilinearly with
            align_corners=False.
        weight: of the label's shape (an expanded view costs nothing), or a scalar; floating, must not require grad.
        ignore_index: label that adds nothing. It still counts in the mean.
        size: optional (H, W), only checked against the label.

    Returns:
        Scalar, float32 (float64 for float64 logits): sum of weight * CE over the number of positions. A batch in which
        everything is ignored gives 0 (torch gives NaN).

    Raises:
        ValueError: shapes that do not fit, no position, a label outside of the classes (looked at on the CPU alone, a
            GPU would have to be waited for), or a weight that requires grad.
        TypeError: another dtype.
    """
    ndim = student_logits.ndim if isinstance(student_logits, Tensor) and student_logits.ndim in (2, 3) else 4
    _check.check_tensor(OP, "student_logits", student_logits, ndim)
    _check.check_tensor(OP, "label", label, ndim - 1, LABELS)
    full = label.shape[1:] if ndim == 4 else student_logits.shape[2:]
    _check.check_shape(OP, "label", label, (student_logits.shape[0], *full), "(B, positions) like student_logits")
    if size is not None and tuple(_check.pair(OP, "size", size)) != tuple(full):
        _check.fail(OP, "size", tuple(size), f"{tuple(full)} like label", "resize the label, or leave size out")
    if weight is not None:
        scalar = isinstance(weight, Tensor) and weight.ndim == 0
        _check.check_tensor(OP, "weight", weight, 0 if scalar else label.ndim)
        _check.check_no_grad(OP, "weight", weight, "a confidence must not train the teacher")
        if not scalar:
            _check.check_shape(OP, "weight", weight, tuple(label.shape), "like label, or a scalar")
    _check.check_same_device(OP, student_logits=student_logits, label=label, weight=weight)
    if label.numel() == 0 or student_logits.numel() == 0:
        got = f"shape {tuple(student_logits.shape)} with labels {tuple(label.shape)}"
        _check.fail(OP, "student_logits", got, "at least one position and class", "the mean of nothing is undefined")
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_classes(label, student_logits.shape[1], ignore_index)
    if weight is not None:
        weight = weight.to(_wide(student_logits.dtype)).expand(label.shape)
    # Vectors become one line, [1, C, 1, B] and [1, 1, B]: kernels walk along lines.
    logits, _ = as_images(OP, student_logits, None, batch_as_row=True)
    if ndim == 4:
        bilinear.check_size(OP, logits.shape[2:], full)
    if ndim < 4:
        label, weight = (t if t is None else t[None, None] if ndim == 2 else t[:, None] for t in (label, weight))
    return _op(logits, label, weight, ignore_index)[0]


def _check_classes(label: Tensor, classes: int, ignore_index: int) -> None:
    low, high = (int(v) for v in label.aminmax())
    if 0 <= low and high < classes:
        return
    wrong = label[((label < 0) | (label >= classes)) & (label.long() != ignore_index)]
    if wrong.numel():
        _check.fail(OP, "label", int(wrong[0]), f"classes from 0 to {classes - 1}, or ignore_index={ignore_index}")


class MaskedConsistencyLoss(torch.nn.Module):
    """`masked_consistency_loss` as a module; ``forward(student_logits, label, weight=None)``."""

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        return masked_consistency_loss(student_logits, label, weight, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"


def _reference(student_logits, label, weight=None, *, ignore_index=255, size=None) -> Tensor:
    z = student_logits.to(_wide(student_logits.dtype))
    if z.ndim == 4:
        z = bilinear.resize(z, label.shape[1:])
    entropy = F.cross_entropy(z, label.long(), reduction="none", ignore_index=ignore_index)
    return (entropy if weight is None else entropy * weight).mean()


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    random = torch.Generator().manual_seed(case.get("seed", 0))
    batch, classes, grid = case["batch"], case["classes"], case["grid"]
    shape = (batch, *(case["size"] if len(grid) == 2 else grid))
    logits = (2 * torch.randn((batch, classes, *grid), generator=random)).to(device, dtype)
    label = torch.randint(0, classes, shape, generator=random)
    label[torch.rand(shape, generator=random) < case.get("ignored", 0.1)] = 255
    kwargs = dict(student_logits=logits, label=label.to(device, case.get("label_dtype", torch.int64)))
    wide = _wide(dtype)
    if case["weight"] == "map":
        kwargs["weight"] = torch.rand(shape, generator=random).to(device, wide)
    elif case["weight"] == "expanded":
        kwargs["weight"] = torch.rand((), generator=random).to(device, wide).expand(shape)
    return kwargs


def _law(kwargs: dict) -> None:
    """Shifted logits give the same loss; what is ignored weighs nothing; a weight of 2 gives twice the loss."""
    loss = masked_consistency_loss(**kwargs)
    shifted = masked_consistency_loss(**kwargs | dict(student_logits=kwargs["student_logits"] + 0.5))
    torch.testing.assert_close(shifted, loss, rtol=1e-5, atol=1e-6)
    counted = (kwargs["label"] != 255).float()
    once = counted if kwargs.get("weight") is None else counted * kwargs["weight"]
    twice = masked_consistency_loss(**kwargs | dict(weight=2 * once))
    torch.testing.assert_close(twice, 2 * loss, rtol=1e-5, atol=0)


def _bytes_moved(kwargs: dict) -> int:
    # Logits and label (and weights, where they are a map) are read twice, the gradient is written; one lse each way.
    label, weight = kwargs["label"], kwargs.get("weight")
    per_position = 2 * label.element_size() + 2 * 4 + (8 if weight is not None and 0 not in weight.stride() else 0)
    return 3 * tensor_bytes(kwargs["student_logits"]) + label.numel() * per_position


SPEC = register(
    OpSpec(
        name=OP,
        function=masked_consistency_loss,
        reference=_reference,
        kernels=(forward, backward),
        build=_build,
        differentiable=("student_logits",),
        cases={
            "upsampled": dict(batch=2, classes=3, grid=(2, 2), size=(3, 5), weight="map"),
            "odd": dict(batch=1, classes=19, grid=(1, 3), size=(2, 7), weight="expanded", label_dtype=torch.uint8),
            "same_size": dict(batch=2, classes=7, grid=(3, 5), size=(3, 5), weight="map"),
            "smaller": dict(batch=1, classes=3, grid=(4, 5), size=(3, 2), weight=None),
            "vectors": dict(batch=6, classes=12, grid=(), weight="map"),
            "all_ignored": dict(batch=1, classes=3, grid=(1, 2), size=(2, 3), weight=None, ignored=2.0),
        },
        space=dict(
            batch=(1, 2), classes=(1, 5, 33), grid=((), (7,), (1, 1), (2, 3), (3, 2)),
            size=((1, 1), (2, 5), (4, 3), (3, 9)), weight=(None, "map", "expanded"), ignored=(0.0, 0.3),
            label_dtype=(torch.int64, torch.uint8), seed=tuple(range(5)),
        ),
        bench={
            "cityscapes": dict(
                batch=2, classes=19, grid=(256, 256), size=(1024, 1024), weight="expanded", label_dtype=torch.uint8,
            ),
            "full_size": dict(batch=2, classes=19, grid=(512, 512), size=(512, 512), weight="map"),
        },
        bytes_moved=_bytes_moved,
        flops=lambda k: 36 * k["student_logits"].shape[1] * k["label"].numel(),
        golden="mic_seg_consistency",
        law=_law,
    )
)  # fmt: skip
