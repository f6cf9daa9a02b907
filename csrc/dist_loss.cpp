// DIST: softmax of both sides by rows, correlations by rows, then by blocks of columns, then gradients by rows.
#include "matrix_rows.h"
#include "simd.h"

#include <array>
#include <limits>
#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kDistOp = "dist_loss";

// What correlates two vectors: means, one over the norms (with their floor), the correlation, and for each side the
// correlation that enters its gradient, 0 where its norm is below the floor.
template <class A>
struct DistPair {
  A mean[2], inverse[2], correlation, along[2];

  void finish(double squares_q, double squares_p, double product, double eps) {
    const double norms[] = {std::sqrt(squares_q), std::sqrt(squares_p)};
    for (int side = 0; side < 2; ++side) inverse[side] = static_cast<A>(1 / std::max(norms[side], eps));
    correlation = static_cast<A>(product / std::max(norms[0], eps) / std::max(norms[1], eps));
    for (int side = 0; side < 2; ++side) along[side] = norms[side] >= eps ? correlation : 0;
  }
};

// Softmax of x / temperature, in place; the padding of x is -inf.
template <class A>
void dist_softmax(A* x, int64_t padded, A inverse_temperature) {
  using S = Simd<A>;
  A top = x[0];
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < padded; ++i) top = std::max(top, x[i]);
  typename S::type sums{};
  for (int64_t i = 0; i < padded; i += S::lanes) {
    const typename S::type e = exp((S::load(x + i) - top) * inverse_temperature);
    S::store(x + i, e);
    sums += e;
  }
  A sum = 0;
  for (int64_t i = 0; i < S::lanes; ++i) sum += sums[i];
  const A factor = 1 / sum;
  for (int64_t i = 0; i < padded; ++i) x[i] *= factor;
}

template <class A>
DistPair<A> dist_row(const A* q, const A* p, int64_t n, double eps) {
  DistPair<A> pair;
  A sum_q = 0, sum_p = 0, qq = 0, pp = 0, qp = 0;
#pragma omp simd reduction(+ : sum_q, sum_p)
  for (int64_t i = 0; i < n; ++i) {
    sum_q += q[i];
    sum_p += p[i];
  }
  const A mean_q = sum_q / n, mean_p = sum_p / n;
#pragma omp simd reduction(+ : qq, pp, qp)
  for (int64_t i = 0; i < n; ++i) {
    const A a = q[i] - mean_q, b = p[i] - mean_p;
    qq += a * a;
    pp += b * b;
    qp += a * b;
  }
  pair.mean[0] = mean_q, pair.mean[1] = mean_p;
  pair.finish(qq, pp, qp, eps);
  return pair;
}

// A block of columns at once, row by row.
template <class A>
void dist_columns(const A* q, const A* p, int64_t rows, int64_t stride, int64_t n, double eps, DistPair<A>* out) {
  constexpr int64_t most = 64;
  std::array<double, most> sum_q{}, sum_p{}, qq{}, pp{}, qp{};
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sum_q[i] += q[row * stride + i];
      sum_p[i] += p[row * stride + i];
    }
  }
  for (int64_t i = 0; i < n; ++i) sum_q[i] /= rows, sum_p[i] /= rows;
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double a = q[row * stride + i] - sum_q[i], b = p[row * stride + i] - sum_p[i];
      qq[i] += a * a;
      pp[i] += b * b;
      qp[i] += a * b;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    out[i].mean[0] = static_cast<A>(sum_q[i]), out[i].mean[1] = static_cast<A>(sum_p[i]);
    out[i].finish(qq[i], pp[i], qp[i], eps);
  }
}

}  // namespace

void dist_loss(const Tensor& student, const Tensor& teacher, double beta, double gamma, double temperature, double eps,
               const Tensor& grad_student, const Tensor& grad_teacher, const Tensor& loss) {
  for_wide(loss.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    constexpr int64_t block = 64;
    const int64_t rows = student.size(0), n = student.size(1), stride = round_up(n, Simd<A>::lanes);
    std::vector<A> kept[2] = {std::vector<A>(rows * stride), std::vector<A>(rows * stride)};
    A *q = kept[0].data(), *p = kept[1].data();
    std::vector<DistPair<A>> by_row(rows), by_column(n);
    const MatrixRows sides[2] = {MatrixRows(student, kDistOp), MatrixRows(teacher, kDistOp)};
    parallel(rows, 8192 / n + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int side = 0; side < 2; ++side) {
          A* x = kept[side].data() + row * stride;
          sides[side].read(row, x);
          std::fill(x + n, x + stride, -std::numeric_limits<A>::infinity());
          dist_softmax(x, stride, static_cast<A>(1 / temperature));
        }
        by_row[row] = dist_row(q + row * stride, p + row * stride, n, eps);
      }
    });
    parallel((n + block - 1) / block, 8192 / (rows * block) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * block; first < std::min(end * block, n); first += block)
        dist_columns(q + first, p + first, rows, stride, std::min(block, n - first), eps, by_column.data() + first);
    });
    double row_sum = 0, column_sum = 0;
    for (const auto& pair : by_row) row_sum += 1 - double(pair.correlation);
    for (const auto& pair : by_column) column_sum += 1 - double(pair.correlation);
    const double total = beta * row_sum / rows + gamma * column_sum / n;
    *mutable_data<A>(loss) = static_cast<A>(temperature * temperature * total);

    // Columns' constants one after the other, for the loop over a row.
    const Tensor* grads[2] = {&grad_student, &grad_teacher};
    for (int own = 0; own < 2; ++own) {
      if (grads[own]->numel() == 0) continue;
      const int other = 1 - own;
      const A of_row = static_cast<A>(beta / rows), of_column = static_cast<A>(gamma / n);
      std::vector<A> slope(n), along(n), own_mean(n), other_mean(n);
      for (int64_t i = 0; i < n; ++i) {
        const DistPair<A>& c = by_column[i];
        slope[i] = -of_column * c.inverse[own] * c.inverse[other];
        along[i] = of_column * c.inverse[own] * c.inverse[own] * c.along[own];
        own_mean[i] = c.mean[own], other_mean[i] = c.mean[other];
      }
      const MatrixRows out(*grads[own], kDistOp);
      const A scale = static_cast<A>(rows * temperature);
      parallel(rows, 8192 / n + 1, [&](int64_t begin, int64_t end) {
        std::vector<A> g(n);
        for (int64_t row = begin; row < end; ++row) {
          const A *x = kept[own].data() + row * stride, *y = kept[other].data() + row * stride;
          const DistPair<A>& r = by_row[row];
          const A row_slope = -of_row * r.inverse[own] * r.inverse[other];
          const A row_along = of_row * r.inverse[own] * r.inverse[own] * r.along[own];
          const A x_mean = r.mean[own], y_mean = r.mean[other];
          A sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < n; ++i) {
            g[i] = row_slope * (y[i] - y_mean) + row_along * (x[i] - x_mean);
            g[i] += slope[i] * (y[i] - other_mean[i]) + along[i] * (x[i] - own_mean[i]);
            sum += x[i] * g[i];
          }
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) g[i] = scale * x[i] * (g[i] - sum);
          out.write(row, g.data());
        }
      });
    }
  });
}

}  // namespace fastkd
