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

struct PatchRows {
  View images;          // logical [B, C, H, W]
  View ids;             // [B, n] int64
  const float* affine;  // [2, C]: scale, shift
  int patch_height, patch_width;
  void* rows;  // contiguous [B * n, P], (channel, row, column) order
  Dtype dtype;
};

const char* visible_patch_rows(const PatchRows& op, Stream stream);

// A contiguous [rows, D] table in the dtype of the tokens, or in float32 beside 16-bit tokens; data may be nullptr.
struct Table {
  const void* data;
  bool wide;
};

struct PatchFinish {
  const void* projected;  // contiguous [B * n, D], dtype of out
  View ids;               // [B, n] int64
  const void* bias;       // [D], or nullptr
  Table pos_embed;        // [L, D]
  int64_t patches;        // L
  const void* prefix;     // [R, D], or nullptr
  View out;               // contiguous [B, R + n, D]
};

const char* visible_patch_finish(const PatchFinish& op, Stream stream);

// Sums of token rows are made in this many shares, which depend on the number of rows alone.
inline int64_t sum_shares(int64_t rows) {
  const int64_t shares = (rows + 63) / 64;
  return shares < 1 ? 1 : shares < 128 ? shares : 128;
}

// grad_out [B, R + n, D], unit stride in D. patches: contiguous [B * n, D], or nullptr. grad_bias [D], grad_prefix
// [R, D]: dtype of grad_out. partial: scratch of sum_shares(B * n) * (R + 1) * D floats.
const char* visible_patch_sums(const View& grad_out, void* patches, void* grad_bias, void* grad_prefix,
                               int64_t num_prefix, float* partial, Stream stream);

struct Assemble {
  View tokens;      // [B, R + n, D], unit stride in D
  Table fill;       // [1 or L, D]
  Table pos_embed;  // [R + L, D]
  View ids;         // [B, K] int64
  View out;         // contiguous [B, R + K, D]
  int64_t fill_rows, patches, num_prefix;
};

const char* decoder_assemble(const Assemble& op, Stream stream);

struct AssembleBackward {
  View grad_out;   // [B, R + K, D], unit stride in D
  View ids;        // [B, K] int64
  View grad_fill;  // contiguous [1 or L, D], dtype of grad_out or float32
  int64_t given, num_prefix;
};

// partial: scratch of sum_shares(B * filled rows) * D floats for one fill row; place: scratch of B * L for several.
const char* decoder_assemble_backward(const AssembleBackward& op, float* partial, int* place, Stream stream);

struct Attention {
  View query;      // [B, Tq, heads * d]; of all views the channels are contiguous
  View key_value;  // [B, T, 2 * heads * d]: keys, then values
  int heads;
};

struct AttentionGradients {
  View out;  // the upstream gradient, as `query`
  View query, key_value;
};

// out: as query; lse: contiguous [B, heads, Tq].
const char* attention(const Attention& op, const View& out, float* lse, Stream stream);
// delta: scratch of the size of lse.
const char* attention_backward(const Attention& op, const AttentionGradients& gradients, const float* lse, float* delta,
                               Stream stream);

}  // namespace fastkd::cuda
