// What the row-wise CUDA kernels share: a group of threads holds one row in registers, 16-byte loads, ordered sums.
//
// A row belongs to blockDim.x threads: one warp for up to 512 elements (4 rows a block then), else a whole block. A
// thread holds 16 elements at a time, as 2 chunks of 8 neighbours; rows beyond 8192 elements are read in several spans.
#pragma once

#include "cuda_api.h"

#ifndef FASTKD_EMULATE_CUDA  // tests/cuda_emulation.h runs these sources on the CPU
#include <cuda_runtime.h>
#endif

#include <type_traits>

namespace fastkd::cuda {

constexpr int kVector = 8, kChunks = 2, kItems = kVector * kChunks;
constexpr int kMaxThreads = 512;  // with 128 registers a thread

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for float32, bfloat16 or float16.
template <class F>
const char* for_float(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat: return f(Type<float>{});
    case Dtype::kBFloat16: return f(Type<BFloat16>{});
    case Dtype::kHalf: return f(Type<Half>{});
    default: return "expected float32, bfloat16 or float16 (CUDA kernels compute in float32)";
  }
}

template <class F>
const char* for_pixel(Dtype dtype, F&& f) {
  return dtype == Dtype::kByte ? f(Type<uint8_t>{}) : for_float(dtype, f);
}

// ---- numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(uint8_t x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Half x) {
#ifdef FASTKD_EMULATE_CUDA
  return emulated_half_to_float(x.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T result;
#ifdef FASTKD_EMULATE_CUDA
    result.bits = std::is_same_v<T, Half> ? emulated_float_to_half(x) : emulated_float_to_bfloat16(x);
#else
    if constexpr (std::is_same_v<T, Half>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    } else {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    }
#endif
    return result;
  }
}

// ---- 8 neighbours in one or two loads

template <int n>
struct alignas(n >= 4 ? 16 : 4 * n) Words {
  uint32_t word[n];
};

template <class T>
using Chunk = Words<kVector * sizeof(T) / 4>;

template <class T>
__device__ __forceinline__ void unpack(const Chunk<T>& chunk, float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t word = chunk.word[i * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) x[i] = __uint_as_float(word);
    if constexpr (sizeof(T) == 2) x[i] = to_float(T{static_cast<uint16_t>(word >> (16 * (i % 2)))});
    if constexpr (sizeof(T) == 1) x[i] = to_float(static_cast<uint8_t>(word >> (8 * (i % 4))));
  }
}

template <class T>
__device__ __forceinline__ Chunk<T> pack(const float* x) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if constexpr (sizeof(T) == 4) {
      chunk.word[i] = __float_as_uint(x[i]);
    } else {
      const uint32_t bits = from_float<T>(x[i]).bits;
      chunk.word[i / 2] = i % 2 ? chunk.word[i / 2] | bits << 16 : bits;
    }
  }
  return chunk;
}

// ---- rows

// Element k of this thread in the span that starts at `base`. Dense rows: 8 neighbours a chunk; others: one by one.
__device__ __forceinline__ int item(int base, int k, bool vector) {
  const int thread = threadIdx.x, threads = blockDim.x;
  return base + (vector ? (k / kVector * threads + thread) * kVector + k % kVector : k * threads + thread);
}
__device__ __forceinline__ int span() { return static_cast<int>(blockDim.x) * kItems; }

// One row. `vector` promises 16-byte alignment, dense elements and a width that is a multiple of 8.
template <class T>
struct Row {
  T* data;
  int64_t stride;
  int width;

  // x = this thread's elements of a span; 0 beyond the row.
  template <bool vector>
  __device__ __forceinline__ void read(int base, float (&x)[kItems]) const {
    if constexpr (vector) {
      Chunk<T> chunk[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int i = item(base, c * kVector, true);
        chunk[c] = {};
        if (i < width) chunk[c] = *reinterpret_cast<const Chunk<T>*>(data + i);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) unpack<T>(chunk[c], x + c * kVector);
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int i = item(base, k, false);
        x[k] = i < width ? to_float(data[i * stride]) : 0.0f;
      }
    }
  }

  template <bool vector>
  __device__ __forceinline__ void write(int base, const float (&x)[kItems]) const {
    if constexpr (vector) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int i = item(base, c * kVector, true);
        if (i < width) *reinterpret_cast<Chunk<T>*>(data + i) = pack<T>(x + c * kVector);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int i = item(base, k, false);
        if (i < width) data[i * stride] = from_float<T>(x[k]);
      }
    }
  }
};

// The rows of a [B, T, D] tensor, as a kernel parameter.
template <class T>
struct Rows {
  T* data;
  int64_t stride_b, stride_t, stride_c;
  unsigned tokens;
  int width;

  explicit Rows(const View& v) : Rows(v.data, v.stride[0], v.stride[1], v.stride[2], v.size[1], v.size[2]) {}
  // Contiguous rows of the shape of `like`.
  Rows(void* contiguous, const View& like)
      : Rows(contiguous, like.size[1] * like.size[2], like.size[2], 1, like.size[1], like.size[2]) {}
  Rows(void* p, int64_t sb, int64_t st, int64_t sc, int64_t count, int64_t n)
      : data(static_cast<T*>(p)), stride_b(sb), stride_t(st), stride_c(sc), tokens(count), width(n) {}

  bool vector() const {
    const auto aligned = [](int64_t elements) { return elements * int64_t{sizeof(T)} % 16 == 0; };
    return stride_c == 1 && width % kVector == 0 && aligned(stride_b) && aligned(stride_t) &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  __device__ __forceinline__ Row<T> operator[](unsigned row) const {
    return {data + row / tokens * stride_b + row % tokens * stride_t, stride_c, width};
  }
};

// Sums over the threads of a row; every thread gets the same bits.
template <int n>
__device__ __forceinline__ void row_sum(float (&x)[n]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(~0u, x[k], offset);
  if (blockDim.x == 32) return;
  __shared__ float part[n][kMaxThreads / 32];
  __syncthreads();  // an earlier sum may still be being read
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < n; ++k) part[k][threadIdx.x / 32] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    x[k] = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x[k] += part[k][warp];
  }
}
__device__ __forceinline__ float row_sum(float x) {
  float sum[1] = {x};
  row_sum(sum);
  return sum[0];
}

__device__ __forceinline__ unsigned row_index() { return blockIdx.x * blockDim.y + threadIdx.y; }

// Shared memory whose size the launch decides.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef FASTKD_EMULATE_CUDA
  return emulated_shared_memory;
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// ---- launches

struct Geometry {
  dim3 grid, block;
  int shared = 0;  // bytes of shared_memory()
};

inline Geometry row_geometry(int64_t rows, int64_t width) {
  const int64_t warps = (width + 32 * kItems - 1) / (32 * kItems), most = kMaxThreads / 32;
  const unsigned x = 32 * static_cast<unsigned>(warps < most ? warps : most), y = x == 32 ? 4 : 1;
  return {dim3(static_cast<unsigned>((rows + y - 1) / y)), dim3(x, y)};
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Geometry geometry, Stream stream, Arguments... arguments) {
  if (geometry.grid.x == 0 || geometry.grid.y == 0 || geometry.grid.z == 0) return nullptr;  // an error to CUDA
#ifdef FASTKD_EMULATE_CUDA
  emulate(geometry.grid, geometry.block, [&] { kernel(arguments...); });
  return nullptr;
#else
  cudaError_t error = cudaSuccess;
  if (geometry.shared > 48 << 10)  // more has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.shared);
  if (error == cudaSuccess) {
    kernel<<<geometry.grid, geometry.block, geometry.shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// out[0] = sum of x[0..n) in an order that depends on n alone; one block of kMaxThreads.
static __global__ void ordered_sum_kernel(const float* x, int64_t n, float* out) {
  __shared__ double part[kMaxThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kMaxThreads) sum += x[i];
  part[threadIdx.x] = sum;
  for (unsigned half = kMaxThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[0] = static_cast<float>(part[0]);
}

inline const char* ordered_sum(const float* x, int64_t n, float* out, Stream stream) {
  return launch(ordered_sum_kernel, {dim3(1), dim3(kMaxThreads)}, stream, x, n, out);
}

}  // namespace fastkd::cuda
