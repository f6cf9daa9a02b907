"""Masks that keep what a teacher attends to (attentive masking of MaskAlign, Xue et al., CVPR 2023, section 3.4).

The importance of patch j is the attention that the teacher's CLS token pays to it in the last block, mean over heads.
Patches are drawn without replacement with probability proportional to importance; the first ``int(L * (1 - ratio))``
are visible. Such a draw is a race: with independent E_j ~ Exponential(1), patches in the order of their arrival times
E_j / importance_j have the same distribution. So they are sorted by importance / E, descending, in one step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .random_masking import Masking, ordered_masking, visible_patches

OP = "attention_masking"


def cls_attention_row(query: Tensor, key: Tensor, scale: float | None = None, *, num_prefix: int = 1) -> Tensor:
    """Attention of the CLS token to every patch, mean over heads: the one row of the score matrix that is needed.

    Args:
        query: [B, H, d], the CLS token's query of each head.
        key: [B, H, P + L, d] in the query's dtype, keys of all tokens, prefix tokens first; any strides.
        scale: of the scores, default 1 / sqrt(d).
        num_prefix: P; the softmax runs over all P + L tokens, the result leaves the prefix tokens out.

    Returns:
        [B, L], float32 (float64 for float64 queries), without gradient; rows sum to at most 1.
    """
    _check.check_tensor("cls_attention_row", "query", query, 3)
    _check.check_tensor("cls_attention_row", "key", key, 4, (query.dtype,))
    batch, heads, width = query.shape
    _check.check_shape("cls_attention_row", "key", key, (batch, heads, key.shape[2], width), "(B, H, P + L, d)")
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        # In the dtype of the keys, as any attention in 16 bits makes scores: a wider copy of them would cost most.
        scores = (key @ query[..., None]).squeeze(-1)
        scores = scores.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        attention = (scores * (1 / math.sqrt(width) if scale is None else scale)).softmax(-1)
        return attention[:, :, num_prefix:].mean(1)


def attention_masking(
    importance: Tensor,
    mask_ratio: float,
    *,
    exp_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Masking:
    """Draws, per image, which patches stay visible: important ones more likely.

    Args:
        importance: [B, L] floating, not negative, no row all zero; rows need not sum to 1. A patch of importance 0
            comes last. On a GPU the values are not checked: a check would wait for the device.
        mask_ratio: share of masked patches in [0, 1); ``int(L * (1 - mask_ratio))`` patches stay visible.
        exp_noise: optional [B, L] draws of Exponential(1) that fix the result.
        generator: source of the noise where it is not given.

    Returns:
        `Masking` (ids_keep, ids_restore, mask, ids_shuffle), as of `random_masking`.

    Raises:
        ValueError: a ratio outside [0, 1), no patch visible, noise of another shape, negative or all-zero importance.
    """
    _check.check_tensor(OP, "importance", importance, 2)
    batch, patches = importance.shape
    keep = visible_patches(OP, patches, mask_ratio)
    importance = importance.detach()
    if importance.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_importance(importance)
    if exp_noise is None:
        exp_noise = torch.empty(batch, patches, dtype=torch.float32, device=importance.device)
        exp_noise.exponential_(generator=generator)
    else:
        _check.check_tensor(OP, "exp_noise", exp_noise, 2)
        _check.check_shape(OP, "exp_noise", exp_noise, (batch, patches), "(B, L) like importance")
        exp_noise = exp_noise.detach().to(importance.device)
    wide = torch.promote_types(importance.dtype, torch.float32)
    return ordered_masking(-(importance.to(wide) / exp_noise.to(wide)), keep)


def _check_importance(importance: Tensor) -> None:
    if not (importance >= 0).all():
        _check.fail(OP, "importance", "a negative value or NaN", "values that are not negative")
    if not (importance > 0).any(1).all():
        _check.fail(OP, "importance", "a row of zeros", "a patch that matters in every image")
