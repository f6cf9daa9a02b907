// Feature alignment: each pair of rows is normalised, compared and differentiated while it sits in the L1 cache.
#include "align_math.h"
#include "rows.h"

#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kAlignOp = "feature_alignment_loss";

template <class A>
struct AlignRow {
  const A *u, *v;  // the rows to compare
  A squares = 0;   // ||student row||^2

  // `scratch`: two rows. The normalised rows are stored before they are compared: a product that went straight into the
  // difference could be contracted to a fused multiply-add, and equal rows would then differ by a rounding.
  AlignRow(const Rows<A>& student, const Rows<A>& teacher, int64_t row, bool normalize, A* scratch) {
    const int64_t n = student.width();
    const A *s = student.read(row, scratch), *t = teacher.read(row, scratch + n);
    u = s;
    v = t;
    if (!normalize) return;
    A of_s = 0, of_t = 0;
#pragma omp simd reduction(+ : of_s, of_t)
    for (int64_t i = 0; i < n; ++i) {
      of_s += s[i] * s[i];
      of_t += t[i] * t[i];
    }
    squares = of_s;
    u = scaled(s, Align<A>::inverse_norm(of_s), n, scratch);
    v = scaled(t, Align<A>::inverse_norm(of_t), n, scratch + n);
  }

  static const A* scaled(const A* x, A factor, int64_t n, A* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
    return out;
  }
};

template <int kind, class A>
A align_sum(const Align<A>& align, const A* u, const A* v, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += align.template value<kind>(u[i], v[i]);
  return sum;
}

// Gradient of one row; `out` may be the row that u was read from.
template <int kind, class A>
void align_gradient(const Align<A>& align, const AlignRow<A>& row, bool normalize, A scale, int64_t n, A* g, A* out) {
  A along = 0;
  const A *u = row.u, *v = row.v, inverse_beta = align.inverse_beta;
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < n; ++i) {
    g[i] = scale * Align<A>::template gradient<kind>(u[i], v[i], inverse_beta);
    along += u[i] * g[i];
  }
  if (!normalize) {
    std::copy_n(g, n, out);
    return;
  }
  if (Align<A>::below_floor(row.squares)) along = 0;
  const A factor = Align<A>::inverse_norm(row.squares);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (g[i] - u[i] * along) * factor;
}

template <class F>
void align_dispatch(const Tensor& student, const Tensor& teacher, int64_t kind, F&& f) {
  FASTKD_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1) &&
                   student.size(2) == teacher.size(2),
               "feature_alignment_loss", "student and teacher must have one shape");
  for_kind(static_cast<int>(kind), [&](auto k) {
    if (student.scalar_type() == ScalarType::Double) {
      f(k, Type<double>{});
    } else {
      f(k, Type<float>{});
    }
  });
}

}  // namespace

void feature_alignment_loss(const Tensor& student, const Tensor& teacher, int64_t kind, bool normalize, double beta,
                            const Tensor& loss) {
  align_dispatch(student, teacher, kind, [&](auto k, auto type) {
    using A = typename decltype(type)::type;
    const Rows<A> s(student, kAlignOp), t(teacher, kAlignOp);
    const int64_t rows = s.count(), n = s.width();
    const Align<A> align(beta, rows, n, k);
    std::vector<double> partial(rows);
    parallel(rows, 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(2 * n);
      for (int64_t row = begin; row < end; ++row) {
        const AlignRow<A> x(s, t, row, normalize, scratch.data());
        partial[row] = align.finish(k, align_sum<k>(align, x.u, x.v, n));
      }
    });
    // Summed in row order: the same bits for any number of threads.
    *mutable_data<A>(loss) = static_cast<A>(std::accumulate(partial.begin(), partial.end(), 0.0));
  });
}

void feature_alignment_loss_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     int64_t kind, bool normalize, double beta, const Tensor& grad_student) {
  check_contiguous(grad_student, "feature_alignment_loss_backward", "grad_student");
  align_dispatch(student, teacher, kind, [&](auto k, auto type) {
    using A = typename decltype(type)::type;
    const Rows<A> s(student, kAlignOp), t(teacher, kAlignOp), out(grad_student, kAlignOp);
    const int64_t rows = s.count(), n = s.width();
    const Align<A> align(beta, rows, n, k);
    const A scale = *data<A>(grad_loss) * align.scale;
    parallel(rows, 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(4 * n);
      for (int64_t row = begin; row < end; ++row) {
        const AlignRow<A> x(s, t, row, normalize, scratch.data());
        A *g = scratch.data() + 2 * n, *direct = out.in_place(row), *result = direct ? direct : g + n;
        align_gradient<k>(align, x, normalize, scale, n, g, result);
        if (!direct) out.write(row, result);
      }
    });
  });
}

}  // namespace fastkd
