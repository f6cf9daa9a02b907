// What all CUDA kernels of attention share: those on tensor cores (attention.cu, attention_backward.cu), and those of
// attention_rows.cu for what does not fit there.
#pragma once

#include "cuda_rows.cuh"

namespace fastkd::cuda {

constexpr float kLog2e = 1.44269504f;

// One of q, k, v ...: row t of head h of image b starts at data + b * image + t * row + h * dim.
template <class T>
struct Heads {
  T* data;
  int64_t image, row;

  // `part` steps over the heads * dim channels of a projection: v lies behind k.
  Heads(const View& v, int64_t channels, int part)
      : data(static_cast<T*>(v.data) + channels * part), image(v.stride[0]), row(v.stride[1]) {}

  bool aligned() const {
    const auto fits = [](int64_t elements) { return elements * int64_t{sizeof(T)} % 16 == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(image) && fits(row);
  }
};

struct AttentionShape {
  int images, heads, queries, keys, dim;
  float scale;

  explicit AttentionShape(const Attention& op)
      : images(op.query.size[0]), heads(op.heads), queries(op.query.size[1]), keys(op.key_value.size[1]),
        dim(op.query.size[2] / op.heads), scale(1.0f / std::sqrt(static_cast<float>(dim))) {}
  int64_t channels() const { return int64_t{heads} * dim; }
  __host__ __device__ int count() const { return images * heads; }

  template <class T>
  __device__ __forceinline__ T* rows(const Heads<T>& x, int head) const {
    return x.data + head / heads * x.image + static_cast<int64_t>(head % heads) * dim;
  }
};

// The tensors of both passes.
template <class T>
struct AttentionTensors {
  Heads<T> query, key, value;

  AttentionTensors(const Attention& op, int64_t channels)
      : query(op.query, channels, 0), key(op.key_value, channels, 0), value(op.key_value, channels, 1) {}
  bool aligned() const { return query.aligned() && key.aligned() && value.aligned(); }
};

// attention_rows.cu: any sizes and strides up to 256 channels a head, products by plain float32 arithmetic.
const char* attention_by_rows(const Attention& op, const View& out, float* lse, Stream stream);
const char* attention_backward_by_rows(const Attention& op, const AttentionGradients& gradients, const float* lse,
                                       float* delta, Stream stream);

}  // namespace fastkd::cuda
