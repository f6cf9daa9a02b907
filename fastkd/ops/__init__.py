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
from .features.feature_alignment import feature_alignment_loss
from .images.resized_crop import resized_crop
from .logits import linear_specs  # noqa: F401
from .logits import spec as _logit_loss_spec  # noqa: F401
from .logits.class_vectors import class_vector_kd
from .logits.linear_losses import fused_linear_jsd, linear_cross_entropy, linear_jsd, linear_kl
from .logits.losses import dkd_loss, jsd_loss, kd_loss, logit_loss, nkd_loss, reverse_kl_loss, tvd_loss
from .logits.cosine import logit_cosine_loss
from .logits.dist import dist_loss
from .logits.standardise import logit_standardization, standardized_kd_loss
from .logits.uskd import uskd_loss
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
    "attention",
    "backend",
    "class_vector_kd",
    "decoder_assemble",
    "dkd_loss",
    "ema_update_",
    "dist_loss",
    "feature_alignment_loss",
    "fused_linear_jsd",
    "gelu",
    "jsd_loss",
    "kd_loss",
    "linear",
    "linear_cross_entropy",
    "linear_fp8",
    "linear_int8",
    "linear_jsd",
    "linear_kl",
    "linear_pixel_loss",
    "logit_loss",
    "logit_cosine_loss",
    "logit_standardization",
    "masked_pixel_loss",
    "mlp",
    "nkd_loss",
    "patchify",
    "quantize_rows",
    "random_masking",
    "residual_layer_norm",
    "resized_crop",
    "reverse_kl_loss",
    "tvd_loss",
    "standardized_kd_loss",
    "unpatchify",
    "uskd_loss",
    "visible_patch_embed",
]
