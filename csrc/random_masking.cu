// Noise -> permutation by counting ranks, as csrc/random_masking.cpp: 4 threads share a patch and scan the image's noise,
// which lies in shared memory.
#include "cuda_rows.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kShare = 4, kPatches = 64, kTile = 1024;

template <class T>
__device__ __forceinline__ auto key(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x != x ? INFINITY : x;
  } else {
    const float wide = to_float(x);
    return wide != wide ? INFINITY : wide;  // as argsort: NaN last
  }
}

template <class T>
__global__ void __launch_bounds__(kShare* kPatches) rank_kernel(const T* noise, int64_t stride_b, int64_t stride_l,
                                                                int patches, int64_t keep, int64_t* ids_shuffle,
                                                                int64_t* ids_restore, float* mask) {
  using Key = decltype(key(T{}));
  __shared__ Key tile[kTile];
  const T* row = noise + blockIdx.x * stride_b;
  const int i = blockIdx.y * kPatches + threadIdx.y, part = threadIdx.x, thread = threadIdx.y * kShare + part;
  const Key x = i < patches ? key(row[i * stride_l]) : Key(0);
  int rank = 0;
  for (int start = 0; start < patches; start += kTile) {
    const int count = patches - start < kTile ? patches - start : kTile;
    __syncthreads();
    for (int j = thread; j < count; j += kShare * kPatches) tile[j] = key(row[(start + j) * stride_l]);
    __syncthreads();
#pragma unroll 4
    for (int j = part; j < count; j += kShare)
      rank += (tile[j] < x) | ((tile[j] == x) & (start + j < i));  // ties go to the lower patch
  }
  rank += __shfl_xor_sync(~0u, rank, 1);
  rank += __shfl_xor_sync(~0u, rank, 2);
  if (i >= patches || part != 0) return;
  const int64_t out = int64_t{blockIdx.x} * patches;
  ids_restore[out + i] = rank;
  ids_shuffle[out + rank] = i;
  mask[out + i] = rank >= keep ? 1.0f : 0.0f;
}

}  // namespace

const char* random_masking(const View& noise, int64_t keep, int64_t* ids_shuffle, int64_t* ids_restore, float* mask,
                           Stream stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    const int patches = static_cast<int>(noise.size[1]);
    const dim3 grid(static_cast<unsigned>(noise.size[0]), (patches + kPatches - 1) / kPatches);
    return launch(rank_kernel<T>, {grid, dim3(kShare, kPatches)}, stream, static_cast<const T*>(noise.data),
                  noise.stride[0], noise.stride[1], patches, keep, ids_shuffle, ids_restore, mask);
  };
  return noise.dtype == Dtype::kDouble ? run(Type<double>{}) : for_float(noise.dtype, run);
}

}  // namespace fastkd::cuda
