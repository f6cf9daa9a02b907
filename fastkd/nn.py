"""The losses as `torch.nn` modules."""

from .ops.features.cls_distillation import CLSDistillationLoss
from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.logits.modules import DKDLoss, JSDLoss, KDLoss, LogitLoss, NKDLoss, ReverseKLLoss, TVDLoss
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "CLSDistillationLoss",
    "DKDLoss",
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
