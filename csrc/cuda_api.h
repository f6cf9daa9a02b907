// The border between the CUDA kernels (csrc/*.cu, which see no torch) and their glue (cuda_ops.h, which sees no CUDA).
// Every launcher returns nullptr, or what the CUDA runtime says went wrong.
#pragma once

#include "align_math.h"

#include <cstdint>

namespace fastkd::cuda {

enum class Dtype : int { kFloat, kBFloat16, kHalf, kDouble, kByte, kInt64 };

inline int size_of(Dtype dtype) {
  constexpr int sizes[] = {4, 2, 2, 8, 1, 8};
  return sizes[static_cast<int>(dtype)];
}

// A tensor of up to 4 dimensions: strides count elements.
struct View {
  void* data;
  Dtype dtype;
  int dims;
  int64_t size[4], stride[4];
};

using Stream = void*;  // cudaStream_t

// noise [B, L]; ids_shuffle, ids_restore, mask: contiguous [B, L].
const char* random_masking(const View& noise, int64_t keep, int64_t* ids_shuffle, int64_t* ids_restore, float* mask,
                           Stream stream);

// The same with noise drawn from keys: [B] int64.
const char* random_masking_keyed(const View& keys, int64_t patches, int64_t keep, int64_t* ids_shuffle,
                                 int64_t* ids_restore, float* mask, Stream stream);

struct PixelLoss {
  View pred;            // [B, K, P], P = patch height * patch width * C
  View images;          // logical [B, C, H, W]
  View ids;             // [B, K] int64
  const float* weight;  // contiguous [B, K], or nullptr: 1 / (B * K)
  const float* affine;  // [2, C]: scale, shift
  int patch_height, patch_width;
  bool norm_pix;
  float eps;

  int64_t rows() const { return pred.size[0] * pred.size[1]; }
};

// partial: scratch of rows() floats; loss: one float.
const char* masked_pixel_loss(const PixelLoss& op, float* partial, float* loss, Stream stream);
// grad_pred: contiguous [B, K, P], dtype of pred.
const char* masked_pixel_loss_backward(const PixelLoss& op, const float* grad_loss, void* grad_pred, Stream stream);

struct Alignment {
  View student, teacher;  // [B, T, D]
  int kind;               // AlignLoss
  bool normalize;
  Align<float> math;

  int64_t rows() const { return student.size[0] * student.size[1]; }
};

const char* feature_alignment_loss(const Alignment& op, float* partial, float* loss, Stream stream);
// grad_student: contiguous [B, T, D], dtype of student.
const char* feature_alignment_loss_backward(const Alignment& op, const float* grad_loss, void* grad_student,
                                            Stream stream);

}  // namespace fastkd::cuda
