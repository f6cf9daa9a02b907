// Rows on the unit sphere, times a scale, and the gradient through that: the two ends of class_vector_kd.
#include "align_math.h"
#include "rows.h"

#include <algorithm>

namespace fastkd {

// x [N, D], any floating dtype and strides -> out [N, D] = scale x / max(||x||, 1e-12), norms [N]; float32 or float64.
void unit_rows(const Tensor& x, double scale, const Tensor& out, const Tensor& norms) {
  FASTKD_CHECK(x.dim() == 3 && out.dim() == 2 && out.is_contiguous() && out.size(0) == x.size(1), "unit_rows",
               "shapes do not match");
  const auto run = [&](auto type) {
    using A = typename decltype(type)::type;
    const Rows<A> from(x, "unit_rows");
    const int64_t n = from.width();
    A *to = mutable_data<A>(out), *lengths = mutable_data<A>(norms);
    parallel(from.count(), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        A* line = to + row * n;
        const A* values = from.read(row, line);
        A squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += values[i] * values[i];
        lengths[row] = std::sqrt(squares);
        const A by = A(scale) * Align<A>::inverse_norm(squares);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) line[i] = values[i] * by;
      }
    });
  };
  if (out.scalar_type() == ScalarType::Double) run(Type<double>{});
  else run(Type<float>{});
}

// grad, unit [N, D], norms [N] -> grad_x = factor (grad - u (u . grad)) / norm with u = unit / scale.
void unit_rows_backward(const Tensor& grad, const Tensor& unit, const Tensor& norms, double scale, double factor,
                        const Tensor& grad_x) {
  FASTKD_CHECK(grad.is_contiguous() && unit.is_contiguous() && grad_x.is_contiguous() && grad.dim() == 2,
               "unit_rows_backward", "expected contiguous matrices");
  const auto run = [&](auto type) {
    using A = typename decltype(type)::type;
    const int64_t n = grad.size(1);
    const A *from = data<A>(grad), *on_sphere = data<A>(unit), *lengths = data<A>(norms);
    A* to = mutable_data<A>(grad_x);
    parallel(grad.size(0), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const A *g = from + row * n, *u = on_sphere + row * n;
        A along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < n; ++i) along += u[i] * g[i];
        along = lengths[row] < Align<A>::kFloor ? A(0) : along / A(scale * scale);
        const A by = A(factor) / std::max(lengths[row], Align<A>::kFloor);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[row * n + i] = (g[i] - u[i] * along) * by;
      }
    });
  };
  if (grad.scalar_type() == ScalarType::Double) run(Type<double>{});
  else run(Type<float>{});
}

}  // namespace fastkd
