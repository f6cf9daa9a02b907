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
from .features.cls_distillation import cls_distillation_loss
from .features.crd_nce_loss import crd_nce_loss, crd_normaliser
from .features.detection_consistency import objectness_consistency_loss, roi_consistency_loss
from .features.dual_view import DualViewTarget, dual_view_loss, dual_view_target, remove_dc
from .features.feature_alignment import feature_alignment_loss
from .features.gather_whiten import gather_whiten_smooth_l1, teacher_targets
from .features.hint_loss import hint_loss
from .features.layer_mix import layer_mix
from .features.pkt_loss import pkt_loss
from .features.pseudo_label import pseudo_label
from .features.rkd_loss import rkd_loss
from .features.sp_loss import sp_loss
from .features.upsample_cross_entropy import masked_consistency_loss
from .images.resized_crop import resized_crop
from .logits import linear_specs as _linear_specs  # noqa: F401
from .logits import spec as _logit_loss_spec  # noqa: F401
from .logits.class_vectors import class_vector_kd
from .logits.cosine import logit_cosine_loss
from .logits.dist import dist_loss
from .logits.linear_losses import fused_linear_jsd, linear_cross_entropy, linear_jsd, linear_kl
from .logits.losses import Shared, dkd_loss, jsd_loss, kd_loss, logit_loss, nkd_loss, reverse_kl_loss, tvd_loss
from .logits.standardise import logit_standardization, standardized_kd_loss
from .logits.uskd import uskd_loss
from .masked.attention_masking import attention_masking, cls_attention_row
from .masked.block_mask import block_mask, mask_image
from .masked.decoder_assemble import decoder_assemble
from .masked.images import patchify, unpatchify
from .masked.linear_pixel_loss import linear_pixel_loss
from .masked.masked_pixel_loss import masked_pixel_loss
from .masked.random_masking import Masking, random_masking
from .masked.visible_patch_embed import visible_patch_embed
from .weights.ema_update import ema_update_

__all__ = [
    "BACKENDS",
    "DualViewTarget",
    "Masking",
    "OpSpec",
    "SPECS",
    "Shared",
    "at_loss",
    "attention",
    "attention_masking",
    "backend",
    "block_mask",
    "class_vector_kd",
    "cls_attention_row",
    "cls_distillation_loss",
    "crd_nce_loss",
    "crd_normaliser",
    "decoder_assemble",
    "dist_loss",
    "dkd_loss",
    "dual_view_loss",
    "dual_view_target",
    "ema_update_",
    "feature_alignment_loss",
    "fused_linear_jsd",
    "gather_whiten_smooth_l1",
    "gelu",
    "hint_loss",
    "jsd_loss",
    "kd_loss",
    "layer_mix",
    "linear",
    "linear_cross_entropy",
    "linear_fp8",
    "linear_int8",
    "linear_jsd",
    "linear_kl",
    "linear_pixel_loss",
    "logit_cosine_loss",
    "logit_loss",
    "logit_standardization",
    "mask_image",
    "masked_consistency_loss",
    "masked_pixel_loss",
    "mlp",
    "nkd_loss",
    "objectness_consistency_loss",
    "patchify",
    "pkt_loss",
    "pseudo_label",
    "quantize_rows",
    "random_masking",
    "remove_dc",
    "residual_layer_norm",
    "resized_crop",
    "reverse_kl_loss",
    "rkd_loss",
    "roi_consistency_loss",
    "sp_loss",
    "standardized_kd_loss",
    "teacher_targets",
    "tvd_loss",
    "unpatchify",
    "uskd_loss",
    "visible_patch_embed",
]
