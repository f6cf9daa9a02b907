// Attention, backward, as attention.cu: probabilities are made again from the saved log-sum-exp.
#include "cuda_attention_mma.cuh"

namespace fastkd::cuda {
namespace {

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

}  // namespace

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
