"""The losses as `torch.nn` modules."""

from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.features.upsample_cross_entropy import MaskedConsistencyLoss
from .ops.masked.block_mask import BlockMask
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = ["BlockMask", "FeatureAlignmentLoss", "LinearPixelLoss", "MaskedConsistencyLoss", "MaskedPixelLoss"]
