// Attention, forward: a warp takes 16 queries. What does not fit tensor cores (float32, more than 64 keys, odd strides)
// goes to attention_rows.cu.
#include "cuda_attention_mma.cuh"

namespace fastkd::cuda {
namespace {

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

}  // namespace fastkd::cuda
