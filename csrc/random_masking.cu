// Noise -> permutation by counting ranks, as csrc/random_masking.cpp: 4 threads share a patch and scan the image's noise,
// which lies in shared memory.
#include "cuda_rows.cuh"
#include "philox.h"

namespace fastkd::cuda {
namespace {

constexpr int kShare = 4, kPatches = 64, kTile = 1024;

// Noise that is given: as argsort, NaN comes last.
template <class T>
struct Given {
  using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* data;
  int64_t stride_b, stride_l;

  struct Row {
    const T* data;
    int64_t stride;
    __device__ __forceinline__ Value operator()(int i) const {
      Value x;
      if constexpr (std::is_same_v<T, double>) {
        x = data[i * stride];
      } else {
        x = to_float(data[i * stride]);
      }
      return x != x ? Value(INFINITY) : x;
    }
  };
  __device__ __forceinline__ Row row(int64_t image) const { return {data + image * stride_b, stride_l}; }
};

// Noise that every block draws for itself: cheaper than a pass that writes it and others that read it.
struct Drawn {
  using Value = uint32_t;
  const int64_t* keys;
  int64_t stride;

  struct Row {
    uint64_t key;
    __device__ __forceinline__ Value operator()(int i) const { return philox24(key, static_cast<uint32_t>(i)); }
  };
  __device__ __forceinline__ Row row(int64_t image) const { return {static_cast<uint64_t>(keys[image * stride])}; }
};

template <class Noise>
__global__ void __launch_bounds__(kShare* kPatches) rank_kernel(Noise noise, int patches, int64_t keep,
                                                                int64_t* ids_shuffle, int64_t* ids_restore,
                                                                float* mask) {
  using Value = typename Noise::Value;
  __shared__ Value tile[kTile];
  const auto row = noise.row(blockIdx.x);
  const int i = blockIdx.y * kPatches + threadIdx.y, part = threadIdx.x, thread = threadIdx.y * kShare + part;
  const Value x = i < patches ? row(i) : Value(0);
  int rank = 0;
  for (int start = 0; start < patches; start += kTile) {
    const int count = patches - start < kTile ? patches - start : kTile;
    __syncthreads();
    for (int j = thread; j < count; j += kShare * kPatches) tile[j] = row(start + j);
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

template <class Noise>
const char* rank_patches(const Noise& noise, int64_t batch, int64_t patches, int64_t keep, int64_t* ids_shuffle,
                         int64_t* ids_restore, float* mask, Stream stream) {
  const int count = static_cast<int>(patches);
  const dim3 grid(static_cast<unsigned>(batch), (count + kPatches - 1) / kPatches);
  return launch(rank_kernel<Noise>, {grid, dim3(kShare, kPatches)}, stream, noise, count, keep, ids_shuffle,
                ids_restore, mask);
}

}  // namespace

const char* random_masking(const View& noise, int64_t keep, int64_t* ids_shuffle, int64_t* ids_restore, float* mask,
                           Stream stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    const Given<T> given{static_cast<const T*>(noise.data), noise.stride[0], noise.stride[1]};
    return rank_patches(given, noise.size[0], noise.size[1], keep, ids_shuffle, ids_restore, mask, stream);
  };
  return noise.dtype == Dtype::kDouble ? run(Type<double>{}) : for_float(noise.dtype, run);
}

const char* random_masking_keyed(const View& keys, int64_t patches, int64_t keep, int64_t* ids_shuffle,
                                 int64_t* ids_restore, float* mask, Stream stream) {
  const Drawn drawn{static_cast<const int64_t*>(keys.data), keys.stride[0]};
  return rank_patches(drawn, keys.size[0], patches, keep, ids_shuffle, ids_restore, mask, stream);
}

}  // namespace fastkd::cuda
