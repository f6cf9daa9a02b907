"""Functional ops. Each is a slice: maths, reference, registration, public function, module, OpSpec."""

from ._dispatch import BACKENDS, backend
from ._spec import SPECS, OpSpec
from .blocks.attention import attention
from .blocks.gelu import gelu
from .blocks.linear import linear
from .blocks.linear_fp8 import linear_fp8
from .blocks.linear_int8 import linear_int8
from .blocks.mlp import mlp
from .blocks.quantize_rows import quantize_rows
from .blocks.residual_layer_norm import residual_layer_norm
from .features.at_loss import at_loss
from .features.crd_nce_loss import crd_nce_loss, crd_normaliser
from .features.feature_alignment import feature_alignment_loss
from .features.hint_loss import hint_loss
from .features.pkt_loss import pkt_loss
from .features.rkd_loss import rkd_loss
from .features.sp_loss import sp_loss
from .images.resized_crop import resized_crop
from .masked.decoder_assemble import decoder_assemble
from .masked.images import patchify, unpatchify
from .masked.linear_pixel_loss import linear_pixel_loss
from .masked.masked_pixel_loss import masked_pixel_loss
from .masked.random_masking import Masking, random_masking
from .masked.visible_patch_embed import visible_patch_embed
from .weights.ema_update import ema_update_

__all__ = [
    "BACKENDS",
    "Masking",
    "OpSpec",
    "SPECS",
    "at_loss",
    "attention",
    "backend",
    "crd_nce_loss",
    "crd_normaliser",
    "decoder_assemble",
    "ema_update_",
    "feature_alignment_loss",
    "gelu",
    "hint_loss",
    "linear",
    "linear_fp8",
    "linear_int8",
    "linear_pixel_loss",
    "masked_pixel_loss",
    "mlp",
    "patchify",
    "pkt_loss",
    "quantize_rows",
    "random_masking",
    "residual_layer_norm",
    "resized_crop",
    "rkd_loss",
    "sp_loss",
    "unpatchify",
    "visible_patch_embed",
]
