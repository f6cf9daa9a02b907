// Logit standardisation: each row is read once, its statistics are made in cache.
#include "matrix_rows.h"

namespace fastkd {
namespace {

constexpr const char* kStandardOp = "logit_standardization";

// Takes the mean off a row; its unbiased standard deviation.
template <class A>
A centre(A* x, int64_t n) {
  A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const A mean = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    x[i] -= mean;
    squares += x[i] * x[i];
  }
  return std::sqrt(squares / (n - 1));
}

}  // namespace

void logit_standardization(const Tensor& x, double eps, const Tensor& y) {
  const int64_t n = x.size(1);
  const MatrixRows in(x, kStandardOp), out(y, kStandardOp);
  for_wide(x.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    parallel(x.size(0), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> line(n);
      A* v = line.data();
      for (int64_t row = begin; row < end; ++row) {
        in.read(row, v);
        const A factor = 1 / (centre(v, n) + static_cast<A>(eps));
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) v[i] *= factor;
        out.write(row, v);
      }
    });
  });
}

void logit_standardization_backward(const Tensor& grad_y, const Tensor& x, double eps, const Tensor& grad_x) {
  const int64_t n = x.size(1);
  const MatrixRows in(x, kStandardOp), above(grad_y, kStandardOp), out(grad_x, kStandardOp);
  for_wide(x.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    parallel(x.size(0), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> lines(2 * n);
      A *v = lines.data(), *g = v + n;
      for (int64_t row = begin; row < end; ++row) {
        in.read(row, v);
        above.read(row, g);
        const A deviation = centre(v, n), factor = 1 / (deviation + static_cast<A>(eps));
        A sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
        for (int64_t i = 0; i < n; ++i) {
          sum += g[i];
          product += g[i] * v[i];
        }
        const A mean = sum / n, along = deviation > 0 ? product / (n - 1) / deviation * factor : 0;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) g[i] = (g[i] - mean - v[i] * along) * factor;
        out.write(row, g);
      }
    });
  });
}

}  // namespace fastkd
