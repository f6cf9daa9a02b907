// Attention over up to 64 keys in bfloat16 and float16, on tensor cores: what the forward and the backward pass share.
//
// A head has a warp for each 16 rows, 1, 2 or 4, and a block has 4 warps: q, k, v come from the projection's output
// into shared memory once, in 16-byte words; scores and probabilities never leave registers.
#pragma once

#include "cuda_attention.cuh"
#include "cuda_mma.cuh"

#include <algorithm>

namespace fastkd::cuda {

constexpr int kWarps = 4, kTile = 16, kTiles = 4, kMostKeys = kTile * kTiles, kMostDim = 128;

__host__ __device__ constexpr int tiles(int rows) { return (rows + kTile - 1) / kTile; }

// How the rows of a head are laid over warps and shared memory.
struct Plan : AttentionShape {
  int group;     // warps a head
  int chunk;     // query rows in shared memory at a time, 16 a warp
  int key_rows;  // keys, up to a multiple of 16
  int depth;     // channels, up to a multiple of 16
  int pitch;

  explicit Plan(const AttentionShape& s)
      : AttentionShape(s), group(1), key_rows(tiles(s.keys) * kTile), depth(tiles(s.dim) * kTile),
        pitch(row_pitch(s.dim)) {
    while (group < kWarps && group < std::max(tiles(s.queries), tiles(s.keys))) group *= 2;
    chunk = group * kTile;
  }
  __host__ __device__ int chunks() const { return (queries + chunk - 1) / chunk; }
  __host__ __device__ int heads_a_block() const { return kWarps / group; }
  unsigned blocks() const { return (count() + heads_a_block() - 1) / heads_a_block(); }
};

// A warp's place: its head, the head's part of shared memory, its 16 rows in the chunk. The number of the warp comes by
// way of a shuffle, which tells the compiler that it is the same in all lanes: branches on it need no reconvergence.
struct Place {
  int head, slot, row, thread, threads;
  bool live;

  __device__ __forceinline__ explicit Place(const Plan& p) {
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.y), 0);
    slot = warp / p.group;
    row = warp % p.group * kTile;
    head = blockIdx.x * p.heads_a_block() + slot;
    thread = warp % p.group * 32 + threadIdx.x;
    threads = p.group * 32;
    live = head < p.count();
  }
};

// Copies rows [0, rows) of a head to shared memory and fills up to whole tiles with zeros.
template <class T>
__device__ __forceinline__ void stage(Bits* to, const T* from, int64_t stride, int rows, int padded, const Plan& p,
                                      const Place& place) {
  const int shift = p.depth <= 16 ? 1 : p.depth <= 32 ? 2 : p.depth <= 64 ? 3 : 4;  // 2^shift threads a row
  const int column = (place.thread & ((1 << shift) - 1)) * kVector;
  if (column >= p.depth) return;
#pragma unroll 4
  for (int row = place.thread >> shift; row < padded; row += place.threads >> shift) {
    Words<4> word = {};
    if (row < rows && column < p.dim) word = *reinterpret_cast<const Words<4>*>(from + row * stride + column);
    *reinterpret_cast<Words<4>*>(to + row * p.pitch + column) = word;
  }
}

// 2^x as the special function unit has it; tiny results are 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef FASTKD_EMULATE_CUDA
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

using Scores = float[2 * kTiles][4];  // [16, 64]: tile j holds columns 8 j to 8 j + 7

// scores = a b^T for 16 rows of a and b_rows (a multiple of 16) of b, both in shared memory.
template <class T>
__device__ __forceinline__ void multiply_rows(Scores& scores, const Bits* a, const Bits* b, int b_rows, const Plan& p) {
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[j][c] = 0;
#pragma unroll 2
  for (int k = 0; k < p.depth; k += kTile) {
    uint32_t x[4], y[4];
    load_a(x, a + k, p.pitch);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (i * kTile < b_rows) {
        load_b_by_columns(y, b + i * kTile * p.pitch + k, p.pitch);
        multiply<T>(scores[2 * i], x, y[0], y[1]);
        multiply<T>(scores[2 * i + 1], x, y[2], y[3]);
      }
  }
}

template <class T>
__device__ __forceinline__ void as_operands(uint32_t (&a)[kTiles][4], const Scores& scores) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) as_operand<T>(a[i], scores[2 * i], scores[2 * i + 1]);
}

// a x for the [16, rows] matrix a and x [rows, channels] in shared memory, 32 channels at a time:
// start(first channel, sums) sets the sums, finish(first channel, sums) takes them.
template <class T, class Start, class Finish>
__device__ __forceinline__ void multiply_channels(const uint32_t (&a)[kTiles][4], const Bits* x, int rows,
                                                  const Plan& p, const Start& start, const Finish& finish) {
#pragma unroll 1
  for (int n = 0; n < p.depth; n += 32) {
    float sums[4][4];
    start(n, sums);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i * kTile < rows && n + half * kTile < p.depth) {
          uint32_t y[4];
          load_b_by_rows(y, x + i * kTile * p.pitch + n + half * kTile, p.pitch);
          multiply<T>(sums[2 * half], a[i], y[0], y[1]);
          multiply<T>(sums[2 * half + 1], a[i], y[2], y[3]);
        }
    finish(n, sums);
  }
}

__device__ __forceinline__ void set_zero(int, float (&sums)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0;
}

template <class F>
const char* for_16_bits(Dtype dtype, F&& f) {
  return dtype == Dtype::kBFloat16 ? f(Type<BFloat16>{}) : f(Type<Half>{});
}

inline bool fits(const AttentionShape& s, Dtype dtype) {
  const bool some = s.queries > 0 && s.keys > 0;
  return dtype != Dtype::kFloat && some && s.keys <= kMostKeys && s.dim <= kMostDim && s.dim % kVector == 0;
}

}  // namespace fastkd::cuda
