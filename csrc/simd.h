// At-independent vector code: 64-byte vectors by the compiler's vector extension, lowered to what the CPU variant has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastkd {

template <class A>
struct Simd {
  static constexpr int64_t lanes = 64 / sizeof(A);
  typedef A type __attribute__((vector_size(64)));

  static type load(const A* p) {
    type v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(A* p, type v) { std::memcpy(p, &v, sizeof(v)); }
  static type splat(A x) { return type{} + x; }
};

template <class A>
inline A sum_of_lanes(typename Simd<A>::type v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  A sum = 0;
  for (int64_t lane = 0; lane < Simd<A>::lanes; ++lane) sum += v[lane];
  return sum;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// exp for float vectors: 2^n times a degree-5 polynomial on [-ln2/2, ln2/2]; relative error about 2e-7. Inputs below -87
// give 0: a denormal number would cost more than the whole row. Above 88 the result is not defined.
inline Simd<float>::type exp(Simd<float>::type x) {
  using S = Simd<float>;
  const auto power = [](S::type r) {  // exp(r)
    S::type p = S::splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
  };
#if defined(__AVX512F__)
  const __mmask16 visible = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const auto n = (S::type)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), nearest);
  const S::type r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return (S::type)_mm512_maskz_scalef_ps(visible, (__m512)power(r), (__m512)n);
#else
  typedef uint32_t Bits __attribute__((vector_size(64)));  // unsigned: NaN may wrap around
  const auto underflow = x < -87.0f;
  const S::type inside = underflow ? S::type{} : x, magic = S::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds
  const S::type shifted = inside * 1.44269504088896341f + magic, n = shifted - magic;
  const S::type r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const Bits exponent = (bits + 127) << 23;  // the low bits of `shifted` hold n
  S::type scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return underflow ? S::type{} : power(r) * scale;
#endif
}

// 1 / x to 2^-28 for positive normal x: a division would take longer than everything around it.
inline Simd<float>::type reciprocal(Simd<float>::type x) {
#if defined(__AVX512F__)
  const auto guess = (Simd<float>::type)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

#if defined(__AVX512F__)
// 2^x by a degree-4 polynomial, relative error 4e-5: far below the rounding of a bfloat16 result. Below 2^-120 it is 0:
// a denormal number would cost more than the whole row.
inline __m512 exp2_for_bf16(__m512 x) {
  const __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-120.0f), _CMP_GT_OQ);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(9.618129e-3f), r, _mm512_set1_ps(5.550411e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402265e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(visible, p, n);
}
#endif

inline Simd<double>::type exp(Simd<double>::type x) {
  for (int64_t i = 0; i < Simd<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

namespace detail {

// C tile of ROWS x (VECTORS * lanes) over the whole depth, in registers.
template <int ROWS, int VECTORS, class A>
inline void gemm_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t ldb, A* c,
                      int64_t ldc) {
  using S = Simd<A>;
  typename S::type sum[ROWS][VECTORS] = {};
  for (int64_t l = 0; l < depth; ++l) {
    typename S::type line[VECTORS];
    for (int v = 0; v < VECTORS; ++v) line[v] = S::load(b + l * ldb + v * S::lanes);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const A x = a[i * a_row + l * a_col];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += line[v] * x;
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) S::store(c + i * ldc + v * S::lanes, sum[i][v]);
}

template <int VECTORS, class A>
inline void gemm_columns(int64_t m, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t ldb,
                         A* c, int64_t ldc) {
  constexpr int rows = VECTORS > 2 ? 6 : 12;  // 24 vectors of sums, where registers are 32
  int64_t i = 0;
  for (; i + rows <= m; i += rows)
    gemm_tile<rows, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
  for (; rows > 6 && i + 6 <= m; i += 6)
    gemm_tile<6, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
  for (; i + 2 <= m; i += 2)
    gemm_tile<2, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
  if (i < m) gemm_tile<1, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
}

}  // namespace detail

// C [m, n] = A [m, depth] B [depth, n] for small matrices in cache. n is a multiple of Simd<A>::lanes; element (i, l)
// of A lies at a[i * a_row + l * a_col], so A may be transposed.
template <class A>
void small_gemm(int64_t m, int64_t n, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t ldb,
                A* c, int64_t ldc) {
  constexpr int64_t lanes = Simd<A>::lanes;
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes)
    detail::gemm_columns<4>(m, depth, a, a_row, a_col, b + j, ldb, c + j, ldc);
  for (; j + 2 * lanes <= n; j += 2 * lanes)
    detail::gemm_columns<2>(m, depth, a, a_row, a_col, b + j, ldb, c + j, ldc);
  for (; j < n; j += lanes) detail::gemm_columns<1>(m, depth, a, a_row, a_col, b + j, ldb, c + j, ldc);
}

}  // namespace fastkd
