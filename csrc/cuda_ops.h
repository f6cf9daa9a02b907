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

// A scalar loss from one partial sum per row: launch(partial, loss, stream).
template <class F>
void loss_on_device_of(const Tensor& loss, int64_t rows, const char* op, const F& launch) {
  float* out = dense<float>(loss, ScalarType::Float, op, "loss");
  const std::vector<int64_t> shape{rows};
  const Tensor partial = torch::stable::new_empty(loss, shape, ScalarType::Float);
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

}  // namespace fastkd
