// Student rows against teacher rows that are found by patch index and normalised while they sit in the L1 cache.
#include "rows.h"

#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kGatherOp = "gather_whiten_smooth_l1";

// The orders of NORMS and LOSSES in fastkd/ops/features/gather_whiten.py.
enum TeacherNorm : int { kWhiten, kUnitLength, kAsIs, kBatchWide };
enum GatherLoss : int { kTwiceSmoothL1, kSquared, kAbsolute };

// Sum of term(i) over [0, n), in four running sums: a single one would wait for each of its additions.
template <class A, class F>
A sum_terms(int64_t n, const F& term) {
  const int64_t q = n / 4;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += term(i);
    s1 += term(q + i);
    s2 += term(2 * q + i);
    s3 += term(3 * q + i);
  }
  for (int64_t i = 4 * q; i < n; ++i) s0 += term(i);
  return (s0 + s1) + (s2 + s3);
}

template <class A>
class GatheredRows {
 public:
  GatheredRows(const Tensor& student, const Tensor& teacher, const Tensor& ids, const std::optional<Tensor>& statistics,
               int64_t norm, int64_t num_prefix)
      : student_(student, kGatherOp), teacher_(teacher, kGatherOp), ids_(data<int64_t>(ids)), ids_b_(ids.stride(0)),
        ids_k_(ids.stride(1)), tokens_(student.size(1)), first_(tokens_ - ids.size(1)),
        patches_(teacher.size(1) - num_prefix), prefix_(num_prefix), norm_(norm) {
    FASTKD_CHECK(ids.scalar_type() == ScalarType::Long && student.size(0) == teacher.size(0) &&
                     student.size(2) == teacher.size(2) && first_ >= 0 && first_ <= prefix_ && patches_ >= 0,
                 "gather_whiten_smooth_l1", "student, teacher and ids_keep do not fit");
    // Here, once: an exception must not leave a parallel loop.
    for (int64_t b = 0; b < student.size(0); ++b)
      for (int64_t j = 0; j < ids.size(1); ++j)
        FASTKD_CHECK(patch(b, j) >= 0 && patch(b, j) < patches_, "gather_whiten_smooth_l1", "ids_keep: got patch ",
                     patch(b, j), ", expected 0 to ", patches_ - 1);
    if (norm_ == kBatchWide) {
      FASTKD_CHECK(statistics.has_value(), "gather_whiten_smooth_l1", "bn needs statistics");
      mean_ = data<A>(*statistics)[0];
      factor_ = data<A>(*statistics)[1];
    }
  }

  int64_t count() const { return student_.count(); }
  int64_t width() const { return student_.width(); }

  // The student's row minus its normalised teacher row, in `d`; `scratch`: two rows.
  void difference(int64_t row, A* scratch, A* d) const {
    const int64_t n = width(), b = row / tokens_, k = row % tokens_;
    const int64_t source = b * (prefix_ + patches_) + (k < first_ ? k : prefix_ + patch(b, k - first_));
    const A *y = student_.read(row, scratch), *t = teacher_.read(source, scratch + n);
    A shift = mean_, factor = factor_;
    if (norm_ == kWhiten) {
      shift = sum_terms<A>(n, [&](int64_t i) { return t[i]; }) / n;
      const A squares = sum_terms<A>(n, [&](int64_t i) { return (t[i] - shift) * (t[i] - shift); });
      factor = A(1) / std::sqrt(squares / n + A(1e-5));
    } else if (norm_ == kUnitLength) {
      const A squares = sum_terms<A>(n, [&](int64_t i) { return t[i] * t[i]; });
      factor = A(1) / std::max(std::sqrt(squares), A(1e-12));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) d[i] = y[i] - (t[i] - shift) * factor;
  }

 private:
  int64_t patch(int64_t b, int64_t j) const { return ids_[b * ids_b_ + j * ids_k_]; }

  Rows<A> student_, teacher_;
  const int64_t* ids_;
  int64_t ids_b_, ids_k_, tokens_, first_, patches_, prefix_, norm_;
  A mean_ = 0, factor_ = 1;
};

template <class A>
A gather_sum(int64_t kind, const A* d, int64_t n) {
  if (kind == kSquared) return sum_terms<A>(n, [&](int64_t i) { return d[i] * d[i]; });
  if (kind == kAbsolute) return sum_terms<A>(n, [&](int64_t i) { return std::fabs(d[i]); });
  return sum_terms<A>(n, [&](int64_t i) {
    const A size = std::fabs(d[i]);
    return size < A(1) ? size * size : A(2) * size - A(1);
  });
}

template <class A>
void gather_gradient(int64_t kind, const A* d, int64_t n, A scale, A* out) {
  if (kind == kTwiceSmoothL1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = A(2) * scale * (d[i] > A(1) ? A(1) : d[i] < A(-1) ? A(-1) : d[i]);
  } else if (kind == kSquared) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = A(2) * scale * d[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = scale * (A(d[i] > 0) - A(d[i] < 0));
  }
}

template <class F>
void for_gather_type(const Tensor& student, const F& f) {
  if (student.scalar_type() == ScalarType::Double) {
    f(Type<double>{});
  } else {
    f(Type<float>{});
  }
}

}  // namespace

void gather_whiten_smooth_l1(const Tensor& student, const Tensor& teacher, const Tensor& ids,
                             const std::optional<Tensor>& statistics, int64_t norm, int64_t kind, int64_t num_prefix,
                             const Tensor& loss) {
  for_gather_type(student, [&](auto type) {
    using A = typename decltype(type)::type;
    const GatheredRows<A> rows(student, teacher, ids, statistics, norm, num_prefix);
    const int64_t n = rows.width();
    std::vector<double> partial(rows.count());
    parallel(rows.count(), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(3 * n);
      A* d = scratch.data() + 2 * n;
      for (int64_t row = begin; row < end; ++row) {
        rows.difference(row, scratch.data(), d);
        partial[row] = gather_sum(kind, d, n);
      }
    });
    // Summed in row order: the same bits for any number of threads.
    const double sum = std::accumulate(partial.begin(), partial.end(), 0.0);
    *mutable_data<A>(loss) = static_cast<A>(sum / (static_cast<double>(rows.count()) * n));
  });
}

void gather_whiten_smooth_l1_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                      const Tensor& ids, const std::optional<Tensor>& statistics, int64_t norm,
                                      int64_t kind, int64_t num_prefix, const Tensor& grad_student) {
  check_contiguous(grad_student, "gather_whiten_smooth_l1_backward", "grad_student");
  for_gather_type(student, [&](auto type) {
    using A = typename decltype(type)::type;
    const GatheredRows<A> rows(student, teacher, ids, statistics, norm, num_prefix);
    const Rows<A> out(grad_student, kGatherOp);
    const int64_t n = rows.width();
    const A scale = *data<A>(grad_loss) / (static_cast<A>(rows.count()) * static_cast<A>(n));
    parallel(rows.count(), 16384 / n + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(3 * n);
      A* d = scratch.data() + 2 * n;
      for (int64_t row = begin; row < end; ++row) {
        rows.difference(row, scratch.data(), d);
        A *direct = out.in_place(row), *result = direct ? direct : d;
        gather_gradient(kind, d, n, scale, result);
        if (!direct) out.write(row, result);
      }
    });
  });
}

}  // namespace fastkd
