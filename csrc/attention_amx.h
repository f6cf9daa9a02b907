// bfloat16 attention of one head on AMX tiles.
//
// Row pairs of P and dS are interleaved as they are made, so the products with P^T and dS^T need no transposes:
//   dV^T = dO^T P,   dK^T = Q^T dS,   dQ = dS K.
#pragma once

#include "amx.h"

namespace fastkd {

struct AttentionShape {
  int64_t queries, keys, dim;
};

// Rows of one head: `dim` contiguous channels, `row` elements apart.
template <class T>
struct HeadView {
  T* base;
  int64_t row, dim;
};

}  // namespace fastkd

#if defined(FASTKD_AMX)

namespace fastkd::amx {

using View = HeadView<BFloat16>;

// One 32 x 32 block (or 32 x 16, 16 x 32, 16 x 16) of C = A B; lda, ldc in elements, ldb in pairs.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline void block(int64_t depth, const Bits* a, int64_t lda, const Bits* b, int64_t ldb, float* c, int64_t ldc) {
  _tile_zero(0);
  if (TWO_COLUMNS) _tile_zero(1);
  if (TWO_ROWS) _tile_zero(2);
  if (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
  for (int64_t l = 0; l < depth; l += 32) {
    _tile_loadd(4, a + l, lda * 2);
    _tile_loadd(6, b + l * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (TWO_COLUMNS) {
      _tile_loadd(7, b + l * ldb + 32, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (TWO_ROWS) {
      _tile_loadd(5, a + 16 * lda + l, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if (TWO_COLUMNS) _tile_stored(1, c + 16, ldc * 4);
  if (TWO_ROWS) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// C [m, n] = A [m, depth] B [depth, n]; m and n multiples of 16, depth of 32.
inline void gemm(int64_t m, int64_t n, int64_t depth, const Bits* a, int64_t lda, const Bits* b, int64_t ldb, float* c,
                 int64_t ldc) {
  for (int64_t i = 0; i < m; i += 32)
    for (int64_t j = 0; j < n; j += 32) {
      const bool rows = i + 16 < m, columns = j + 16 < n;
      const Bits *x = a + i * lda, *y = b + j * 2;
      float* z = c + i * ldc + j;
      if (rows && columns) block<true, true>(depth, x, lda, y, ldb, z, ldc);
      else if (rows) block<true, false>(depth, x, lda, y, ldb, z, ldc);
      else if (columns) block<false, true>(depth, x, lda, y, ldb, z, ldc);
      else block<false, false>(depth, x, lda, y, ldb, z, ldc);
    }
}

inline const Bits* line(const View& view, int64_t i) { return reinterpret_cast<const Bits*>(view.base + i * view.row); }

// [rows_p, ld] copy, zero outside; ld a multiple of 32.
inline void copy_rows(const View& view, int64_t rows, int64_t rows_p, Bits* out, int64_t ld) {
  for (int64_t i = 0; i < rows_p; ++i)
    for (int64_t j = 0; j < ld; j += 32) {
      const __mmask32 valid = i < rows ? first32(view.dim - j) : 0;
      _mm512_storeu_si512(out + i * ld + j, _mm512_maskz_loadu_epi16(valid, line(view, i) + j));
    }
}

// [a_0 ... a_15 b_0 ... b_15] -> [a_0 b_0 a_1 b_1 ...]
inline __m512i interleave(__m512i x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, x);
}

// Two vectors of 16 as bfloat16, one after the other.
inline __m512i round32(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

inline void store_halves(Bits* first, Bits* second, __m512i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(x, 1));
}

// Transposes a 16 x 16 block of 32-bit values: out[j][i] = in[i][j].
inline void transpose16(const uint32_t* in, int64_t ld_in, uint32_t* out, int64_t ld_out) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * ld_in);
  transpose16(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * ld_out, r[i]);
}

// rows [rows_p, dp] -> pairs of X^T: [dp / 2][rows_p] 32-bit values; rows_p and dp / 2 multiples of 16.
inline void pairs_of_transpose(const Bits* rows, int64_t rows_p, int64_t dp, Bits* out) {
  const auto* in = reinterpret_cast<const uint32_t*>(rows);
  auto* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < rows_p; i += 16)
    for (int64_t j = 0; j < dp / 2; j += 16) transpose16(in + i * (dp / 2) + j, dp / 2, to + j * rows_p + i, rows_p);
}

// rows [rows_p, dp] -> pairs of X: [rows_p / 2][dp] 32-bit values.
inline void pairs_of_rows(const Bits* rows, int64_t rows_p, int64_t dp, Bits* out) {
  const auto half = [](const Bits* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  for (int64_t i = 0; i < rows_p; i += 2)
    for (int64_t j = 0; j < dp; j += 16) {
      const Bits* p = rows + i * dp + j;
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half(p)), half(p + dp), 1);
      _mm512_storeu_si512(out + (i / 2 * dp + j) * 2, interleave(both));
    }
}

// rows [rows_p, dp] -> X^T [dp, rows_p], by way of pairs.
inline void transpose(const Bits* rows, int64_t rows_p, int64_t dp, Bits* pairs, Bits* out) {
  pairs_of_transpose(rows, rows_p, dp, pairs);
  const auto put = [](Bits* to, __m512i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
  };
  for (int64_t j = 0; j < dp / 2; ++j)
    for (int64_t i = 0; i < rows_p; i += 16) {
      const __m512i pair = _mm512_loadu_si512(pairs + 2 * (j * rows_p + i));
      put(out + 2 * j * rows_p + i, pair);
      put(out + (2 * j + 1) * rows_p + i, _mm512_srli_epi32(pair, 16));
    }
}

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

// Result rows as bfloat16, times scale.
inline void store_rows(const View& to, int64_t rows, const float* in, int64_t ld, const float* scale, bool per_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 s = _mm512_set1_ps(scale[per_row ? i : 0]);
    for (int64_t j = 0; j < to.dim; j += 16) {
      const __mmask16 valid = first16(to.dim - j);
      const __m256i x = round16(_mm512_mul_ps(_mm512_loadu_ps(in + i * ld + j), s));
      _mm256_mask_storeu_epi16(to.base + i * to.row + j, valid, x);
    }
  }
}

// The same from a transposed result [dp, rows_p].
inline void store_transposed(const View& to, int64_t rows, float* in, int64_t rows_p, int64_t dp, float scale,
                             float* scratch) {
  for (int64_t i = 0; i < rows_p; i += 16)
    for (int64_t j = 0; j < dp; j += 16)
      transpose16(reinterpret_cast<const uint32_t*>(in) + j * rows_p + i, rows_p,
                  reinterpret_cast<uint32_t*>(scratch) + i * dp + j, dp);
  store_rows(to, rows, scratch, dp, &scale, false);
}

// Query rows whose scores are live at a time: forward keeps scores, probabilities and keys in the first-level cache.
constexpr int64_t kForwardStrip = 16, kBackwardStrip = 32;

inline void forward(const AttentionShape& s, const View& q, const View& k, const View& v, const View& out, float* lse) {
  const int64_t kp = round_up(s.keys, 32), dp = round_up(s.dim, 32), qp = round_up(s.queries, 32);
  Scratch<> scratch(2 * (qp * dp + 3 * kp * dp + kForwardStrip * kp) +
                    4 * (kForwardStrip * kp + kForwardStrip * dp) + 1024);
  Bits *Q = scratch.take<Bits>(qp * dp), *rows = scratch.take<Bits>(kp * dp), *KT = scratch.take<Bits>(kp * dp);
  Bits *V = scratch.take<Bits>(kp * dp), *P = scratch.take<Bits>(kForwardStrip * kp);
  float *S = scratch.take<float>(kForwardStrip * kp), *O = scratch.take<float>(kForwardStrip * dp);
  copy_rows(q, s.queries, qp, Q, dp);
  copy_rows(k, s.keys, kp, rows, dp);
  pairs_of_transpose(rows, kp, dp, KT);
  copy_rows(v, s.keys, kp, rows, dp);
  pairs_of_rows(rows, kp, dp, V);
  const float scale = kLog2e / std::sqrt(static_cast<float>(s.dim));  // scores in units of log 2
  const Tiles tiles;
  for (int64_t start = 0; start < s.queries; start += kForwardStrip) {
    const int64_t live = std::min(kForwardStrip, s.queries - start), height = round_up(live, 16);
    float inverse[kForwardStrip], sums[kForwardStrip], tops[kForwardStrip];
    gemm(height, kp, dp, Q + start * dp, dp, KT, kp, S, kp);
    for (int64_t i = 0; i < height; i += 2) {  // rows past the last query are made too, of zeros, and not stored
      const float* row[2] = {S + i * kp, S + (i + 1) * kp};
      __m512 top[2], total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      const auto load = [&](int r, int64_t j) {  // past the last key: -inf
        return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first16(s.keys - j), row[r] + j);
      };
      const auto put = [&](int64_t j, __m512 (&x)[2]) {
        for (int r = 0; r < 2; ++r) {
          x[r] = exp2_for_bf16(_mm512_fmsub_ps(x[r], _mm512_set1_ps(scale), top[r]));
          total[r] = _mm512_add_ps(total[r], x[r]);
        }
        store_halves(P + i * kp + j, P + (i + 1) * kp + j, round32(x[0], x[1]));
      };
      const int64_t whole = s.keys / 16 * 16;
      for (int r = 0; r < 2; ++r) {
        __m512 best = load(r, whole);
        for (int64_t j = 0; j < whole; j += 16) best = _mm512_max_ps(best, _mm512_loadu_ps(row[r] + j));
        tops[i + r] = _mm512_reduce_max_ps(best) * scale;
        top[r] = _mm512_set1_ps(tops[i + r]);
      }
      for (int64_t j = 0; j < kp; j += 16) {
        __m512 x[2];
        for (int r = 0; r < 2; ++r) x[r] = j < whole ? _mm512_loadu_ps(row[r] + j) : load(r, j);
        put(j, x);
      }
      for (int r = 0; r < 2; ++r) sums[i + r] = _mm512_reduce_add_ps(total[r]);
    }
    for (int64_t i = 0; i < live; ++i) {  // apart: a call to log inside the loop above costs more than its row
      inverse[i] = 1 / sums[i];
      lse[start + i] = tops[i] * kLn2 + std::log(sums[i]);
    }
    gemm(height, dp, kp, P, kp, V, dp, O, dp);
    store_rows({out.base + start * out.row, out.row, out.dim}, live, O, dp, inverse, true);
  }
}

inline void backward(const AttentionShape& s, const View& g, const View& q, const View& k, const View& v,
                     const float* lse, const View& grad_q, const View& grad_k, const View& grad_v) {
  const int64_t kp = round_up(s.keys, 32), dp = round_up(s.dim, 32), qp = round_up(s.queries, 32);
  const int64_t rows_p = std::max(qp, kp);
  Scratch<> scratch(2 * (4 * qp * dp + 4 * kp * dp + rows_p * dp + 2 * qp * kp + kBackwardStrip * kp) +
                  4 * (2 * kBackwardStrip * kp + kBackwardStrip * dp + 2 * dp * kp) + 2048);
  Bits *Q = scratch.take<Bits>(qp * dp), *G = scratch.take<Bits>(qp * dp), *QT = scratch.take<Bits>(qp * dp);
  Bits *GT = scratch.take<Bits>(qp * dp), *rows = scratch.take<Bits>(kp * dp), *KT = scratch.take<Bits>(kp * dp);
  Bits *K = scratch.take<Bits>(kp * dp), *VT = scratch.take<Bits>(kp * dp), *pairs = scratch.take<Bits>(rows_p * dp);
  Bits *P = scratch.take<Bits>(qp * kp), *D = scratch.take<Bits>(qp * kp);
  Bits *D_rows = scratch.take<Bits>(kBackwardStrip * kp);
  float *S = scratch.take<float>(kBackwardStrip * kp), *DP = scratch.take<float>(kBackwardStrip * kp);
  float *DQ = scratch.take<float>(kBackwardStrip * dp);
  float *T = scratch.take<float>(dp * kp), *U = scratch.take<float>(dp * kp);
  copy_rows(q, s.queries, qp, Q, dp);
  copy_rows(g, s.queries, qp, G, dp);
  transpose(Q, qp, dp, pairs, QT);
  transpose(G, qp, dp, pairs, GT);
  copy_rows(k, s.keys, kp, rows, dp);
  pairs_of_transpose(rows, kp, dp, KT);
  pairs_of_rows(rows, kp, dp, K);
  copy_rows(v, s.keys, kp, rows, dp);
  pairs_of_transpose(rows, kp, dp, VT);
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const Tiles tiles;
  for (int64_t start = 0; start < qp; start += kBackwardStrip) {
    const int64_t live = std::max<int64_t>(0, std::min(kBackwardStrip, s.queries - start));
    gemm(kBackwardStrip, kp, dp, Q + start * dp, dp, KT, kp, S, kp);
    gemm(kBackwardStrip, kp, dp, G + start * dp, dp, VT, kp, DP, kp);
    for (int64_t i = 0; i < kBackwardStrip; i += 2) {
      // delta = sum P dP / sum P, not dO . O: the terms of dS then cancel as they should where a softmax is sharp.
      float *const row[2] = {S + i * kp, S + (i + 1) * kp}, *const slope[2] = {DP + i * kp, DP + (i + 1) * kp};
      __m512 shift[2], delta[2], sum[2], total[2];
      for (int r = 0; r < 2; ++r) {
        shift[r] = _mm512_set1_ps(i + r < live ? lse[start + i + r] * kLog2e : INFINITY);
        sum[r] = total[r] = _mm512_setzero_ps();
      }
      for (int64_t j = 0; j < kp; j += 16)
        for (int r = 0; r < 2; ++r) {
          const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row[r] + j), _mm512_set1_ps(scale * kLog2e), shift[r]);
          // Past the last key a score of 0 could overflow.
          const __m512 e = _mm512_maskz_mov_ps(first16(s.keys - j), exp2_for_bf16(x));
          sum[r] = _mm512_fmadd_ps(e, _mm512_loadu_ps(slope[r] + j), sum[r]);
          total[r] = _mm512_add_ps(total[r], e);
          _mm512_storeu_ps(row[r] + j, e);
        }
      for (int r = 0; r < 2; ++r)
        delta[r] = _mm512_set1_ps(i + r < live ? _mm512_reduce_add_ps(sum[r]) / _mm512_reduce_add_ps(total[r]) : 0);
      for (int64_t j = 0; j < kp; j += 16) {
        __m512 e[2], d[2];
        for (int r = 0; r < 2; ++r) {
          e[r] = _mm512_loadu_ps(row[r] + j);
          d[r] = _mm512_mul_ps(e[r], _mm512_sub_ps(_mm512_loadu_ps(slope[r] + j), delta[r]));
        }
        const __m512i d16 = round32(d[0], d[1]);
        store_halves(D_rows + i * kp + j, D_rows + (i + 1) * kp + j, d16);
        const int64_t at = ((start + i) / 2 * kp + j) * 2;
        _mm512_storeu_si512(P + at, interleave(round32(e[0], e[1])));
        _mm512_storeu_si512(D + at, interleave(d16));
      }
    }
    gemm(kBackwardStrip, dp, kp, D_rows, kp, K, dp, DQ, dp);
    store_rows({grad_q.base + start * grad_q.row, grad_q.row, grad_q.dim}, live, DQ, dp, &scale, false);
  }
  gemm(dp, kp, qp, GT, qp, P, kp, T, kp);
  store_transposed(grad_v, s.keys, T, kp, dp, 1, U);
  gemm(dp, kp, qp, QT, qp, D, kp, T, kp);
  store_transposed(grad_k, s.keys, T, kp, dp, scale, U);
}

}  // namespace fastkd::amx

#else

namespace fastkd::amx {

// Stand-ins where the compiler has no AMX: never called, since `available` is false.
template <class... Args>
void forward(Args&&...) {}
template <class... Args>
void backward(Args&&...) {}

}  // namespace fastkd::amx

#endif
