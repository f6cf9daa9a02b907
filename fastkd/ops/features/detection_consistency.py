"""Consistency losses of a two-stage detector on masked images (MIC, Hoyer et al. 2023, as released for Faster R-CNN).

Both weights come from the student's own outputs:

    ROI head   1/N sum_i p_i CE(z_i, y_i)              p_i = max softmax(z_i), a constant
    RPN        1/N sum_i sigmoid(o_i) BCE(o_i, y_i)    the gradient runs through sigmoid(o_i), too
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check


def _check_pair(op: str, name: str, values: Tensor, ndim: int, label: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check.check_tensor(op, name, values, ndim)
    _check.check_tensor(op, "label", label, 1, dtypes)
    _check.check_shape(op, "label", label, (values.shape[0],), f"one for each row of {name}")
    _check.check_no_grad(op, "label", label, "a pseudo-label is a constant")
    _check.check_same_device(op, **{name: values, "label": label})


def roi_consistency_loss(logits: Tensor, label: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy of the sampled proposals, each weighted with the probability of its most likely class.

    Args:
        logits: [N, C] of the student's box head, floating.
        label: [N] int64; 0 is background.
        ignore_index: label of proposals that do not count at all.

    Returns:
        Scalar, float32 (float64 for float64 logits): mean over the proposals that count, 0 where there are none.
    """
    _check_pair("roi_consistency_loss", "logits", logits, 2, label, (torch.int64,))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    confidence = logits.detach().softmax(1).amax(1)
    entropy = F.cross_entropy(logits, label, reduction="none", ignore_index=ignore_index)
    counts = label != ignore_index
    return (confidence * entropy).sum() / counts.sum().clamp(min=1)


def objectness_consistency_loss(
    objectness: Tensor, label: Tensor, detach_weight: bool = False, *, ignore_index: int = -1
) -> Tensor:
    """Binary cross entropy of the sampled anchors, each weighted with its own objectness.

    Args:
        objectness: [N] logits of the student's region proposal network, floating.
        label: [N] floating or int64: 1 object, 0 background.
        detach_weight: treats the weight as a constant. The released code does not.
        ignore_index: label of anchors that do not count at all.

    Returns:
        Scalar, float32 (float64 for float64 logits): mean over the anchors that count, 0 where there are none.
    """
    dtypes = (*_check.FLOATS, torch.int64)
    _check_pair("objectness_consistency_loss", "objectness", objectness, 1, label, dtypes)
    objectness = objectness if objectness.dtype == torch.float64 else objectness.float()
    counts = (label != ignore_index).to(objectness.dtype)
    target = label.to(objectness.dtype) * counts
    weight = (objectness.detach() if detach_weight else objectness).sigmoid() * counts
    entropy = F.binary_cross_entropy_with_logits(objectness, target, reduction="none")
    return (weight * entropy).sum() / counts.sum().clamp(min=1)
