// What the products on AMX tiles share: how tensors become matrices, and how a finished block is stored.
#pragma once

#include "gemm_amx.h"

#if defined(FASTKD_AMX)

namespace fastkd::amx {

template <class T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.size(0), t.size(1)};
}

// Calls f(Type<T>{}) for a parameter, which is bfloat16 or float32.
template <class F>
void for_parameter(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Float) return f(Type<float>{});
  FASTKD_CHECK(t.scalar_type() == ScalarType::BFloat16, "linear", "expected a bfloat16 or float32 parameter");
  f(Type<BFloat16>{});
}

inline void check_product(const Tensor& first, const Tensor& second, const Tensor& out, int64_t inner, int64_t other,
                          int64_t m, int64_t n) {
  FASTKD_CHECK(available(), "linear", "the system does not hand out AMX tiles");
  const bool bf16 = first.scalar_type() == ScalarType::BFloat16 && first.dim() == 2 && second.dim() == 2;
  FASTKD_CHECK(bf16 && first.stride(1) == 1 && second.stride(1) == 1 && inner == other && out.is_contiguous() &&
                   out.size(0) == m && out.size(1) == n,
               "linear", "shapes, dtypes or strides do not match");
}

// Rows of a block as bfloat16, plus a bias for its columns.
inline void store_block(const float* c, const float* bias, int64_t rows, int64_t columns, BFloat16* to, int64_t row) {
  const __m512 low = bias ? _mm512_maskz_loadu_ps(first16(columns), bias) : _mm512_setzero_ps();
  const __m512 high = bias ? _mm512_maskz_loadu_ps(first16(columns - 16), bias + 16) : _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; ++i, c += 32) {
    const auto line = _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_loadu_ps(c + 16), high),
                                          _mm512_add_ps(_mm512_loadu_ps(c), low));
    _mm512_mask_storeu_epi16(to + i * row, first32(columns), (__m512i)line);
  }
}

}  // namespace fastkd::amx

#endif
