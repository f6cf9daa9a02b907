// Glue of the CUDA library: torch tensors in, plain pointers to the launchers of cuda_api.h out.
#pragma once

#include "common.h"
#include "cuda_api.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace fastkd {

inline cuda::Dtype cuda_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cuda::Dtype::kFloat;
    case ScalarType::BFloat16: return cuda::Dtype::kBFloat16;
    case ScalarType::Half: return cuda::Dtype::kHalf;
    case ScalarType::Double: return cuda::Dtype::kDouble;
    case ScalarType::Byte: return cuda::Dtype::kByte;
    case ScalarType::Long: return cuda::Dtype::kInt64;
    default: STD_TORCH_CHECK(false, "fastkd: a tensor of this dtype does not go to a CUDA kernel");
  }
}

inline cuda::View view(const Tensor& t) {
  cuda::View v{t.data_ptr(), cuda_dtype(t), static_cast<int>(t.dim()), {}, {}};
  STD_TORCH_CHECK(t.dim() <= 4, "fastkd: a tensor of ", t.dim(), " dimensions does not go to a CUDA kernel");
  for (int i = 0; i < v.dims; ++i) {
    v.size[i] = t.size(i);
    v.stride[i] = t.stride(i);
  }
  return v;
}

// Pointer to dense elements of type T.
template <class T>
T* dense(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastkd ", op, ": ", name, " has the wrong dtype");
  check_contiguous(t, op, name);
  return mutable_data<T>(t);
}

// Runs launch(stream) with the tensor's device current, on its current stream.
template <class F>
void on_device_of(const Tensor& t, const char* op, const F& launch) {
  void* stream = nullptr;
#ifdef FASTKD_EMULATE_CUDA
  const char* error = launch(stream);
#else
  const int32_t index = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == AOTI_TORCH_SUCCESS,
                  "fastkd ", op, ": no CUDA stream on device ", index);
  const char* error = launch(stream);
#endif
  STD_TORCH_CHECK(error == nullptr, "fastkd ", op, ": ", error ? error : "");
}

inline Tensor scratch(const Tensor& like, int64_t count, ScalarType dtype) {
  const std::vector<int64_t> shape{count};
  return torch::stable::new_empty(like, shape, dtype);
}

// A scalar loss from one partial sum per row: launch(partial, loss, stream).
template <class F>
void loss_on_device_of(const Tensor& loss, int64_t rows, const char* op, const F& launch) {
  float* out = dense<float>(loss, ScalarType::Float, op, "loss");
  const Tensor partial = scratch(loss, rows, ScalarType::Float);
  on_device_of(loss, op, [&](void* stream) { return launch(mutable_data<float>(partial), out, stream); });
}

inline void random_masking(const Tensor& noise, int64_t keep, const Tensor& ids_shuffle, const Tensor& ids_restore,
                           const Tensor& mask) {
  constexpr const char* op = "random_masking";
  int64_t* shuffle = dense<int64_t>(ids_shuffle, ScalarType::Long, op, "ids_shuffle");
  int64_t* restore = dense<int64_t>(ids_restore, ScalarType::Long, op, "ids_restore");
  float* masked = dense<float>(mask, ScalarType::Float, op, "mask");
  if (noise.numel() == 0) return;
  on_device_of(noise, op, [&](void* stream) {
    return cuda::random_masking(view(noise), keep, shuffle, restore, masked, stream);
  });
}

inline void random_masking_keyed(const Tensor& keys, int64_t keep, const Tensor& ids_shuffle,
                                 const Tensor& ids_restore, const Tensor& mask) {
  constexpr const char* op = "random_masking";
  int64_t* shuffle = dense<int64_t>(ids_shuffle, ScalarType::Long, op, "ids_shuffle");
  int64_t* restore = dense<int64_t>(ids_restore, ScalarType::Long, op, "ids_restore");
  float* masked = dense<float>(mask, ScalarType::Float, op, "mask");
  FASTKD_CHECK(keys.scalar_type() == ScalarType::Long, "random_masking", "keys has the wrong dtype");
  if (mask.numel() == 0) return;
  on_device_of(keys, op, [&](void* stream) {
    return cuda::random_masking_keyed(view(keys), mask.size(1), keep, shuffle, restore, masked, stream);
  });
}

inline cuda::PixelLoss pixel_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                                  const std::optional<Tensor>& weight, const Tensor& affine,
                                  const std::vector<int64_t>& patch, bool norm_pix, double eps) {
  constexpr const char* op = "masked_pixel_loss";
  FASTKD_CHECK(ids.scalar_type() == ScalarType::Long, "masked_pixel_loss", "ids has the wrong dtype");
  return {view(pred),
          view(images),
          view(ids),
          weight ? dense<float>(*weight, ScalarType::Float, op, "weight") : nullptr,
          dense<float>(affine, ScalarType::Float, op, "affine"),
          static_cast<int>(patch[0]),
          static_cast<int>(patch[1]),
          norm_pix,
          static_cast<float>(eps)};
}

inline void masked_pixel_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                              const std::optional<Tensor>& weight, const Tensor& affine,
                              const std::vector<int64_t>& patch, bool norm_pix, double eps, const Tensor& loss) {
  const cuda::PixelLoss args = pixel_loss(pred, images, ids, weight, affine, patch, norm_pix, eps);
  loss_on_device_of(loss, args.rows(), "masked_pixel_loss", [&](float* partial, float* out, void* stream) {
    return cuda::masked_pixel_loss(args, partial, out, stream);
  });
}

inline void masked_pixel_loss_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& images,
                                       const Tensor& ids, const std::optional<Tensor>& weight, const Tensor& affine,
                                       const std::vector<int64_t>& patch, bool norm_pix, double eps,
                                       const Tensor& grad_pred) {
  constexpr const char* op = "masked_pixel_loss_backward";
  const cuda::PixelLoss args = pixel_loss(pred, images, ids, weight, affine, patch, norm_pix, eps);
  const float* upstream = dense<float>(grad_loss, ScalarType::Float, op, "grad_loss");
  void* gradient = dense<void>(grad_pred, pred.scalar_type(), op, "grad_pred");
  on_device_of(pred, op, [&](void* stream) {
    return cuda::masked_pixel_loss_backward(args, upstream, gradient, stream);
  });
}

inline cuda::Alignment alignment(const Tensor& student, const Tensor& teacher, int64_t kind, bool normalize,
                                 double beta) {
  for (int i = 0; i < 3; ++i)
    FASTKD_CHECK(student.size(i) == teacher.size(i), "feature_alignment_loss",
                 "student and teacher must have one shape");
  const double rows = static_cast<double>(student.size(0) * student.size(1));
  const Align<float> math(beta, rows, static_cast<double>(student.size(2)), static_cast<int>(kind));
  return {view(student), view(teacher), static_cast<int>(kind), normalize, math};
}

inline void feature_alignment_loss(const Tensor& student, const Tensor& teacher, int64_t kind, bool normalize,
                                   double beta, const Tensor& loss) {
  const cuda::Alignment args = alignment(student, teacher, kind, normalize, beta);
  loss_on_device_of(loss, args.rows(), "feature_alignment_loss", [&](float* partial, float* out, void* stream) {
    return cuda::feature_alignment_loss(args, partial, out, stream);
  });
}

inline void feature_alignment_loss_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                            int64_t kind, bool normalize, double beta, const Tensor& grad_student) {
  constexpr const char* op = "feature_alignment_loss_backward";
  const cuda::Alignment args = alignment(student, teacher, kind, normalize, beta);
  const float* upstream = dense<float>(grad_loss, ScalarType::Float, op, "grad_loss");
  void* gradient = dense<void>(grad_student, student.scalar_type(), op, "grad_student");
  on_device_of(student, op, [&](void* stream) {
    return cuda::feature_alignment_loss_backward(args, upstream, gradient, stream);
  });
}

inline void visible_patch_rows(const Tensor& images, const Tensor& ids, const Tensor& affine,
                               const std::vector<int64_t>& patch, const Tensor& rows) {
  constexpr const char* op = "visible_patch_rows";
  check_contiguous(rows, op, "rows");
  FASTKD_CHECK(ids.scalar_type() == ScalarType::Long, "visible_patch_rows", "ids has the wrong dtype");
  const cuda::PatchRows args{view(images),
                             view(ids),
                             dense<float>(affine, ScalarType::Float, op, "affine"),
                             static_cast<int>(patch[0]),
                             static_cast<int>(patch[1]),
                             rows.mutable_data_ptr(),
                             cuda_dtype(rows)};
  if (rows.numel() == 0) return;
  on_device_of(rows, op, [&](void* stream) { return cuda::visible_patch_rows(args, stream); });
}

// A table of rows beside tokens of some dtype.
inline cuda::Table table(const std::optional<Tensor>& t, ScalarType tokens, const char* op, const char* name) {
  if (!t) return {nullptr, false};
  STD_TORCH_CHECK(t->scalar_type() == tokens || t->scalar_type() == ScalarType::Float, "fastkd ", op, ": ", name,
                  " has the wrong dtype");
  check_contiguous(*t, op, name);
  return {t->const_data_ptr(), t->scalar_type() != tokens};
}

inline void visible_patch_finish(const Tensor& projected, const Tensor& ids, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& pos_embed, const std::optional<Tensor>& prefix,
                                 const Tensor& out) {
  constexpr const char* op = "visible_patch_finish";
  const ScalarType dtype = out.scalar_type();
  check_contiguous(out, op, "out");
  FASTKD_CHECK(ids.scalar_type() == ScalarType::Long, "visible_patch_finish", "ids has the wrong dtype");
  const cuda::PatchFinish args{dense<void>(projected, dtype, op, "projected"),
                               view(ids),
                               bias ? dense<void>(*bias, dtype, op, "bias") : nullptr,
                               table(pos_embed, dtype, op, "pos_embed"),
                               pos_embed ? pos_embed->size(0) : 0,
                               prefix ? dense<void>(*prefix, dtype, op, "prefix") : nullptr,
                               view(out)};
  if (out.numel() == 0) return;
  on_device_of(out, op, [&](void* stream) { return cuda::visible_patch_finish(args, stream); });
}

inline void visible_patch_sums(const Tensor& grad_out, const std::optional<Tensor>& patches, const Tensor& grad_bias,
                               const Tensor& grad_prefix) {
  constexpr const char* op = "visible_patch_sums";
  const ScalarType dtype = grad_out.scalar_type();
  const int64_t prefix = grad_prefix.size(0), rows = grad_out.size(0) * (grad_out.size(1) - prefix);
  void* copy = patches ? dense<void>(*patches, dtype, op, "patches") : nullptr;
  void* bias = dense<void>(grad_bias, dtype, op, "grad_bias");
  void* head = dense<void>(grad_prefix, dtype, op, "grad_prefix");
  const int64_t size = cuda::sum_shares(rows) * (prefix + 1) * grad_out.size(2);
  const Tensor partial = scratch(grad_out, size, ScalarType::Float);
  on_device_of(grad_out, op, [&](void* stream) {
    return cuda::visible_patch_sums(view(grad_out), copy, bias, head, prefix, mutable_data<float>(partial), stream);
  });
}

inline void decoder_assemble(const Tensor& tokens, const Tensor& fill, const std::optional<Tensor>& pos_embed,
                             const Tensor& ids, int64_t num_prefix, const Tensor& out) {
  constexpr const char* op = "decoder_assemble";
  const ScalarType dtype = out.scalar_type();
  check_contiguous(out, op, "out");
  FASTKD_CHECK(tokens.scalar_type() == dtype, "decoder_assemble", "tokens has the wrong dtype");
  FASTKD_CHECK(ids.scalar_type() == ScalarType::Long, "decoder_assemble", "ids has the wrong dtype");
  const int64_t patches = pos_embed ? pos_embed->size(0) - num_prefix : fill.size(0) > 1 ? fill.size(0) : INT64_MAX;
  const cuda::Assemble args{view(tokens), table(fill, dtype, op, "fill"), table(pos_embed, dtype, op, "pos_embed"),
                            view(ids),    view(out), fill.size(0), patches, num_prefix};
  if (out.numel() == 0) return;
  on_device_of(out, op, [&](void* stream) { return cuda::decoder_assemble(args, stream); });
}

inline void decoder_assemble_backward(const Tensor& grad_out, const Tensor& ids, int64_t given, int64_t num_prefix,
                                      const Tensor& grad_fill) {
  constexpr const char* op = "decoder_assemble_backward";
  check_contiguous(grad_fill, op, "grad_fill");
  FASTKD_CHECK(ids.scalar_type() == ScalarType::Long, "decoder_assemble_backward", "ids has the wrong dtype");
  const cuda::AssembleBackward args{view(grad_out), view(ids), view(grad_fill), given, num_prefix};
  const int64_t batch = grad_out.size(0), filled = grad_out.size(1) - given, rows = grad_fill.size(0);
  if (grad_fill.numel() == 0) return;
  const int64_t partial_size = rows == 1 ? cuda::sum_shares(batch * filled) * grad_out.size(2) : 0;
  const Tensor partial = scratch(grad_out, partial_size, ScalarType::Float);
  const Tensor place = scratch(grad_out, rows == 1 ? 0 : batch * rows, ScalarType::Int);
  on_device_of(grad_out, op, [&](void* stream) {
    return cuda::decoder_assemble_backward(args, mutable_data<float>(partial), mutable_data<int>(place), stream);
  });
}

// Rows of heads: what the kernels do not find out by themselves.
inline cuda::View head_rows(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && (t.stride(2) == 1 || t.size(2) == 1 || t.numel() == 0), "fastkd ", op,
                  ": ", name, " must have the dtype of query and contiguous channels");
  return view(t);
}

inline cuda::Attention attention_inputs(const Tensor& query, const Tensor& key_value, int64_t heads, const char* op) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(key_value.size(0) == query.size(0) && key_value.size(2) == 2 * query.size(2) &&
                      query.size(2) % heads == 0,
                  "fastkd ", op, ": shapes do not fit");
  return {head_rows(query, dtype, op, "query"), head_rows(key_value, dtype, op, "key_value"), static_cast<int>(heads)};
}

inline void attention(const Tensor& query, const Tensor& key_value, int64_t heads, const Tensor& out,
                      const Tensor& lse) {
  constexpr const char* op = "attention";
  const cuda::Attention args = attention_inputs(query, key_value, heads, op);
  const cuda::View result = head_rows(out, query.scalar_type(), op, "out");
  float* log_sums = dense<float>(lse, ScalarType::Float, op, "lse");
  if (out.numel() == 0) return;
  on_device_of(out, op, [&](void* stream) { return cuda::attention(args, result, log_sums, stream); });
}

inline void attention_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key_value, const Tensor& lse,
                               int64_t heads, const Tensor& grad_query, const Tensor& grad_key_value) {
  constexpr const char* op = "attention_backward";
  const ScalarType dtype = query.scalar_type();
  const cuda::Attention args = attention_inputs(query, key_value, heads, op);
  const cuda::AttentionGradients gradients{head_rows(grad_out, dtype, op, "grad_out"),
                                           head_rows(grad_query, dtype, op, "grad_query"),
                                           head_rows(grad_key_value, dtype, op, "grad_key_value")};
  const float* log_sums = dense<float>(lse, ScalarType::Float, op, "lse");
  if (key_value.numel() == 0) return;
  const Tensor delta = scratch(lse, lse.numel(), ScalarType::Float);
  on_device_of(query, op, [&](void* stream) {
    return cuda::attention_backward(args, gradients, log_sums, mutable_data<float>(delta), stream);
  });
}

}  // namespace fastkd
