// Attention of any size and stride: a warp takes one query row, or in the backward pass one key row, and goes through
// the rows of the other side; float32 arithmetic, sums in a fixed order. The scores are made again wherever they are
// needed, so nothing of size T x T exists.
#include "cuda_attention.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kRowsABlock = 4, kShare = 8, kMostDim = 32 * kShare;

using Channels = float[kShare];  // channel 32 i + lane of a row

template <class T>
__device__ __forceinline__ void read(Channels& x, const T* row, int dim) {
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int c = 32 * i + threadIdx.x;
    x[i] = c < dim ? to_float(row[c]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void write(T* row, const Channels& x, int dim, float factor) {
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int c = 32 * i + threadIdx.x;
    if (c < dim) row[c] = from_float<T>(x[i] * factor);
  }
}

__device__ __forceinline__ void add(Channels& sum, float factor, const Channels& x) {
#pragma unroll
  for (int i = 0; i < kShare; ++i) sum[i] += factor * x[i];
}

__device__ __forceinline__ float dot(const Channels& x, const Channels& y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) sum += x[i] * y[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(32 * kRowsABlock)
    forward_kernel(AttentionTensors<T> x, Heads<T> out, float* lse, const AttentionShape s) {
  const int64_t task = int64_t{blockIdx.x} * kRowsABlock + threadIdx.y;
  if (task >= int64_t{s.count()} * s.queries) return;  // whole warps
  const int head = task / s.queries, row = task % s.queries;
  const T *keys = s.rows(x.key, head), *values = s.rows(x.value, head);
  Channels query, other, sum = {};
  read(query, s.rows(x.query, head) + row * x.query.row, s.dim);
  float top = -INFINITY, total = 0;
  for (int j = 0; j < s.keys; ++j) {
    read(other, keys + j * x.key.row, s.dim);
    const float score = dot(query, other) * s.scale;
    if (score > top) {  // the same in all lanes; what was summed is scaled to the new maximum
      const float factor = expf(top - score);
      total *= factor;
#pragma unroll
      for (int i = 0; i < kShare; ++i) sum[i] *= factor;
      top = score;
    }
    const float weight = expf(score - top);
    total += weight;
    read(other, values + j * x.value.row, s.dim);
    add(sum, weight, other);
  }
  write(s.rows(out, head) + row * out.row, sum, s.dim, 1 / total);
  if (threadIdx.x == 0) lse[task] = top + logf(total);
}

template <class T>
__global__ void __launch_bounds__(32 * kRowsABlock)
    query_kernel(AttentionTensors<T> x, Heads<T> grad_out, Heads<T> grad_query, const float* lse, float* deltas,
                 const AttentionShape s) {
  const int64_t task = int64_t{blockIdx.x} * kRowsABlock + threadIdx.y;
  if (task >= int64_t{s.count()} * s.queries) return;
  const int head = task / s.queries, row = task % s.queries;
  const T *keys = s.rows(x.key, head), *values = s.rows(x.value, head);
  Channels query, grad, key, value, sum = {};
  read(query, s.rows(x.query, head) + row * x.query.row, s.dim);
  read(grad, s.rows(grad_out, head) + row * grad_out.row, s.dim);
  const float log_sum = lse[task];
  float weighted = 0, total = 0, delta = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    for (int j = 0; j < s.keys; ++j) {
      read(key, keys + j * x.key.row, s.dim);
      read(value, values + j * x.value.row, s.dim);
      const float weight = expf(dot(query, key) * s.scale - log_sum), slope = dot(grad, value);
      if (pass == 0) {
        weighted += weight * slope;
        total += weight;
      } else {
        add(sum, weight * (slope - delta), key);
      }
    }
    delta = weighted / total;
  }
  write(s.rows(grad_query, head) + row * grad_query.row, sum, s.dim, s.scale);
  if (threadIdx.x == 0) deltas[task] = delta;
}

template <class T>
__global__ void __launch_bounds__(32 * kRowsABlock)
    key_kernel(AttentionTensors<T> x, Heads<T> grad_out, Heads<T> grad_key, Heads<T> grad_value, const float* lse,
               const float* deltas, const AttentionShape s) {
  const int64_t task = int64_t{blockIdx.x} * kRowsABlock + threadIdx.y;
  if (task >= int64_t{s.count()} * s.keys) return;
  const int head = task / s.keys, row = task % s.keys;
  const T *queries = s.rows(x.query, head), *grads = s.rows(grad_out, head);
  Channels key, value, query, grad, key_sum = {}, value_sum = {};
  read(key, s.rows(x.key, head) + row * x.key.row, s.dim);
  read(value, s.rows(x.value, head) + row * x.value.row, s.dim);
  for (int i = 0; i < s.queries; ++i) {
    const int64_t at = int64_t{head} * s.queries + i;
    read(query, queries + i * x.query.row, s.dim);
    read(grad, grads + i * grad_out.row, s.dim);
    const float weight = expf(dot(query, key) * s.scale - lse[at]);
    add(value_sum, weight, grad);
    add(key_sum, weight * (dot(grad, value) - deltas[at]), query);
  }
  write(s.rows(grad_key, head) + row * grad_key.row, key_sum, s.dim, s.scale);
  write(s.rows(grad_value, head) + row * grad_value.row, value_sum, s.dim, 1.0f);
}

Geometry geometry(int64_t rows) {
  return {dim3(static_cast<unsigned>((rows + kRowsABlock - 1) / kRowsABlock)), dim3(32, kRowsABlock)};
}

constexpr const char* kTooWide = "more than 256 channels a head";

}  // namespace

const char* attention_by_rows(const Attention& op, const View& out, float* lse, Stream stream) {
  const AttentionShape s(op);
  if (s.dim > kMostDim) return kTooWide;
  return for_float(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionTensors<T> tensors(op, s.channels());
    const Heads<T> to(out, 0, 0);
    return launch(forward_kernel<T>, geometry(int64_t{s.count()} * s.queries), stream, tensors, to, lse, s);
  });
}

const char* attention_backward_by_rows(const Attention& op, const AttentionGradients& gradients, const float* lse,
                                       float* delta, Stream stream) {
  const AttentionShape s(op);
  if (s.dim > kMostDim) return kTooWide;
  return for_float(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionTensors<T> tensors(op, s.channels());
    const Heads<T> upstream(gradients.out, 0, 0), query(gradients.query, 0, 0);
    const Heads<T> key(gradients.key_value, 0, 0), value(gradients.key_value, s.channels(), 1);
    const char* error = launch(query_kernel<T>, geometry(int64_t{s.count()} * s.queries), stream, tensors, upstream,
                               query, lse, delta, s);
    if (error) return error;
    return launch(key_kernel<T>, geometry(int64_t{s.count()} * s.keys), stream, tensors, upstream, key, value, lse,
                  static_cast<const float*>(delta), s);
  });
}

}  // namespace fastkd::cuda
