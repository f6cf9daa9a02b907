"""The losses as `torch.nn` modules."""

from .ops.features.dynamic_alignment import DynamicAlignment
from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.features.gather_whiten import GatherWhitenSmoothL1Loss
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "DynamicAlignment",
    "FeatureAlignmentLoss",
    "GatherWhitenSmoothL1Loss",
    "LinearPixelLoss",
    "MaskedPixelLoss",
]
