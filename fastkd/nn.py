"""The losses as `torch.nn` modules."""

from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.logits.class_vectors import ClassVectorKDLoss
from .ops.logits.linear_losses import LinearCrossEntropyLoss, LinearJSDLoss, LinearKLLoss
from .ops.logits.modules import DKDLoss, JSDLoss, KDLoss, LogitLoss, NKDLoss, ReverseKLLoss, TVDLoss
from .ops.logits.cosine import LogitCosineLoss
from .ops.logits.dist import DISTLoss
from .ops.logits.standardise import StandardizedKDLoss
from .ops.logits.uskd import USKDLoss
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "ClassVectorKDLoss",
    "DKDLoss",
    "FeatureAlignmentLoss",
    "JSDLoss",
    "KDLoss",
    "LinearCrossEntropyLoss",
    "LinearJSDLoss",
    "LinearKLLoss",
    "LinearPixelLoss",
    "LogitLoss",
    "MaskedPixelLoss",
    "NKDLoss",
    "ReverseKLLoss",
    "TVDLoss",
    "DISTLoss",
    "FeatureAlignmentLoss",
    "LinearPixelLoss",
    "LogitCosineLoss",
    "MaskedPixelLoss",
    "StandardizedKDLoss",
    "USKDLoss",
]
