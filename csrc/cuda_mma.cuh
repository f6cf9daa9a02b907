// Products of 16-bit matrices by one warp on tensor cores, float32 sums: mma.sync.m16n8k16 and ldmatrix of the PTX ISA
// (sm_80 and newer). tests/cuda_emulation.h stands in for the two instructions, written from their documentation.
//
// With lane = 4 group + member, a [16, 8] tile of sums lies in a lane as sum[0..1] = row `group`, columns 2 member and
// 2 member + 1, and sum[2..3] = the same columns of row group + 8.
#pragma once

#include "cuda_rows.cuh"

namespace fastkd::cuda {

using Bits = uint16_t;

__device__ __forceinline__ int lane_group() { return static_cast<int>(threadIdx.x % 32) / 4; }
__device__ __forceinline__ int lane_member() { return static_cast<int>(threadIdx.x) % 4; }

// sum [16, 8] += a [16, 16] b [16, 8].
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FASTKD_EMULATE_CUDA
  emulated_mma_m16n8k16(sum, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); });
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Four 8 x 8 matrices from shared memory; lane 8 i + r gives the 16-byte row r of matrix i.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const Bits* row) {
#ifdef FASTKD_EMULATE_CUDA
  emulated_ldmatrix_x4(x, row, transposed);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
  }
#endif
}

// Rows of a matrix in shared memory lie this many elements apart: whole 16 x 16 blocks, and an odd number of 16-byte
// units, so that the 8 rows of an ldmatrix fall into different banks.
__host__ __device__ __forceinline__ int row_pitch(int width) { return (width + 15) / 16 * 16 + 8; }

// The 16 x 16 block at `corner` as operand a.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Bits* corner, int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(a, corner + lane % 16 * pitch + lane / 16 * 8);
}
// The block as operand b, 16 wide: tiles (b[0], b[1]) and (b[2], b[3]). Here the rows of the block are b's columns ...
__device__ __forceinline__ void load_b_by_columns(uint32_t (&b)[4], const Bits* corner, int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(b, corner + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}
// ... and here they are b's rows.
__device__ __forceinline__ void load_b_by_rows(uint32_t (&b)[4], const Bits* corner, int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<true>(b, corner + lane % 16 * pitch + lane / 16 * 8);
}

template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

// Two neighbouring tiles of sums as operand a of the next product: the layouts agree.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pair<T>(left[0], left[1]);
  a[1] = pair<T>(left[2], left[3]);
  a[2] = pair<T>(right[0], right[1]);
  a[3] = pair<T>(right[2], right[3]);
}

// Sum or maximum over the 4 lanes that share a row of a tile.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Transposes a 4 x 4 matrix of words over the 4 lanes of a quad: word i of member j becomes word j of member i.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? word[i] : word[i + 1], 1);
    word[i] = odd ? other : word[i];
    word[i + 1] = odd ? word[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? word[i] : word[i + 2], 2);
    word[i] = upper ? other : word[i];
    word[i + 2] = upper ? word[i + 2] : other;
  }
}

// Writes 4 neighbouring tiles [16, 32] of sums, times a factor per row, in 16-byte words: 4 lanes fill 64 bytes of a
// row. `to` is the block's corner in global memory, aligned like `stride` to 16 bytes; columns is a multiple of 8.
template <class T>
__device__ __forceinline__ void store_tiles(T* to, int64_t stride, int rows, int columns, const float (&sum)[4][4],
                                            float factor, float factor_below) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Words<4> line;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = half ? factor_below : factor;
      line.word[i] = pair<T>(sum[i][2 * half] * scale, sum[i][2 * half + 1] * scale);
    }
    transpose_quad(line.word);
    const int row = lane_group() + 8 * half, column = 8 * lane_member();
    if (row < rows && column < columns) *reinterpret_cast<Words<4>*>(to + row * stride + column) = line;
  }
}

}  // namespace fastkd::cuda
