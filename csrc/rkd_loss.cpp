// Relational distillation: all pairs and triples of a batch from its matrix of squared distances, which stays in cache.
#include "convert.h"
#include "simd.h"

#include <numeric>

namespace fastkd {
namespace {

// The batch's squared distances, and their inverse roots with 0 where two rows count as one point. Rows are padded with
// zeros to whole vectors, which add nothing to any sum.
template <class A>
struct Relations {
  int64_t n, stride;
  std::vector<A> squares, roots;

  Relations(const Tensor& feature, A eps)
      : n(feature.size(0)), stride(round_up(n, Simd<A>::lanes)), squares(n * stride, A(0)), roots(n * stride, A(0)) {
    const int64_t width = feature.size(1), sn = feature.stride(0), sc = feature.stride(1);
    const int64_t line = round_up(width, Simd<A>::lanes);
    std::vector<A> x(n * line, A(0));
    for_float(feature.scalar_type(), "rkd_loss", [&](auto type) {
      const auto* rows = data<typename decltype(type)::type>(feature);
      for (int64_t i = 0; i < n; ++i) {
        A* to = x.data() + i * line;
        const A* row = read_line(rows + i * sn, width, sc, to);
        if (row != to) std::copy_n(row, width, to);
      }
    });
    // Rows k and n - 1 - k in one task: every task has as many pairs. The middle row of an odd number is done twice.
    parallel((n + 1) / 2, 32768 / (n * width) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        for (const int64_t i : {k, n - 1 - k}) {
          int64_t j = 0;
          for (; j + 4 <= i; j += 4) pairs<4>(i, j, x.data(), line, eps);
          for (; j < i; ++j) pairs<1>(i, j, x.data(), line, eps);
        }
    });
  }

  const A* square(int64_t i) const { return squares.data() + i * stride; }
  const A* root(int64_t i) const { return roots.data() + i * stride; }

 private:
  // Row i against COUNT rows from j on: independent sums, so that additions overlap.
  template <int COUNT>
  void pairs(int64_t i, int64_t j, const A* x, int64_t line, A eps) {
    using S = Simd<A>;
    typename S::type sums[COUNT] = {};
    for (int64_t c = 0; c < line; c += S::lanes) {
      const auto mine = S::load(x + i * line + c);
      for (int m = 0; m < COUNT; ++m) {
        const auto d = S::load(x + (j + m) * line + c) - mine;
        sums[m] += d * d;
      }
    }
    for (int m = 0; m < COUNT; ++m) {
      const A sum = sum_of_lanes<A>(sums[m]);
      squares[i * stride + j + m] = squares[(j + m) * stride + i] = sum;
      if (sum > eps) roots[i * stride + j + m] = roots[(j + m) * stride + i] = 1 / std::sqrt(sum);
    }
  }
};

template <class A>
inline A smooth_slope(A d) {
  return d > A(1) ? A(1) : d < A(-1) ? A(-1) : d;
}

// Adds the distance part's gradient by D (both halves of the symmetric sum: times 2); returns its value.
template <class A>
double add_distances(const Relations<A>& s, const Relations<A>& t, double weight, bool squared, A eps, A* grad) {
  const int64_t n = s.n;
  std::vector<A> lengths(2 * n * n);
  A *of_s = lengths.data(), *of_t = of_s + n * n;
  const auto fill = [&](const Relations<A>& from, A* to) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const A square = std::max(from.square(i)[j], eps);
        to[i * n + j] = squared ? square : std::sqrt(square);
      }
      to[i * n + i] = 0;
      sum += std::accumulate(to + i * n, to + (i + 1) * n, 0.0);
    }
    return sum / (n * (n - 1));
  };
  const double mean = fill(s, of_s);
  const A inverse_s = A(1 / mean), inverse_t = A(1 / fill(t, of_t));
  double value = 0, along = 0;
  for (int64_t i = 0; i < n; ++i) {
    A row_value = 0, row_along = 0;
#pragma omp simd reduction(+ : row_value, row_along)
    for (int64_t j = 0; j < n; ++j) {
      const A d = of_s[i * n + j] * inverse_s - of_t[i * n + j] * inverse_t, h = smooth_slope(d);
      row_value += h * (d - A(0.5) * h);
      row_along += h * of_s[i * n + j];
    }
    value += row_value;
    along += row_along;
  }
  const double elements = static_cast<double>(n) * n;
  const A shared = A(along / (mean * n * (n - 1))), scale = A(weight / (mean * elements));
  for (int64_t k = 0; k < n * n; ++k) {
    const A h = smooth_slope(of_s[k] * inverse_s - of_t[k] * inverse_t), root = s.root(k / n)[k % n];
    if (root != 0) grad[k] += (h - shared) * scale * (squared ? A(2) : root);
  }
  return value / elements * weight;
}

// Row j of the angle part: gradients by D_ij (any i) and by D_jk, in one row, since only the symmetric sum counts.
template <class A>
double angle_row(const Relations<A>& s, const Relations<A>& t, int64_t j, A* by_edge, A* by_far) {
  using S = Simd<A>;
  using V = typename S::type;
  const V one = S::splat(1), half = S::splat(A(0.5));
  std::fill_n(by_far, s.stride, A(0));
  double total = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    const V root_s = S::splat(s.root(j)[i]), root_t = S::splat(t.root(j)[i]);
    const V edge_s = S::splat(s.square(j)[i]), edge_t = S::splat(t.square(j)[i]), curvature = root_s * root_s;
    V value{}, slope{};
    for (int64_t k = 0; k < s.stride; k += S::lanes) {
      const V w_s = root_s * S::load(s.root(i) + k), w_t = root_t * S::load(t.root(i) + k);
      const V cos_s = (edge_s + S::load(s.square(i) + k) - S::load(s.square(j) + k)) * w_s * half;
      const V cos_t = (edge_t + S::load(t.square(i) + k) - S::load(t.square(j) + k)) * w_t * half;
      const V d = cos_s - cos_t, low = d < -one ? -one : d, h = low > one ? one : low;
      value += h * (d - half * h);
      slope += h * (w_s - cos_s * curvature);
      S::store(by_far + k, S::load(by_far + k) - h * w_s);
    }
    by_edge[i] = sum_of_lanes<A>(slope);
    total += sum_of_lanes<A>(value);
  }
  return total;
}

}  // namespace

void rkd_loss(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight, bool squared,
              double eps, const Tensor& laplacian, const Tensor& loss) {
  check_contiguous(laplacian, "rkd_loss", "laplacian");
  FASTKD_CHECK(student.size(0) == teacher.size(0), "rkd_loss", "student and teacher must have as many rows");
  const auto run = [&](auto type) {
    using A = typename decltype(type)::type;
    const int64_t n = student.size(0);
    const Relations<A> s(student, A(eps)), t(teacher, A(eps));
    std::vector<A> half(n * n, A(0));  // the symmetric sum is `half` plus its transpose
    double total = 0;
    if (angle_weight != 0) {
      const double triples = static_cast<double>(n) * n * n;
      const A scale = A(angle_weight / triples);
      std::vector<double> partial(n);
      parallel(n, 16384 / (n * n) + 1, [&](int64_t begin, int64_t end) {
        std::vector<A> by_edge(n), by_far(s.stride);
        for (int64_t j = begin; j < end; ++j) {
          partial[j] = angle_row(s, t, j, by_edge.data(), by_far.data());
          for (int64_t k = 0; k < n; ++k) half[j * n + k] = (by_edge[k] + A(0.5) * by_far[k]) * scale;
        }
      });
      total += std::accumulate(partial.begin(), partial.end(), 0.0) / triples * angle_weight;
    }
    std::vector<A> both(n * n, A(0));
    if (distance_weight != 0) total += add_distances(s, t, distance_weight, squared, A(eps), both.data());
    A* out = mutable_data<A>(laplacian);
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        const A value = i == j ? A(0) : 2 * (both[i * n + j] + half[i * n + j] + half[j * n + i]);
        sum += value;
        out[i * n + j] = -value;
      }
      out[i * n + i] = static_cast<A>(sum);
    }
    *mutable_data<A>(loss) = static_cast<A>(total);
  };
  if (student.scalar_type() == ScalarType::Double)
    run(Type<double>{});
  else
    run(Type<float>{});
}

}  // namespace fastkd
