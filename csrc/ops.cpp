// Every native op in one list. The same list serves two libraries:
//   fastkd_cpu   this file includes the kernels (csrc/<op>.cpp), one compile per CPU variant
//   fastkd_cuda  built with FASTKD_CUDA; the kernels are in csrc/<op>.cu
// Outputs are allocated by the caller and filled: hence (a!) and no return values.
#include "common.h"

#ifdef FASTKD_CUDA
#include "cuda_ops.h"
#else
#include "block_mask.cpp"
#include "random_masking.cpp"
#include "masked_pixel_loss.cpp"
#include "visible_patch_embed.cpp"
#include "decoder_assemble.cpp"
#include "dist_loss.cpp"
#include "dual_view.cpp"
#include "feature_alignment.cpp"
#include "at_loss.cpp"
#include "attention.cpp"
#include "class_vectors.cpp"
#include "column_sum.cpp"
#include "crd_nce_loss.cpp"
#include "ema_update.cpp"
#include "gather_whiten.cpp"
#include "gelu.cpp"
#include "layer_mix.cpp"
#include "linear.cpp"
#include "linear_int8.cpp"
#include "linear_loss.cpp"
#include "linear_pixel_loss.cpp"
#include "logit_loss.cpp"
#include "logit_standardization.cpp"
#include "mlp.cpp"
#include "pseudo_label.cpp"
#include "residual_layer_norm.cpp"
#include "resized_crop.cpp"
#include "rkd_loss.cpp"
#include "uskd_loss.cpp"
#include "upsample_cross_entropy.cpp"
#endif

namespace fastkd {

#if defined(FASTKD_EMULATE_CUDA)  // the CUDA library on CPU tensors: tests/test_cuda_emulation.py
#define FASTKD_LIBRARY fastkd_emulated
#define FASTKD_DEVICE CPU
#elif defined(FASTKD_CUDA)
#define FASTKD_LIBRARY fastkd_cuda
#define FASTKD_DEVICE CUDA
#else
#define FASTKD_LIBRARY fastkd_cpu
#define FASTKD_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY(FASTKD_LIBRARY, m) {
  m.def("random_masking(Tensor noise, int keep, Tensor(a!) ids_shuffle, Tensor(b!) ids_restore, Tensor(c!) mask) -> ()");
  m.def("random_masking_keyed(Tensor keys, int keep, Tensor(a!) ids_shuffle, Tensor(b!) ids_restore, Tensor(c!) mask) "
        "-> ()");
  m.def("masked_pixel_loss(Tensor pred, Tensor images, Tensor ids, Tensor? weight, Tensor affine, int[] patch, "
        "bool norm_pix, float eps, Tensor(a!) loss) -> ()");
  m.def("masked_pixel_loss_backward(Tensor grad_loss, Tensor pred, Tensor images, Tensor ids, Tensor? weight, "
        "Tensor affine, int[] patch, bool norm_pix, float eps, Tensor(a!) grad_pred) -> ()");
  m.def("feature_alignment_loss(Tensor student, Tensor teacher, int kind, bool normalize, float beta, "
        "Tensor(a!) loss) -> ()");
  m.def("feature_alignment_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, int kind, bool normalize, "
        "float beta, Tensor(a!) grad_student) -> ()");
  m.def("visible_patch_rows(Tensor images, Tensor ids, Tensor affine, int[] patch, Tensor(a!) rows) -> ()");
  m.def("visible_patch_finish(Tensor projected, Tensor ids, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
        "Tensor(a!) out) -> ()");
  m.def("visible_patch_sums(Tensor grad_out, Tensor(a!)? patches, Tensor(b!) grad_bias, Tensor(c!) grad_prefix) -> ()");
  m.def("decoder_assemble(Tensor tokens, Tensor fill, Tensor? pos_embed, Tensor ids, int num_prefix, Tensor(a!) out) "
        "-> ()");
  m.def("decoder_assemble_backward(Tensor grad_out, Tensor ids, int given, int num_prefix, Tensor(a!) grad_fill) -> ()");
  m.def("attention(Tensor query, Tensor key_value, int num_heads, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor grad_out, Tensor query, Tensor key_value, Tensor lse, int num_heads, "
        "Tensor(a!) grad_query, Tensor(b!) grad_key_value) -> ()");
#ifndef FASTKD_CUDA
  m.def("at_loss(Tensor student, Tensor teacher, float p, bool paper, Tensor(a!) loss, Tensor(b!) q) -> ()");
  m.def("at_loss_backward(Tensor grad_loss, Tensor student, Tensor q, float p, Tensor(a!) grad_student) -> ()");
  m.def("column_sum(Tensor x, Tensor(a!) out) -> ()");
  m.def("crd_nce_loss(Tensor feature, Tensor bank, Tensor index, Tensor shift, float temperature, float constant, "
        "Tensor(a!) grad_feature, Tensor(b!) loss) -> ()");
  m.def("dual_view_target(Tensor teacher, Tensor(a!) mean, Tensor(b!) inverse_norms) -> ()");
  m.def("dual_view_loss(Tensor plain, Tensor? alt, Tensor teacher, Tensor teacher_mean, Tensor teacher_inverse, "
        "float alpha_plain, float alpha_alt, Tensor(a!) mean, Tensor(b!) rows, Tensor(c!) losses) -> ()");
  m.def("dual_view_loss_backward(Tensor grad_losses, Tensor plain, Tensor? alt, Tensor teacher, Tensor teacher_mean, "
        "Tensor teacher_inverse, Tensor mean, Tensor rows, float alpha_plain, float alpha_alt, Tensor(a!)? grad_alt, "
        "Tensor(b!) grad_plain) -> ()");
  m.def("ema_update_(Tensor(a!)[] averaged, Tensor[] current, Tensor weight) -> ()");
  m.def("has_amx() -> bool");
  m.def("gather_whiten_smooth_l1(Tensor student, Tensor teacher, Tensor ids, Tensor? statistics, int norm, int kind, "
        "int num_prefix, Tensor(a!) loss) -> ()");
  m.def("gather_whiten_smooth_l1_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor ids, "
        "Tensor? statistics, int norm, int kind, int num_prefix, Tensor(a!) grad_student) -> ()");
  m.def("layer_mix(Tensor[] states, Tensor weight, Tensor(a!)[] mixed) -> ()");
  m.def("layer_mix_backward(Tensor[] grads, Tensor[] states, Tensor weight, Tensor(a!)[] grad_states, "
        "Tensor(b!) grad_weight) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_grad_input(Tensor grad, Tensor weight, Tensor(a!) out) -> ()");
  m.def("linear_grad_weight(Tensor grad, Tensor x, Tensor(a!) grad_weight, Tensor(b!)? grad_bias) -> ()");
  m.def("linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor? bias, bool gelu, Tensor(a!) out) -> ()");
  m.def("linear_wide(Tensor x, Tensor weight, Tensor? bias, float scale, Tensor(a!) out) -> ()");
  m.def("linear_wide_grad_input(Tensor grad, Tensor weight, Tensor(a!) out) -> ()");
  m.def("linear_wide_grad_weight(Tensor grad, Tensor x, bool first, Tensor(a!) grad_weight) -> ()");
  m.def("row_log_sum_exp(Tensor z, Tensor(a!) lse) -> ()");
  m.def("row_softmax(Tensor z, Tensor lse, Tensor factor, Tensor(a!) grad) -> ()");
  m.def("unit_rows(Tensor x, float scale, Tensor(a!) out, Tensor(b!) norms) -> ()");
  m.def("unit_rows_backward(Tensor grad, Tensor unit, Tensor norms, float scale, float factor, Tensor(a!) grad_x) -> ()");
  m.def("linear_pixel_loss(Tensor x, Tensor weight, Tensor? bias, Tensor images, Tensor ids, Tensor affine, int[] patch, "
        "bool norm_pix, float eps, float unit, Tensor(a!) loss, Tensor(b!) residual) -> ()");
  m.def("pixel_residual(Tensor? bias, Tensor images, Tensor ids, Tensor affine, int[] patch, bool norm_pix, float eps, "
        "float unit, Tensor(a!) loss, Tensor(b!) residual) -> ()");
  m.def("mask_image(Tensor images, Tensor keep, Tensor(a!) out) -> ()");
  m.def("masked_consistency_loss(Tensor logits, Tensor label, Tensor? weight, int ignore_index, Tensor(a!) lse, "
        "Tensor(b!) loss) -> ()");
  m.def("masked_consistency_loss_backward(Tensor grad_loss, Tensor logits, Tensor label, Tensor? weight, "
        "int ignore_index, Tensor lse, Tensor(a!) grad_logits) -> ()");
  m.def("logit_loss(Tensor student, Tensor? teacher, Tensor? index, Tensor? scores, Tensor? weight, "
        "Tensor? sample_weight, Tensor? items, float[] terms, int ignore_index, float fixed, Tensor(a!) loss, "
        "Tensor(b!) divisors, Tensor(c!)? grad) -> ()");
  m.def("logit_loss_backward(Tensor grad_loss, Tensor saved, Tensor divisors, Tensor(a!) grad) -> ()");
  m.def("mlp_hidden(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? hidden, Tensor(b!) activation) -> ()");
  m.def("mlp_hidden_backward(Tensor grad, Tensor weight, Tensor hidden, Tensor(a!) grad_hidden) -> ()");
  m.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  m.def("pseudo_label(Tensor logits, float threshold, Tensor(a!) label, Tensor(b!) count, Tensor(c!) prob) -> ()");
  m.def("gelu_backward(Tensor grad_out, Tensor x, Tensor(a!) grad_x) -> ()");
  m.def("residual_layer_norm(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, Tensor(a!) total, "
        "Tensor(b!) stats, Tensor(c!) normed) -> ()");
  m.def("residual_layer_norm_backward(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor weight, "
        "Tensor stats, Tensor(a!) grad_weight, Tensor(b!) grad_bias, Tensor(c!)? grad_delta, Tensor(d!) grad_x) -> ()");
  m.def("resized_crop(Tensor pixels, Tensor offsets, Tensor sizes, Tensor boxes, Tensor flip, int[] max_box, "
        "Tensor(a!) out) -> ()");
  m.def("rkd_loss(Tensor student, Tensor teacher, float distance_weight, float angle_weight, bool squared, float eps, "
        "Tensor(a!) laplacian, Tensor(b!) loss) -> ()");
  m.def("dist_loss(Tensor student, Tensor teacher, float beta, float gamma, float temperature, float eps, "
        "Tensor(a!) grad_student, Tensor(b!) grad_teacher, Tensor(c!) loss) -> ()");
  m.def("logit_standardization(Tensor x, float eps, Tensor(a!) y) -> ()");
  m.def("logit_standardization_backward(Tensor grad_y, Tensor x, float eps, Tensor(a!) grad_x) -> ()");
  m.def("uskd_loss_rows(Tensor student, Tensor weak, Tensor target, int ignore_index, Tensor(a!) stats) -> ()");
  m.def("uskd_loss(Tensor student, Tensor weak, Tensor target, Tensor stats, Tensor sums, Tensor means, float alpha, "
        "float beta, float mu, float ce_weight, int rank_score, Tensor(a!) grad_student, Tensor(b!) grad_weak, "
        "Tensor(c!) loss) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_DEVICE, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking));
  m.impl("random_masking_keyed", TORCH_BOX(&random_masking_keyed));
  m.impl("masked_pixel_loss", TORCH_BOX(&masked_pixel_loss));
  m.impl("masked_pixel_loss_backward", TORCH_BOX(&masked_pixel_loss_backward));
  m.impl("feature_alignment_loss", TORCH_BOX(&feature_alignment_loss));
  m.impl("feature_alignment_loss_backward", TORCH_BOX(&feature_alignment_loss_backward));
  m.impl("visible_patch_rows", TORCH_BOX(&visible_patch_rows));
  m.impl("visible_patch_finish", TORCH_BOX(&visible_patch_finish));
  m.impl("visible_patch_sums", TORCH_BOX(&visible_patch_sums));
  m.impl("decoder_assemble", TORCH_BOX(&decoder_assemble));
  m.impl("decoder_assemble_backward", TORCH_BOX(&decoder_assemble_backward));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
#ifndef FASTKD_CUDA
  m.impl("at_loss", TORCH_BOX(&at_loss));
  m.impl("at_loss_backward", TORCH_BOX(&at_loss_backward));
  m.impl("column_sum", TORCH_BOX(&column_sum));
  m.impl("crd_nce_loss", TORCH_BOX(&crd_nce_loss));
  m.impl("dual_view_target", TORCH_BOX(&dual_view_target));
  m.impl("dual_view_loss", TORCH_BOX(&dual_view_loss));
  m.impl("dual_view_loss_backward", TORCH_BOX(&dual_view_loss_backward));
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
  m.impl("gather_whiten_smooth_l1", TORCH_BOX(&gather_whiten_smooth_l1));
  m.impl("gather_whiten_smooth_l1_backward", TORCH_BOX(&gather_whiten_smooth_l1_backward));
  m.impl("layer_mix", TORCH_BOX(&layer_mix));
  m.impl("layer_mix_backward", TORCH_BOX(&layer_mix_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  m.impl("linear_grad_weight", TORCH_BOX(&linear_grad_weight));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_wide", TORCH_BOX(&linear_wide));
  m.impl("linear_wide_grad_input", TORCH_BOX(&linear_wide_grad_input));
  m.impl("linear_wide_grad_weight", TORCH_BOX(&linear_wide_grad_weight));
  m.impl("row_log_sum_exp", TORCH_BOX(&row_log_sum_exp));
  m.impl("row_softmax", TORCH_BOX(&row_softmax));
  m.impl("unit_rows", TORCH_BOX(&unit_rows));
  m.impl("unit_rows_backward", TORCH_BOX(&unit_rows_backward));
  m.impl("linear_pixel_loss", TORCH_BOX(&linear_pixel_loss));
  m.impl("pixel_residual", TORCH_BOX(&pixel_residual));
  m.impl("mask_image", TORCH_BOX(&mask_image));
  m.impl("masked_consistency_loss", TORCH_BOX(&masked_consistency_loss));
  m.impl("masked_consistency_loss_backward", TORCH_BOX(&masked_consistency_loss_backward));
  m.impl("logit_loss", TORCH_BOX(&logit_loss));
  m.impl("logit_loss_backward", TORCH_BOX(&logit_loss_backward));
  m.impl("mlp_hidden", TORCH_BOX(&mlp_hidden));
  m.impl("mlp_hidden_backward", TORCH_BOX(&mlp_hidden_backward));
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("pseudo_label", TORCH_BOX(&pseudo_label));
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&residual_layer_norm_backward));
  m.impl("resized_crop", TORCH_BOX(&resized_crop));
  m.impl("rkd_loss", TORCH_BOX(&rkd_loss));
  m.impl("dist_loss", TORCH_BOX(&dist_loss));
  m.impl("logit_standardization", TORCH_BOX(&logit_standardization));
  m.impl("logit_standardization_backward", TORCH_BOX(&logit_standardization_backward));
  m.impl("uskd_loss_rows", TORCH_BOX(&uskd_loss_rows));
  m.impl("uskd_loss", TORCH_BOX(&uskd_loss));
#endif
}

#ifndef FASTKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, CompositeExplicitAutograd, m) { m.impl("has_amx", TORCH_BOX(&has_amx)); }
#endif

}  // namespace fastkd
