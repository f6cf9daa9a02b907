// Sums of token rows over a whole batch in a fixed order, without atomics: shares of the rows side by side, then the
// shares by the same kernel.
#pragma once

#include "cuda_rows.cuh"

namespace fastkd::cuda {

constexpr int kSumColumns = 32 * kVector, kSumRows = 8;  // a block: 32 threads with 8 columns each, 8 rows at a time

// This thread's 8 columns, added over the kSumRows threads of a column: the same bits for any timing.
__device__ __forceinline__ void sum_block_rows(float (&sum)[kVector]) {
  __shared__ float part[kSumRows][kVector][32];
#pragma unroll
  for (int k = 0; k < kVector; ++k) part[threadIdx.y][k][threadIdx.x] = sum[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    sum[k] = 0;
#pragma unroll
    for (int y = 0; y < kSumRows; ++y) sum[k] += part[y][k][threadIdx.x];
  }
}

// 8 neighbours of a row that has unit stride; 0 beyond it.
template <class T>
__device__ __forceinline__ void read_eight(const T* row, int column, int width, bool vector, float (&x)[kVector]) {
  if (vector) {
    Chunk<T> chunk = {};
    if (column < width) chunk = *reinterpret_cast<const Chunk<T>*>(row + column);
    unpack<T>(chunk, x);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] = column + k < width ? to_float(row[column + k]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void write_eight(T* row, int column, int width, bool vector, const float (&x)[kVector]) {
  if (vector) {
    if (column < width) *reinterpret_cast<Chunk<T>*>(row + column) = pack<T>(x);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (column + k < width) row[column + k] = from_float<T>(x[k]);
  }
}

// Group z holds tokens [first + z * count, first + (z + 1) * count) of each image. out [shares, groups, D]: sums over
// the share's rows (b, token) of the group, b slowest. With `copy`, the rows go there side by side as well.
template <class T, class Out>
__global__ void __launch_bounds__(32 * kSumRows)
    sum_kernel(Rows<T> x, bool vector, unsigned first, unsigned count, unsigned rows, unsigned share, Out* out,
               bool vector_out, T* copy, bool vector_copy) {
  const unsigned begin = blockIdx.x * share, end = min(rows, begin + share), group = blockIdx.z;
  const int column = blockIdx.y * kSumColumns + threadIdx.x * kVector;
  float sum[kVector] = {};
#pragma unroll 4
  for (unsigned m = begin + threadIdx.y; m < end; m += kSumRows) {
    const T* row = x.data + m / count * x.stride_b + (first + group * count + m % count) * x.stride_t;
    float value[kVector];
    read_eight(row, column, x.width, vector, value);
    if (copy) write_eight(copy + int64_t{m} * x.width, column, x.width, vector_copy, value);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum[k] += value[k];
  }
  sum_block_rows(sum);
  Out* to = out + (int64_t{blockIdx.x} * gridDim.z + group) * x.width;
  if (threadIdx.y == 0) write_eight(to, column, x.width, vector_out, sum);
}

// Whether a contiguous [rows, width] array may be moved in 16-byte words.
template <class T>
bool dense_vector(const T* data, int64_t width) {
  return width % kVector == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// out [groups, D] = sums over the batch and over `count` tokens a group, from token `first` on. partial: scratch of
// sum_shares(batch * count) * groups * D floats.
template <class T, class Out>
const char* sum_tokens(const Rows<T>& x, int64_t batch, int64_t first, int64_t count, int64_t groups, float* partial,
                       Out* out, T* copy, Stream stream) {
  if (groups == 0 || x.width == 0) return nullptr;
  const int64_t rows = batch * count, shares = sum_shares(rows), share = (rows + shares - 1) / shares;
  const auto run = [&](auto input, int64_t first, int64_t count, int64_t rows, int64_t shares, int64_t share, auto* to,
                       auto* copy) {
    const unsigned columns = (x.width + kSumColumns - 1) / kSumColumns;
    const Geometry geometry{dim3(shares, columns, groups), dim3(32, kSumRows)};
    using In = std::remove_pointer_t<decltype(input.data)>;
    return launch(sum_kernel<In, std::remove_pointer_t<decltype(to)>>, geometry, stream, input, input.vector(),
                  static_cast<unsigned>(first), static_cast<unsigned>(count < 1 ? 1 : count),
                  static_cast<unsigned>(rows), static_cast<unsigned>(share), to, dense_vector(to, x.width), copy,
                  dense_vector(copy, x.width));
  };
  const char* error = run(x, first, count, rows, shares, share, partial, copy);
  if (error) return error;
  const Rows<float> sums(partial, groups * x.width, x.width, 1, groups, x.width);
  return run(sums, 0, 1, shares, 1, shares, out, static_cast<float*>(nullptr));
}

}  // namespace fastkd::cuda
