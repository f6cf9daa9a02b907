"""The losses as `torch.nn` modules, and what projects features for them."""

from .models.cross_attention_projector import CrossAttentionProjector
from .ops.features.at_loss import ATLoss
from .ops.features.cls_distillation import CLSDistillationLoss
from .ops.features.crd_loss import CRDLoss
from .ops.features.dual_view import DualViewLoss
from .ops.features.dynamic_alignment import DynamicAlignment
from .ops.features.feature_alignment import FeatureAlignmentLoss
from .ops.features.gather_whiten import GatherWhitenSmoothL1Loss
from .ops.features.hint_loss import HintLoss, HintProjector
from .ops.features.pkt_loss import PKTLoss
from .ops.features.rkd_loss import RKDLoss
from .ops.features.sp_loss import SPLoss
from .ops.features.upsample_cross_entropy import MaskedConsistencyLoss
from .ops.logits.class_vectors import ClassVectorKDLoss
from .ops.logits.cosine import LogitCosineLoss
from .ops.logits.dist import DISTLoss
from .ops.logits.linear_losses import LinearCrossEntropyLoss, LinearJSDLoss, LinearKLLoss
from .ops.logits.modules import DKDLoss, JSDLoss, KDLoss, LogitLoss, NKDLoss, ReverseKLLoss, TVDLoss
from .ops.logits.standardise import StandardizedKDLoss
from .ops.logits.uskd import USKDLoss
from .ops.masked.block_mask import BlockMask
from .ops.masked.linear_pixel_loss import LinearPixelLoss
from .ops.masked.masked_pixel_loss import MaskedPixelLoss

__all__ = [
    "ATLoss",
    "BlockMask",
    "CLSDistillationLoss",
    "CRDLoss",
    "ClassVectorKDLoss",
    "CrossAttentionProjector",
    "DISTLoss",
    "DKDLoss",
    "DualViewLoss",
    "DynamicAlignment",
    "FeatureAlignmentLoss",
    "GatherWhitenSmoothL1Loss",
    "HintLoss",
    "HintProjector",
    "JSDLoss",
    "KDLoss",
    "LinearCrossEntropyLoss",
    "LinearJSDLoss",
    "LinearKLLoss",
    "LinearPixelLoss",
    "LogitCosineLoss",
    "LogitLoss",
    "MaskedConsistencyLoss",
    "MaskedPixelLoss",
    "NKDLoss",
    "PKTLoss",
    "RKDLoss",
    "ReverseKLLoss",
    "SPLoss",
    "StandardizedKDLoss",
    "TVDLoss",
    "USKDLoss",
]
