// Attention over up to 64 keys in bfloat16 and float16, on tensor cores. A head has a warp for each 16 rows, 1, 2 or 4,
// and a block has 4 warps: q, k, v come from the projection's output into shared memory once, in 16-byte words; scores
// and probabilities never leave registers. What does not fit here (float32, more keys, odd strides) goes to
// attention_rows.cu.
#include "cuda_attention.cuh"
#include "cuda_mma.cuh"

#include <algorithm>

namespace fastkd::cuda {
namespace {

constexpr int kWarps = 4, kTile = 16, kTiles = 4, kMostKeys = kTile * kTiles, kMostDim = 128;

constexpr int tiles(int rows) { return (rows + kTile - 1) / kTile; }

// How the rows of a head are laid over warps and shared memory.
struct Plan : AttentionShape {
  int group;     // warps a head
  int chunk;     // query rows in shared memory at a time, 16 a warp
  int key_rows;  // keys, up to a multiple of 16
  int depth;     // channels, up to a multiple of 16
  int pitch;

  explicit Plan(const AttentionShape& s)
      : AttentionShape(s), group(1), key_rows(tiles(s.keys) * kTile), depth(tiles(s.dim) * kTile), pitch(row_pitch(s.dim)) {
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
__device__ __forceinline__ void multiply_channels(const uint32_t (&a)[kTiles][4], const Bits* x, int rows, const Plan& p,
                                                  const Start& start, const Finish& finish) {
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

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    forward_kernel(AttentionTensors<T> x, Heads<T> out, float* lse, const Plan p) {
  const Place place(p);
  const int first = blockIdx.y * p.chunk, rows = p.queries - first;
  Bits* queries = reinterpret_cast<Bits*>(shared_memory()) + place.slot * (p.chunk + 2 * p.key_rows) * p.pitch;
  Bits *keys = queries + p.chunk * p.pitch, *values = keys + p.key_rows * p.pitch;
  if (place.live) {
    stage(queries, p.rows(x.query, place.head) + first * x.query.row, x.query.row, rows, p.chunk, p, place);
    stage(keys, p.rows(x.key, place.head), x.key.row, p.keys, p.key_rows, p, place);
    stage(values, p.rows(x.value, place.head), x.value.row, p.keys, p.key_rows, p, place);
  }
  __syncthreads();
  if (!place.live || place.row >= rows) return;  // whole warps, and no barrier follows

  Scores scores;
  multiply_rows<T>(scores, queries + place.row * p.pitch, keys, p.key_rows, p);
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (8 * j + 2 * lane_member() + c % 2 >= p.keys) scores[j][c] = -INFINITY;
      top[c / 2] = fmaxf(top[c / 2], scores[j][c]);
    }
  const float scale = p.scale * kLog2e;
  top[0] = quad_max(top[0]);
  top[1] = quad_max(top[1]);
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j)
    if (8 * j < p.key_rows) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[j][c] = power_of_two((scores[j][c] - top[c / 2]) * scale);
        total[c / 2] += scores[j][c];
      }
    }
  total[0] = quad_sum(total[0]);
  total[1] = quad_sum(total[1]);
  if (lane_member() == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.row + lane_group() + 8 * half;
      if (row < rows)
        lse[int64_t{place.head} * p.queries + first + row] = top[half] * p.scale + logf(total[half]);
    }
  }
  uint32_t probabilities[kTiles][4];
  as_operands<T>(probabilities, scores);
  T* to = p.rows(out, place.head) + (first + place.row) * out.row;
  multiply_channels<T>(probabilities, values, p.key_rows, p, set_zero, [&](int n, const float (&sums)[4][4]) {
    store_tiles(to + n, out.row, rows - place.row, p.dim - n, sums, 1 / total[0], 1 / total[1]);
  });
}

// Bytes of shared memory of one head in the backward pass, and where its parts lie.
struct BackwardParts {
  int queries, grads, keys, values, lse, delta, sums, bytes;

  __host__ __device__ explicit BackwardParts(const Plan& p) {
    const int chunk = p.chunk * p.pitch * 2, key = p.key_rows * p.pitch * 2;
    queries = 0;
    grads = chunk;
    keys = 2 * chunk;
    values = keys + key;
    lse = values + key;
    delta = lse + p.chunk * 4;
    sums = delta + p.chunk * 4;  // dv, then dk, kept from one chunk of queries to the next where there are several
    bytes = sums + (p.chunks() > 1 ? 2 * p.key_rows * ((p.depth + 31) / 32 * 32) * 4 : 0);
  }
};

// First each warp takes 16 query rows: P, delta and dq; then 16 key rows: P^T and dS^T, made anew as products the other
// way round, so that they come to lie as operands of dv and dk and nothing is passed through memory but delta.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    backward_kernel(AttentionTensors<T> x, Heads<T> grad_out, Heads<T> grad_query, Heads<T> grad_key,
                    Heads<T> grad_value, const float* lse, const Plan p) {
  const Place place(p);
  const BackwardParts parts(p);
  unsigned char* memory = shared_memory() + place.slot * parts.bytes;
  Bits *queries = reinterpret_cast<Bits*>(memory), *grads = reinterpret_cast<Bits*>(memory + parts.grads);
  Bits *keys = reinterpret_cast<Bits*>(memory + parts.keys), *values = reinterpret_cast<Bits*>(memory + parts.values);
  float *shift = reinterpret_cast<float*>(memory + parts.lse), *deltas = reinterpret_cast<float*>(memory + parts.delta);
  float* kept = reinterpret_cast<float*>(memory + parts.sums);
  const float scale = p.scale * kLog2e;

  for (int first = 0; first < p.queries; first += p.chunk) {
    const int rows = p.queries - first, padded = min(p.chunk, (rows + kTile - 1) / kTile * kTile);
    if (first > 0) __syncthreads();  // the previous chunk is still being read
    if (place.live) {
      stage(queries, p.rows(x.query, place.head) + first * x.query.row, x.query.row, rows, p.chunk, p, place);
      stage(grads, p.rows(grad_out, place.head) + first * grad_out.row, grad_out.row, rows, p.chunk, p, place);
      if (first == 0) {
        stage(keys, p.rows(x.key, place.head), x.key.row, p.keys, p.key_rows, p, place);
        stage(values, p.rows(x.value, place.head), x.value.row, p.keys, p.key_rows, p, place);
      }
      // Past the last query: a probability of 0.
      if (place.thread < p.chunk)
        shift[place.thread] = place.thread < rows
                                  ? lse[int64_t{place.head} * p.queries + first + place.thread] * kLog2e
                                  : INFINITY;
    }
    __syncthreads();

    if (place.live && place.row < rows) {
      Scores scores, grad;
      multiply_rows<T>(scores, queries + place.row * p.pitch, keys, p.key_rows, p);
      multiply_rows<T>(grad, grads + place.row * p.pitch, values, p.key_rows, p);
      float weighted[2] = {0, 0}, total[2] = {0, 0}, delta[2];
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool inside = 8 * j + 2 * lane_member() + c % 2 < p.keys;
          const float log_sum = shift[place.row + lane_group() + c / 2 * 8];
          scores[j][c] = inside ? power_of_two(scores[j][c] * scale - log_sum) : 0.0f;
          weighted[c / 2] += scores[j][c] * grad[j][c];
          total[c / 2] += scores[j][c];
        }
      // Not dO . O: the sum of the same terms cancels them as it should where a softmax is sharp.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weighted[half] = quad_sum(weighted[half]);
        total[half] = quad_sum(total[half]);
        delta[half] = total[half] > 0 ? weighted[half] / total[half] : 0.0f;
        if (lane_member() == 0) deltas[place.row + lane_group() + 8 * half] = delta[half];
      }
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[j][c] *= (grad[j][c] - delta[c / 2]) * p.scale;
      uint32_t operands[kTiles][4];
      as_operands<T>(operands, scores);
      T* to = p.rows(grad_query, place.head) + (first + place.row) * grad_query.row;
      multiply_channels<T>(operands, keys, p.key_rows, p, set_zero, [&](int n, const float (&sums)[4][4]) {
        store_tiles(to + n, grad_query.row, rows - place.row, p.dim - n, sums, 1.0f, 1.0f);
      });
    }
    __syncthreads();

    if (place.live && place.row < p.key_rows) {
      Scores scores, grad;
      multiply_rows<T>(scores, keys + place.row * p.pitch, queries, padded, p);
      multiply_rows<T>(grad, values + place.row * p.pitch, grads, padded, p);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j)
        if (8 * j < padded) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int query = 8 * j + 2 * lane_member() + c % 2;
            scores[j][c] = power_of_two(scores[j][c] * scale - shift[query]);
            grad[j][c] = scores[j][c] * (grad[j][c] - deltas[query]) * p.scale;
          }
        }
      const auto finish_rows = [&](const Scores& transposed, const Bits* by, const Heads<T>& result, float* sums_kept) {
        uint32_t operands[kTiles][4];
        as_operands<T>(operands, transposed);
        T* to = p.rows(result, place.head) + place.row * result.row;
        // The warp's own corner, a lane's sums 32 words apart: no two lanes meet in a bank.
        float* mine = sums_kept + place.row * ((p.depth + 31) / 32 * 32) + threadIdx.x;
        multiply_channels<T>(
            operands, by, padded, p,
            [&](int n, float (&sums)[4][4]) {
              if (first == 0) return set_zero(n, sums);
#pragma unroll
              for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = mine[n * kTile + 32 * i];
            },
            [&](int n, const float (&sums)[4][4]) {
              if (first + p.chunk >= p.queries)
                return store_tiles(to + n, result.row, p.keys - place.row, p.dim - n, sums, 1.0f, 1.0f);
#pragma unroll
              for (int i = 0; i < 16; ++i) mine[n * kTile + 32 * i] = sums[i / 4][i % 4];
            });
      };
      finish_rows(scores, grads, grad_value, kept);
      finish_rows(grad, queries, grad_key, kept + p.key_rows * ((p.depth + 31) / 32 * 32));
    }
  }
}

template <class F>
const char* for_16_bits(Dtype dtype, F&& f) {
  return dtype == Dtype::kBFloat16 ? f(Type<BFloat16>{}) : f(Type<Half>{});
}

bool fits(const AttentionShape& s, Dtype dtype) {
  const bool some = s.queries > 0 && s.keys > 0;
  return dtype != Dtype::kFloat && some && s.keys <= kMostKeys && s.dim <= kMostDim && s.dim % kVector == 0;
}

}  // namespace

const char* attention(const Attention& op, const View& out, float* lse, Stream stream) {
  const AttentionShape s(op);
  if (!fits(s, op.query.dtype)) return attention_by_rows(op, out, lse, stream);
  return for_16_bits(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionTensors<T> tensors(op, s.channels());
    const Heads<T> to(out, 0, 0);
    if (!tensors.aligned() || !to.aligned()) return attention_by_rows(op, out, lse, stream);
    const Plan p(s);
    const Geometry geometry{dim3(p.blocks(), p.chunks()), dim3(32, kWarps),
                            p.heads_a_block() * (p.chunk + 2 * p.key_rows) * p.pitch * 2};
    return launch(forward_kernel<T>, geometry, stream, tensors, to, lse, p);
  });
}

const char* attention_backward(const Attention& op, const AttentionGradients& gradients, const float* lse, float* delta,
                               Stream stream) {
  const AttentionShape s(op);
  if (!fits(s, op.query.dtype)) return attention_backward_by_rows(op, gradients, lse, delta, stream);
  return for_16_bits(op.query.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionTensors<T> tensors(op, s.channels());
    const Heads<T> upstream(gradients.out, 0, 0), query(gradients.query, 0, 0);
    const Heads<T> key(gradients.key_value, 0, 0), value(gradients.key_value, s.channels(), 1);
    if (!(tensors.aligned() && upstream.aligned() && query.aligned() && key.aligned() && value.aligned()))
      return attention_backward_by_rows(op, gradients, lse, delta, stream);
    const Plan p(s);
    const Geometry geometry{dim3(p.blocks()), dim3(32, kWarps), p.heads_a_block() * BackwardParts(p).bytes};
    return launch(backward_kernel<T>, geometry, stream, tensors, upstream, query, key, value, lse, p);
  });
}

}  // namespace fastkd::cuda
