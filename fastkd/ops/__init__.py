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
from .features.detection_consistency import objectness_consistency_loss, roi_consistency_loss
from .features.feature_alignment import feature_alignment_loss
from .features.pseudo_label import pseudo_label
from .features.upsample_cross_entropy import masked_consistency_loss
from .images.resized_crop import resized_crop
from .masked.block_mask import block_mask, mask_image
from .masked.decoder_assemble import decoder_assemble
from .masked.images import patchify, unpatchify
from .masked.linear_pixel_loss import linear_pixel_loss
from .masked.masked_pixel_loss import masked_pixel_loss
from .masked.random_masking import Masking, random_masking
from .masked.visible_patch_embed import visible_patch_embed

__all__ = [
    "BACKENDS",
    "Masking",
    "OpSpec",
    "SPECS",
    "attention",
    "backend",
    "block_mask",
    "decoder_assemble",
    "feature_alignment_loss",
    "gelu",
    "linear",
    "linear_fp8",
    "linear_int8",
    "linear_pixel_loss",
    "mask_image",
    "masked_consistency_loss",
    "masked_pixel_loss",
    "mlp",
    "objectness_consistency_loss",
    "patchify",
    "pseudo_label",
    "quantize_rows",
    "random_masking",
    "residual_layer_norm",
    "resized_crop",
    "roi_consistency_loss",
    "unpatchify",
    "visible_patch_embed",
]
