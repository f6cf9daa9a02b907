"""Labels that a teacher gives, with how far they are to be trusted (DAFormer, Hoyer et al. 2022; MIC, 2023, section 3).

Per position, with z the teacher's logits, resized bilinearly to the label's size where asked for:

    label  = argmax_c z_c                                ties go to the lower class
    p      = max_c softmax(z)_c = 1 / sum_c exp(z_c - max z)
    weight = q = #{p >= threshold} / #positions          "quality": one number for the whole batch, or for each image
             p                                           "prob"
             1                                           "none"

The kernels interpolate on the fly and keep the running maximum and sum in registers: neither logits of full size nor
probabilities are stored. Confident positions are counted as whole numbers on the device; nothing waits for it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import _check
from .._dispatch import Kernel
from .._op import custom_op
from .._spec import Case, OpSpec, register, tensor_bytes
from . import bilinear

OP = "pseudo_label"
WEIGHTS = ("quality", "prob", "none")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill_reference(logits, threshold, label, count, prob) -> None:
    z = bilinear.resize(logits.to(_wide(logits.dtype)), label.shape[1:])
    p, index = z.softmax(1).max(1)
    label.copy_(index)
    count.copy_((p >= threshold).sum((1, 2)))
    if prob.numel():
        prob.copy_(p)


kernel = Kernel(OP, reference=_fill_reference, triton="fastkd.ops.features.pseudo_label_triton:pseudo_label")


def _outputs(logits: Tensor, size: list[int], label_dtype: torch.dtype, with_prob: bool):
    batch, options = logits.shape[0], dict(device=logits.device)
    label = torch.empty((batch, *size), dtype=label_dtype, **options)
    count = torch.empty(batch, dtype=torch.int64, **options)
    prob = torch.empty(label.shape if with_prob else (0,), dtype=_wide(logits.dtype), **options)
    return label, count, prob


@custom_op(OP)
def _op(
    logits: Tensor, threshold: float, size: list[int], label_dtype: torch.dtype, with_prob: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, size, label_dtype, with_prob)
    if outputs[0].numel():
        kernel(logits, threshold, *outputs)
    return outputs


@_op.register_fake
def _(logits, threshold, size, label_dtype, with_prob):
    return _outputs(logits, size, label_dtype, with_prob)


def as_images(op: str, logits: Tensor, size: tuple[int, int] | None, batch_as_row: bool) -> tuple[Tensor, list[int]]:
    """(logits as a view [B, C, h, w], size [H, W] of its labels) for logits [B, C], [B, C, L] or [B, C, h, w].

    With `batch_as_row` a batch of vectors becomes one line of B positions, which kernels that walk along lines like.
    """
    if logits.ndim != 4 and size is not None:
        _check.fail(op, "size", tuple(size), "None", "only logits [B, C, h, w] are resized")
    if logits.ndim == 2:
        logits = logits.t()[None, :, None] if batch_as_row else logits[:, :, None, None]
    elif logits.ndim == 3:
        logits = logits[:, :, None]
    return logits, list(logits.shape[2:] if size is None else _check.pair(op, "size", size))


def pseudo_label(
    teacher_logits: Tensor,
    *,
    weight: str = "quality",
    threshold: float = 0.968,
    scope: str = "batch",
    ignore_top: int = 0,
    ignore_bottom: int = 0,
    valid_mask: Tensor | None = None,
    size: tuple[int, int] | None = None,
    label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Hard labels of a teacher and the weight of each.

    Args:
        teacher_logits: [B, C] (one label per image), [B, C, L] or [B, C, h, w], floating, any strides. Must not require
            grad.
        weight: ``quality``, the share of positions with probability >= threshold; ``prob``, the probability of the
            label; ``none``, 1 everywhere.
        threshold: of ``quality``.
        scope: ``batch``, one share for all images, as the released code has it; or ``image``, one for each.
        ignore_top, ignore_bottom: rows whose weight is 0 (only [B, C, h, w]).
        valid_mask: [B, H, W] or [B, 1, H, W], bool or floating; multiplies the weight (only [B, C, h, w]).
        size: (H, W) to which the logits are resized first, bilinearly with align_corners=False.
        label_dtype: torch.int64, or torch.uint8 for an eighth of the bytes (up to 255 classes).

    Returns:
        (label [B, *], weight [B, *] in float32, float64 for float64 logits). Where it is the same everywhere, the
        weight is an expanded view: no memory is spent on it.

    Raises:
        ValueError: shapes that do not fit, an unknown weight or scope, or logits that require grad.
        TypeError: another dtype.
    """
    if weight not in WEIGHTS:
        _check.fail(OP, "weight", repr(weight), "one of " + ", ".join(WEIGHTS))
    if scope not in ("batch", "image"):
        _check.fail(OP, "scope", repr(scope), "'batch' or 'image'")
    ndim = teacher_logits.ndim if isinstance(teacher_logits, Tensor) and teacher_logits.ndim in (2, 3) else 4
    _check.check_tensor(OP, "teacher_logits", teacher_logits, ndim)
    _check.check_no_grad(OP, "teacher_logits", teacher_logits, "a pseudo-label must not train the teacher")
    if label_dtype not in (torch.int64, torch.uint8):
        _check.fail(OP, "label_dtype", label_dtype, "torch.int64 or torch.uint8", error=TypeError)
    if teacher_logits.shape[1] < 1 or (label_dtype == torch.uint8 and teacher_logits.shape[1] > 255):
        _check.fail(OP, "teacher_logits", f"{teacher_logits.shape[1]} classes", "1 or more, at most 255 with uint8")
    logits, full = as_images(OP, teacher_logits, size, batch_as_row=scope == "batch")
    bilinear.check_size(OP, logits.shape[2:], full)
    shape = (teacher_logits.shape[0], *full) if ndim == 4 else (teacher_logits.shape[0], *teacher_logits.shape[2:])
    label, count, prob = _op(logits, threshold, full, label_dtype, weight == "prob")
    label = label.view(shape)
    if weight == "prob":
        trust = prob.view(shape)
    elif weight == "none":
        trust = torch.ones((), dtype=prob.dtype, device=prob.device).expand(shape)
    else:
        # In float64: a count of more than 2^24 positions is a whole number still.
        count = count.sum(0, keepdim=True) if scope == "batch" else count
        positions = label.numel() if scope == "batch" else full[0] * full[1]
        quality = (count.double() / max(positions, 1)).to(prob.dtype)
        trust = quality.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    if ignore_top or ignore_bottom or valid_mask is not None:
        trust = _restricted(trust, ndim, ignore_top, ignore_bottom, valid_mask)
    return label, trust


def _restricted(trust: Tensor, ndim: int, top: int, bottom: int, valid_mask: Tensor | None) -> Tensor:
    if ndim != 4:
        _check.fail(OP, "teacher_logits", f"{ndim} dimensions", "4 with ignored rows or a valid_mask")
    height = trust.shape[1]
    if top < 0 or bottom < 0:
        _check.fail(OP, "ignore_top, ignore_bottom", (top, bottom), "no negative number of rows")
    if top or bottom:
        row = torch.arange(height, device=trust.device)
        trusted = ((row >= top) & (row < height - bottom))[:, None]
        # Times a column of rows first: where the weight is the same along a row, it stays an expanded view.
        lean = trust[:, :, :1] if trust.stride(2) == 0 else trust
        trust = (lean * trusted).expand(trust.shape)
    if valid_mask is not None:
        _check.check_tensor(
            OP, "valid_mask", valid_mask, 4 if valid_mask.ndim == 4 else 3, (*_check.FLOATS, torch.bool)
        )
        valid = valid_mask.squeeze(1) if valid_mask.ndim == 4 else valid_mask
        _check.check_shape(OP, "valid_mask", valid, tuple(trust.shape), "(B, H, W) or (B, 1, H, W)")
        trust = trust * valid.to(trust.dtype)
    return trust


def _reference(
    teacher_logits, *, weight="quality", threshold=0.968, scope="batch", ignore_top=0, ignore_bottom=0,
    valid_mask=None, size=None, label_dtype=torch.int64,
):  # fmt: skip
    z = teacher_logits.to(_wide(teacher_logits.dtype))
    p, label = (z if size is None else bilinear.resize(z, size)).softmax(1).max(1)
    if weight == "quality":
        confident = (p >= threshold).to(p.dtype)
        share = confident.mean() if scope == "batch" else confident.flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1))
        p = share.expand(p.shape).clone()
    elif weight == "none":
        p = torch.ones_like(p)
    if ignore_top or ignore_bottom:
        p[:, :ignore_top] = 0
        p[:, max(0, p.shape[1] - ignore_bottom) :] = 0
    if valid_mask is not None:
        p = p * valid_mask.view(p.shape).to(p.dtype)
    return label.to(label_dtype), p


def _random_logits(case: Case, random: torch.Generator) -> Tensor:
    shape = (case["batch"], case["classes"], *case["grid"])
    logits = 2 * torch.randn(shape, generator=random)
    if case.get("stripes"):
        # One class in three columns: however many positions, none lies between two classes, or at the threshold.
        column = torch.arange(shape[-1]) // 3 % case["classes"]
        logits = 0.05 * logits + 8.0 * (torch.arange(case["classes"])[:, None, None] == column)
    return logits


def _is_clear(logits: Tensor, size: tuple[int, int] | None, threshold: float) -> bool:
    """Whether rounding can change neither a label nor the count."""
    z = logits.double() if size is None else bilinear.resize(logits.double(), size)
    if z.numel() == 0 or z.shape[1] == 1:
        return True
    first, second = z.topk(2, 1).values.unbind(1)
    p = z.softmax(1).amax(1)
    return bool(((first - second).min() > 1e-4) and ((p - threshold).abs().min() > 1e-5))


def _build(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict:
    size, threshold = case.get("size"), case.get("threshold", 0.6)
    size = size if len(case["grid"]) == 2 else None
    for seed in itertools.count(1000 * case.get("seed", 0)):
        random = torch.Generator().manual_seed(seed)
        logits = _random_logits(case, random).to(dtype)
        if case.get("stripes") or _is_clear(logits, size, threshold):
            break
    kwargs = dict(teacher_logits=logits.to(device), weight=case["weight"], threshold=threshold)
    kwargs |= dict(scope=case.get("scope", "batch"), size=size, label_dtype=case.get("label_dtype", torch.int64))
    if len(case["grid"]) == 2:
        kwargs |= dict(ignore_top=case.get("top", 0), ignore_bottom=case.get("bottom", 0))
        if case.get("valid"):
            full = size or case["grid"]
            kwargs["valid_mask"] = (torch.rand((case["batch"], *full), generator=random) < 0.8).to(device)
    return kwargs


def _law(kwargs: dict) -> None:
    """A constant added to all logits of a position changes nothing; permuted classes give permuted labels."""
    logits = kwargs["teacher_logits"]
    label, weight = pseudo_label(**kwargs)
    shifted_label, shifted_weight = pseudo_label(**kwargs | dict(teacher_logits=logits + 0.5))
    assert torch.equal(label, shifted_label)
    torch.testing.assert_close(weight, shifted_weight, rtol=1e-5, atol=0)
    order = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    turned_label, _ = pseudo_label(**kwargs | dict(teacher_logits=logits[:, order]))
    assert torch.equal(label, order[turned_label.long()].to(label.dtype))


SPEC = register(
    OpSpec(
        name=OP,
        function=pseudo_label,
        reference=_reference,
        kernels=(kernel,),
        build=_build,
        differentiable=(),
        cases={
            "upsampled": dict(batch=2, classes=5, grid=(3, 4), size=(4, 7), weight="quality"),
            "rows_and_mask": dict(
                batch=2, classes=7, grid=(5, 5), size=(4, 5), weight="quality", top=2, bottom=1, valid=True,
            ),
            "prob": dict(batch=1, classes=19, grid=(2, 5), size=(3, 19), weight="prob", top=1),
            "image_uint8": dict(
                batch=3, classes=3, grid=(5, 6), size=(3, 4), weight="quality", scope="image", label_dtype=torch.uint8,
            ),
            "vectors": dict(batch=6, classes=12, grid=(), weight="prob"),
            "same_size": dict(batch=1, classes=2, grid=(4, 37), weight="quality", threshold=0.77),
        },
        space=dict(
            batch=(1, 2), classes=(2, 5, 9), grid=((), (7,), (1, 1), (3, 5), (3, 2)),
            size=(None, (1, 1), (4, 7), (3, 11)), weight=WEIGHTS, scope=("batch", "image"), top=(0, 1),
            valid=(False, True), label_dtype=(torch.int64, torch.uint8), seed=tuple(range(5)),
        ),
        bench={
            "cityscapes": dict(
                batch=2, classes=19, grid=(256, 256), size=(1024, 1024), weight="quality", threshold=0.968,
                stripes=True, label_dtype=torch.uint8,
            ),
            "full_size": dict(batch=2, classes=19, grid=(512, 512), weight="prob", stripes=True),
        },
        bytes_moved=lambda k: tensor_bytes(k["teacher_logits"], *_op_outputs(k)),
        flops=lambda k: 12 * k["teacher_logits"].shape[1] * _op_outputs(k)[0].numel(),
        golden="mic_seg_consistency",
        law=_law,
    )
)  # fmt: skip


def _op_outputs(kwargs: dict) -> tuple[Tensor, ...]:
    logits, full = as_images(OP, kwargs["teacher_logits"], kwargs["size"], batch_as_row=False)
    return _outputs(logits.to("meta"), full, kwargs["label_dtype"], kwargs["weight"] == "prob")
