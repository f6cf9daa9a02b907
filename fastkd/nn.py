"""The losses as `torch.nn` modules."""

from .ops.features.at_loss import ATLoss
from .ops.features.crd_loss import CRDLoss
from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.features.hint_loss import HintLoss, HintProjector
from .ops.features.pkt_loss import PKTLoss
from .ops.features.rkd_loss import RKDLoss
from .ops.features.sp_loss import SPLoss
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "ATLoss",
    "CRDLoss",
    "FeatureAlignmentLoss",
    "HintLoss",
    "HintProjector",
    "LinearPixelLoss",
    "MaskedPixelLoss",
    "PKTLoss",
    "RKDLoss",
    "SPLoss",
]
