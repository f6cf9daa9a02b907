// Dense rows from one floating dtype to another, at memory speed. torch's scalar conversions of the 16-bit types do not
// all become vector code: bfloat16 rounding branches on NaN, and float16 is done bit by bit.
#pragma once

#include "common.h"

#include <algorithm>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fastkd {

template <class From, class To>
inline void convert_row(const From* x, int64_t n, To* y) {
  if constexpr (std::is_same_v<From, To>) {
    if (x != y) std::copy_n(x, n, y);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<To>(x[i]);
  }
}

// Round to nearest even; NaN stays NaN.
inline void convert_row(const float* x, int64_t n, BFloat16* y) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(y);
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(bits + i, &rounded, sizeof(rounded));
  }
#endif
#pragma omp simd
  for (int64_t k = i; k < n; ++k) {
    uint32_t u;
    std::memcpy(&u, x + k, 4);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
    bits[k] = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
  }
}

#if defined(__F16C__)
inline void convert_row(const float* x, int64_t n, Half* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
  for (; i < n; ++i) y[i] = static_cast<Half>(x[i]);
}

inline void convert_row(const Half* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) y[i] = static_cast<float>(x[i]);
}
#endif

// sum += x.
template <class A, class T>
inline void add_row(const T* x, int64_t n, A* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<A>(x[i]);
}

#if defined(__F16C__)
inline void add_row(const Half* x, int64_t n, float* sum) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), wide));
  }
  for (; i < n; ++i) sum[i] += static_cast<float>(x[i]);
}
#endif

// The line itself where it is dense and in A already, else a converted copy.
template <class A, class T>
inline const A* read_line(const T* x, int64_t n, int64_t stride, A* buffer) {
  if constexpr (std::is_same_v<A, std::remove_const_t<T>>)
    if (stride == 1) return x;
  if (stride == 1) {
    convert_row(x, n, buffer);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(x[i * stride]);
  }
  return buffer;
}

}  // namespace fastkd
