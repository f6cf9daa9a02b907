// What a linear head with a loss needs beside the loss of its logits: products of bfloat16 rows whose results stay in
// float32, on AMX tiles, and the two passes over a row of logits that a top-k teacher takes.
#include "linear_amx.h"
#include "simd.h"

namespace fastkd {

#if defined(FASTKD_AMX)

namespace {

// A finished block in float32: scale c + bias, or c added to what is there.
inline void store_wide(const float* c, const float* bias, float scale, bool add, int64_t rows, int64_t columns,
                       float* to, int64_t row) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t half = 0; half < columns; half += 16) {
    const __mmask16 valid = amx::first16(columns - half);
    const __m512 shift = bias ? _mm512_mul_ps(by, _mm512_maskz_loadu_ps(valid, bias + half)) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      float* line = to + r * row + half;
      const __m512 base = add ? _mm512_maskz_loadu_ps(valid, line) : shift;
      _mm512_mask_storeu_ps(line, valid, _mm512_fmadd_ps(by, _mm512_loadu_ps(c + 32 * r + half), base));
    }
  }
}

}  // namespace

// x [M, K] bfloat16, weight [N, K] bfloat16 or float32, bias [N] float32 -> out [M, N] = scale (x W^T + bias) float32.
void linear_wide(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                 const Tensor& out) {
  const int64_t m = x.size(0), n = weight.size(0), depth = x.size(1);
  amx::check_product(x, weight, out, depth, weight.size(1), m, n);
  const float* shift = bias ? data<float>(*bias) : nullptr;
  float* to = mutable_data<float>(out);
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<BFloat16>{amx::matrix<BFloat16>(x)},
              amx::TransposedColumns<T>{amx::matrix<T>(weight)},
              [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                store_wide(c, shift ? shift + j : nullptr, float(scale), false, rows, columns, to + i * n + j, n);
              });
  });
}

// grad [M, N] float32, rounded as it is packed, weight [N, K] bfloat16 or float32 -> out [M, K] = grad W float32.
void linear_wide_grad_input(const Tensor& grad, const Tensor& weight, const Tensor& out) {
  const int64_t m = grad.size(0), n = weight.size(1), depth = grad.size(1);
  FASTKD_CHECK(grad.scalar_type() == ScalarType::Float && grad.stride(1) == 1 && out.is_contiguous() &&
                   out.size(0) == m && out.size(1) == n && weight.size(0) == depth,
               "linear_wide_grad_input", "shapes, dtypes or strides do not match");
  float* to = mutable_data<float>(out);
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<float>{amx::matrix<float>(grad)}, amx::Columns<T>{amx::matrix<T>(weight)},
              [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                store_wide(c, nullptr, 1, false, rows, columns, to + i * n + j, n);
              });
  });
}

// grad [M, N] float32, x [M, K] bfloat16 -> grad_weight [N, K] float32 = or += grad^T x.
void linear_wide_grad_weight(const Tensor& grad, const Tensor& x, bool first, const Tensor& grad_weight) {
  constexpr int64_t most = 2048;  // rows at a time, so that a chunk of grad^T fits L2
  const int64_t m = grad.size(1), n = x.size(1), depth = x.size(0);
  FASTKD_CHECK(grad.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::BFloat16 &&
                   grad.stride(1) == 1 && x.stride(1) == 1 && grad_weight.is_contiguous() && grad.size(0) == depth &&
                   grad_weight.size(0) == m && grad_weight.size(1) == n,
               "linear_wide_grad_weight", "shapes, dtypes or strides do not match");
  float* to = mutable_data<float>(grad_weight);
  for (int64_t start = 0; start < depth; start += most) {
    const int64_t rows_here = std::min(most, depth - start);
    const amx::Matrix<float> g{data<float>(grad) + start * grad.stride(0), grad.stride(0), rows_here, m};
    const amx::Matrix<BFloat16> b{data<BFloat16>(x) + start * x.stride(0), x.stride(0), rows_here, n};
    const bool add = !first || start > 0;
    amx::gemm(m, n, rows_here, amx::TransposedRows<float>{g}, amx::Columns<BFloat16>{b},
              [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                store_wide(c, nullptr, 1, add, rows, columns, to + i * n + j, n);
              });
  }
}

#else

void linear_wide(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, const Tensor&) {
  STD_TORCH_CHECK(false, "fastkd linear_wide: this library was built without AMX");
}
void linear_wide_grad_input(const Tensor&, const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "fastkd linear_wide_grad_input: this library was built without AMX");
}
void linear_wide_grad_weight(const Tensor&, const Tensor&, bool, const Tensor&) {
  STD_TORCH_CHECK(false, "fastkd linear_wide_grad_weight: this library was built without AMX");
}

#endif

namespace {

template <class F>
void for_rows_of(const Tensor& z, const char* op, F&& f) {
  FASTKD_CHECK(z.dim() == 2 && z.stride(1) == 1, "row pass", "expected rows that are dense");
  if (z.scalar_type() == ScalarType::Double) return f(Type<double>{});
  FASTKD_CHECK(z.scalar_type() == ScalarType::Float, "row pass", "expected float32 or float64");
  f(Type<float>{});
}

}  // namespace

// z [N, V] float32 or float64 -> lse [N, 1]. Two passes over a row that the product has just left in the cache.
void row_log_sum_exp(const Tensor& z, const Tensor& lse) {
  for_rows_of(z, "row_log_sum_exp", [&](auto type) {
    using A = typename decltype(type)::type;
    using S = Simd<A>;
    const int64_t n = z.size(1), step = z.stride(0), whole = n / S::lanes * S::lanes;
    const A* base = data<A>(z);
    A* out = mutable_data<A>(lse);
    parallel(z.size(0), 65536 / n + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const A* x = base + row * step;
        A most = x[0];
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
        typename S::type sums = {};
        for (int64_t i = 0; i < whole; i += S::lanes) sums += exp(S::load(x + i) - most);
        A total = 0;
        for (int64_t l = 0; l < S::lanes; ++l) total += sums[l];
        for (int64_t i = whole; i < n; ++i) total += std::exp(x[i] - most);
        out[row] = most + std::log(total);
      }
    });
  });
}

// grad [N, V] = factor [N, 1] exp(z - lse); grad may be z.
void row_softmax(const Tensor& z, const Tensor& lse, const Tensor& factor, const Tensor& grad) {
  FASTKD_CHECK(grad.stride(1) == 1 && grad.scalar_type() == z.scalar_type() && factor.is_contiguous(), "row_softmax",
               "strides or dtypes do not match");
  for_rows_of(z, "row_softmax", [&](auto type) {
    using A = typename decltype(type)::type;
    using S = Simd<A>;
    const int64_t n = z.size(1), step = z.stride(0), to_step = grad.stride(0), whole = n / S::lanes * S::lanes;
    const A *base = data<A>(z), *shift = data<A>(lse), *by = data<A>(factor);
    A* to = mutable_data<A>(grad);
    parallel(z.size(0), 65536 / n + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const A* x = base + row * step;
        A* out = to + row * to_step;
        for (int64_t i = 0; i < whole; i += S::lanes) S::store(out + i, exp(S::load(x + i) - shift[row]) * by[row]);
        for (int64_t i = whole; i < n; ++i) out[i] = std::exp(x[i] - shift[row]) * by[row];
      }
    });
  });
}

}  // namespace fastkd
