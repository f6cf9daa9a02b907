"""The losses as `torch.nn` modules, and what projects features for them."""

from .models.cross_attention_projector import CrossAttentionProjector
from .ops.features.dual_view import DualViewLoss
from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.logits.modules import DKDLoss, JSDLoss, KDLoss, LogitLoss, NKDLoss, ReverseKLLoss, TVDLoss
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "CrossAttentionProjector",
    "DKDLoss",
    "DualViewLoss",
    "FeatureAlignmentLoss",
    "JSDLoss",
    "KDLoss",
    "LinearPixelLoss",
    "LogitLoss",
    "MaskedPixelLoss",
    "NKDLoss",
    "ReverseKLLoss",
    "TVDLoss",
]
