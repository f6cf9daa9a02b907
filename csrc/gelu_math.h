// The Gaussian distribution function for GELU. erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7), whose
// exponential exp(-x^2 / 2) is also the density that the derivative needs.
#pragma once

#include "common.h"
#include "simd.h"

namespace fastkd::gelu_math {

using V = Simd<float>::type;

// Phi(x), and exp(-x^2 / 2) through `bell`.
inline V gaussian(V x, V& bell) {
  typedef int32_t Int __attribute__((vector_size(64)));
  const Int negative = x < 0.0f;
  const V z = (negative ? -x : x) * 0.70710678f;
  const V t = reciprocal(1.0f + 0.3275911f * z);
  V p = Simd<float>::splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  bell = exp(-z * z);
  const V tail = 0.5f * p * t * bell;  // 1 - Phi(|x|)
  return negative ? tail : 1.0f - tail;
}

// The same for bfloat16 results. The tail is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.69 |x| / sqrt 2), fitted for
// the least relative error, 1.6e-4: a tenth of the rounding of the result.
inline V gaussian_for_bf16(V x, V& bell) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x, size = _mm512_abs_ps(v);
  const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(size, _mm512_set1_ps(0.48790367f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(-0.12459653f), _mm512_set1_ps(0.26019907f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.16736934f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.19695015f));
  const __m512 density = exp2_for_bf16(_mm512_mul_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(-0.72134752f)));
  bell = (V)density;
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), density);
  const __mmask16 positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ);
  return (V)_mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(1.0f), tail);
#else
  return gaussian(x, bell);
#endif
}

template <class T>
inline V gaussian_for(V x, V& bell) {
  return std::is_same_v<T, BFloat16> ? gaussian_for_bf16(x, bell) : gaussian(x, bell);
}

template <class T>
inline V gelu(V x) {
  V bell;
  return x * gaussian_for<T>(x, bell);
}

// d gelu / dx
template <class T>
inline V gelu_slope(V x) {
  V bell;
  const V area = gaussian_for<T>(x, bell);
  return area + x * bell * 0.39894228f;
}

}  // namespace fastkd::gelu_math
