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

// [rows_p, ld] copy, zero outside.
inline void copy_rows(const View& view, int64_t rows, int64_t rows_p, Bits* out, int64_t ld) {
  for (int64_t i = 0; i < rows_p; ++i) {
    Bits* to = out + i * ld;
    const int64_t n = i < rows ? view.dim : 0;
    std::memcpy(to, line(view, i < rows ? i : 0), n * 2);
    std::memset(to + n, 0, (ld - n) * 2);
  }
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
  auto* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < rows_p; i += 2)
    for (int64_t j = 0; j < dp; ++j)
      to[i / 2 * dp + j] = rows[i * dp + j] | static_cast<uint32_t>(rows[(i + 1) * dp + j]) << 16;
}

// rows [rows_p, dp] -> X^T [dp, rows_p], by way of pairs.
inline void transpose(const Bits* rows, int64_t rows_p, int64_t dp, Bits* pairs, Bits* out) {
  pairs_of_transpose(rows, rows_p, dp, pairs);
  const auto* in = reinterpret_cast<const uint32_t*>(pairs);
  for (int64_t j = 0; j < dp / 2; ++j)
    for (int64_t i = 0; i < rows_p; ++i) {
      out[2 * j * rows_p + i] = static_cast<Bits>(in[j * rows_p + i]);
      out[(2 * j + 1) * rows_p + i] = static_cast<Bits>(in[j * rows_p + i] >> 16);
    }
}

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

// Result rows as bfloat16, times scale.
inline void store_rows(const View& to, int64_t rows, const float* in, int64_t ld, const float* scale, bool per_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 s = _mm512_set1_ps(scale[per_row ? i : 0]);
    for (int64_t j = 0; j < to.dim; j += 16) {
      const __mmask16 valid = first16(to.dim - j);
      _mm256_mask_storeu_epi16(to.base + i * to.row + j, valid, round16(_mm512_mul_ps(_mm512_loadu_ps(in + i * ld + j), s)));
    }
  }
}

// The same from a transposed result [dp, rows_p].
inline void store_transposed(const View& to, int64_t rows, float* in, int64_t rows_p, int64_t dp, float* scratch) {
  for (int64_t i = 0; i < rows_p; i += 16)
    for (int64_t j = 0; j < dp; j += 16)
      transpose16(reinterpret_cast<const uint32_t*>(in) + j * rows_p + i, rows_p,
                  reinterpret_cast<uint32_t*>(scratch) + i * dp + j, dp);
  const float one = 1;
  store_rows(to, rows, scratch, dp, &one, false);
}

constexpr int64_t kStrip = 32;  // query rows whose scores are live at a time

inline void forward(const AttentionShape& s, const View& q, const View& k, const View& v, const View& out, float* lse) {
  const int64_t kp = round_up(s.keys, 32), dp = round_up(s.dim, 32), qp = round_up(s.queries, 32);
  Scratch<> scratch(2 * (qp * dp + 3 * kp * dp + kStrip * kp) + 4 * (kStrip * kp + kStrip * dp) + 1024);
  Bits *Q = scratch.take<Bits>(qp * dp), *rows = scratch.take<Bits>(kp * dp), *KT = scratch.take<Bits>(kp * dp);
  Bits *V = scratch.take<Bits>(kp * dp), *P = scratch.take<Bits>(kStrip * kp);
  float *S = scratch.take<float>(kStrip * kp), *O = scratch.take<float>(kStrip * dp);
  copy_rows(q, s.queries, qp, Q, dp);
  copy_rows(k, s.keys, kp, rows, dp);
  pairs_of_transpose(rows, kp, dp, KT);
  copy_rows(v, s.keys, kp, rows, dp);
  pairs_of_rows(rows, kp, dp, V);
  const float scale = kLog2e / std::sqrt(static_cast<float>(s.dim));  // scores in units of log 2
  const Tiles tiles;
  for (int64_t start = 0; start < s.queries; start += kStrip) {
    const int64_t live = std::min(kStrip, s.queries - start), height = round_up(live, 16);
    float inverse[kStrip], sums[kStrip], tops[kStrip];
    gemm(height, kp, dp, Q + start * dp, dp, KT, kp, S, kp);
    for (int64_t i = 0; i < live; ++i) {
      const float* row = S + i * kp;
      Bits* probability = P + i * kp;
      const auto load = [&](int64_t j) {  // past the last key: -inf
        return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first16(s.keys - j), row + j);
      };
      const auto put = [&](int64_t j, __m512 x, __m512 top, __m512& total) {
        const __m512 e = exp2_for_bf16(_mm512_fmsub_ps(x, _mm512_set1_ps(scale), top));
        total = _mm512_add_ps(total, e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(probability + j), round16(e));
      };
      const int64_t whole = s.keys / 32 * 32;
      __m512 best[2] = {load(whole), load(whole + 16)}, total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t j = 0; j < whole; j += 32)
        for (int half = 0; half < 2; ++half) best[half] = _mm512_max_ps(best[half], _mm512_loadu_ps(row + j + 16 * half));
      tops[i] = _mm512_reduce_max_ps(_mm512_max_ps(best[0], best[1])) * scale;
      const __m512 top = _mm512_set1_ps(tops[i]);
      for (int64_t j = 0; j < whole; j += 32)
        for (int half = 0; half < 2; ++half) put(j + 16 * half, _mm512_loadu_ps(row + j + 16 * half), top, total[half]);
      for (int half = 0; half < 2 && whole < kp; ++half) put(whole + 16 * half, load(whole + 16 * half), top, total[half]);
      sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    }
    for (int64_t i = 0; i < live; ++i) {  // apart: a call to log inside the loop above costs more than its row
      inverse[i] = 1 / sums[i];
      lse[start + i] = tops[i] * kLn2 + std::log(sums[i]);
    }
    std::memset(P + live * kp, 0, (height - live) * kp * 2);
    gemm(height, dp, kp, P, kp, V, dp, O, dp);
    store_rows({out.base + start * out.row, out.row, out.dim}, live, O, dp, inverse, true);
  }
}

inline void backward(const AttentionShape& s, const View& g, const View& q, const View& k, const View& v,
                     const float* lse, const View& grad_q, const View& grad_k, const View& grad_v) {
  const int64_t kp = round_up(s.keys, 32), dp = round_up(s.dim, 32), qp = round_up(s.queries, 32);
  const int64_t rows_p = std::max(qp, kp);
  Scratch<> scratch(2 * (4 * qp * dp + 4 * kp * dp + rows_p * dp + 2 * qp * kp + kStrip * kp) +
                  4 * (2 * kStrip * kp + kStrip * dp + 2 * dp * kp) + 2048);
  Bits *Q = scratch.take<Bits>(qp * dp), *G = scratch.take<Bits>(qp * dp), *QT = scratch.take<Bits>(qp * dp);
  Bits *GT = scratch.take<Bits>(qp * dp), *rows = scratch.take<Bits>(kp * dp), *KT = scratch.take<Bits>(kp * dp);
  Bits *K = scratch.take<Bits>(kp * dp), *VT = scratch.take<Bits>(kp * dp), *pairs = scratch.take<Bits>(rows_p * dp);
  Bits *P = scratch.take<Bits>(qp * kp), *D = scratch.take<Bits>(qp * kp), *D_rows = scratch.take<Bits>(kStrip * kp);
  float *S = scratch.take<float>(kStrip * kp), *DP = scratch.take<float>(kStrip * kp);
  float *DQ = scratch.take<float>(kStrip * dp), *T = scratch.take<float>(dp * kp), *U = scratch.take<float>(dp * kp);
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
  for (int64_t start = 0; start < qp; start += kStrip) {
    const int64_t live = std::max<int64_t>(0, std::min(kStrip, s.queries - start));
    gemm(kStrip, kp, dp, Q + start * dp, dp, KT, kp, S, kp);
    gemm(kStrip, kp, dp, G + start * dp, dp, VT, kp, DP, kp);
    for (int64_t i = 0; i < kStrip; i += 2) {
      // delta = sum P dP / sum P, not dO . O: the terms of dS then cancel as they should where a softmax is sharp.
      __m512 delta[2];
      for (int64_t r = 0; r < 2; ++r) {
        const __m512 shift = _mm512_set1_ps(i + r < live ? lse[start + i + r] * kLog2e : INFINITY);
        __m512 sum = _mm512_setzero_ps(), total = _mm512_setzero_ps();
        for (int64_t j = 0; j < kp; j += 16) {
          const int64_t at = (i + r) * kp + j;
          const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(S + at), _mm512_set1_ps(scale * kLog2e), shift);
          // Past the last key a score of 0 could overflow.
          const __m512 e = _mm512_maskz_mov_ps(first16(s.keys - j), exp2_for_bf16(x));
          sum = _mm512_fmadd_ps(e, _mm512_loadu_ps(DP + at), sum);
          total = _mm512_add_ps(total, e);
          _mm512_storeu_ps(S + at, e);
        }
        delta[r] = _mm512_set1_ps(i + r < live ? _mm512_reduce_add_ps(sum) / _mm512_reduce_add_ps(total) : 0);
      }
      for (int64_t j = 0; j < kp; j += 16) {
        __m512i p[2], d[2];
        for (int r = 0; r < 2; ++r) {
          const int64_t at = (i + r) * kp + j;
          const __m512 e = _mm512_loadu_ps(S + at);
          const __m512 slope = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(DP + at), delta[r]), _mm512_set1_ps(scale));
          const __m256i e16 = round16(e), d16 = round16(_mm512_mul_ps(e, slope));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(D_rows + at), d16);
          p[r] = _mm512_cvtepu16_epi32(e16);
          d[r] = _mm512_cvtepu16_epi32(d16);
        }
        const int64_t at = ((start + i) / 2 * kp + j) * 2;
        _mm512_storeu_si512(P + at, _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 16)));
        _mm512_storeu_si512(D + at, _mm512_or_si512(d[0], _mm512_slli_epi32(d[1], 16)));
      }
    }
    gemm(kStrip, dp, kp, D_rows, kp, K, dp, DQ, dp);
    const float one = 1;
    store_rows({grad_q.base + start * grad_q.row, grad_q.row, grad_q.dim}, live, DQ, dp, &one, false);
  }
  gemm(dp, kp, qp, GT, qp, P, kp, T, kp);
  store_transposed(grad_v, s.keys, T, kp, dp, U);
  gemm(dp, kp, qp, QT, qp, D, kp, T, kp);
  store_transposed(grad_k, s.keys, T, kp, dp, U);
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
