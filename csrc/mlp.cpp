// The hidden layer of an MLP in bfloat16 on AMX tiles: GELU and its derivative are taken of blocks that a product just
// left, between the instructions of the next one. The products around them are those of linear.cpp.
#include "gelu_math.h"
#include "linear_amx.h"

namespace fastkd {

#if defined(FASTKD_AMX)

namespace {

using gelu_math::V;

// Visits the rows of a block in vectors of 16: f(values + bias, index of the vector's first value in a row-major matrix).
template <class F>
inline void for_vectors(const float* c, const float* bias, int64_t rows, int64_t columns, int64_t at, int64_t row,
                        const F& f) {
  for (int64_t half = 0; half < columns; half += 16) {
    const __mmask16 valid = amx::first16(columns - half);
    const __m512 shift = bias ? _mm512_maskz_loadu_ps(valid, bias + half) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i)
      f(_mm512_add_ps(_mm512_loadu_ps(c + 32 * i + half), shift), at + i * row + half, valid);
  }
}

inline void store16(BFloat16* to, __mmask16 valid, __m512 x) { _mm256_mask_storeu_epi16(to, valid, amx::round16(x)); }

}  // namespace

// x [M, K] bfloat16, weight [N, K], bias [N] float32 -> activation = gelu(x W^T + b) and, where wanted, the argument of
// gelu as `hidden`; both [M, N] bfloat16.
void mlp_hidden(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& hidden, const Tensor& activation) {
  const int64_t m = x.size(0), n = weight.size(0), depth = x.size(1);
  amx::check_product(x, weight, activation, depth, weight.size(1), m, n);
  const float* shift = bias ? data<float>(*bias) : nullptr;
  BFloat16 *to = mutable_data<BFloat16>(activation), *before = hidden ? mutable_data<BFloat16>(*hidden) : nullptr;
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<BFloat16>{amx::matrix<BFloat16>(x)},
              amx::TransposedColumns<T>{amx::matrix<T>(weight)},
              [&](int64_t i, int64_t j) {
                amx::fetch_to_write(to + i * n + j);
                if (before) amx::fetch_to_write(before + i * n + j);
              },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                for_vectors(c, shift ? shift + j : nullptr, rows, columns, i * n + j, n,
                            [&](__m512 h, int64_t at, __mmask16 valid) {
                              if (before) store16(before + at, valid, h);
                              store16(to + at, valid, (__m512)gelu_math::gelu<BFloat16>((V)h));
                            });
              });
  });
}

// grad [M, N] bfloat16, weight [N, K], hidden [M, K] -> grad_hidden = (g W) gelu'(hidden), [M, K] bfloat16.
void mlp_hidden_backward(const Tensor& grad, const Tensor& weight, const Tensor& hidden, const Tensor& grad_hidden) {
  const int64_t m = grad.size(0), n = weight.size(1), depth = grad.size(1);
  amx::check_product(grad, weight, grad_hidden, depth, weight.size(0), m, n);
  const BFloat16* h = data<BFloat16>(hidden);
  BFloat16* to = mutable_data<BFloat16>(grad_hidden);
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<BFloat16>{amx::matrix<BFloat16>(grad)}, amx::Columns<T>{amx::matrix<T>(weight)},
              [&](int64_t i, int64_t j) {
                amx::fetch_to_write(to + i * n + j);
                amx::fetch_to_read(h + i * n + j);
              },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                for_vectors(c, nullptr, rows, columns, i * n + j, n, [&](__m512 g, int64_t at, __mmask16 valid) {
                  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, h + at));
                  const V slope = gelu_math::gelu_slope<BFloat16>((V)_mm512_slli_epi32(bits, 16));
                  store16(to + at, valid, _mm512_mul_ps(g, (__m512)slope));
                });
              });
  });
}

#else

void mlp_hidden(const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                const Tensor&) {
  no_amx();
}
void mlp_hidden_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&) { no_amx(); }

#endif

}  // namespace fastkd
