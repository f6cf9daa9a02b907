// CRD's contrastive loss: rows of the memory bank are gathered a vector's worth at a time and used twice in L1.
#include "convert.h"
#include "simd.h"

#include <numeric>

namespace fastkd {
namespace {

template <class A>
inline A dot_product(const A* a, const A* b, int64_t n) {
  using S = Simd<A>;
  typename S::type even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * S::lanes <= n; c += 2 * S::lanes) {
    even += S::load(a + c) * S::load(b + c);
    odd += S::load(a + c + S::lanes) * S::load(b + c + S::lanes);
  }
  A sum = sum_of_lanes<A>(even + odd);
  for (; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

// out += the sum of weight * row, a vector of columns at a time in a register.
template <class A>
inline void add_weighted(const A* const* rows, const A* weights, int64_t count, int64_t n, A* out) {
  using S = Simd<A>;
  int64_t c = 0;
  for (; c + S::lanes <= n; c += S::lanes) {
    auto sum = S::load(out + c);
    for (int64_t k = 0; k < count; ++k) sum += S::load(rows[k] + c) * weights[k];
    S::store(out + c, sum);
  }
  for (; c < n; ++c)
    for (int64_t k = 0; k < count; ++k) out[c] += weights[k] * rows[k][c];
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// One sample: returns its sum of logistic losses, leaves the sum of slope * row in `grad`.
template <class A, class T>
double contrast_sample(const A* f, const T* bank, const int64_t* index, int64_t columns, int64_t width, A inverse,
                       A shift, A* grad, A* scratch) {
  using S = Simd<A>;
  using V = typename S::type;
  constexpr int64_t lanes = S::lanes;
  const A* rows[lanes];
  alignas(64) A u[lanes] = {}, sign[lanes], weights[lanes];
  std::fill_n(grad, width, A(0));
  double total = 0;
  for (int64_t first = 0; first < columns; first += lanes) {
    const int64_t count = std::min(lanes, columns - first);
    for (int64_t k = first + lanes; k < std::min(first + 2 * lanes, columns); ++k)
      prefetch_row(bank + index[k] * width, width * sizeof(T));
    for (int64_t k = 0; k < count; ++k) {
      rows[k] = read_line(bank + index[first + k] * width, width, 1, scratch + k * width);
      u[k] = dot_product(rows[k], f, width);
    }
    for (int64_t k = 0; k < lanes; ++k) sign[k] = first + k == 0 ? A(-1) : A(1);
    // softplus(v) = max(v, 0) + log(1 + e^-|v|), v = -u for the positive
    const V v = (S::load(u) * inverse - shift) * S::load(sign), zero{};
    const V e = exp(v < zero ? v : -v), above = e + A(1), positive = v > zero ? v : zero;
    S::store(weights, S::load(sign) * ((v > zero ? zero + A(1) : e) / above));
    double product = 1;  // of numbers between 1 and 2: one logarithm for all
    for (int64_t k = 0; k < count; ++k) {
      total += positive[k];
      product *= above[k];
    }
    total += std::log(product);
    add_weighted(rows, weights, count, width, grad);
  }
  return total;
}

}  // namespace

void crd_nce_loss(const Tensor& feature, const Tensor& bank, const Tensor& index, const Tensor& shift,
                  double temperature, double constant, const Tensor& grad_feature, const Tensor& loss) {
  constexpr const char* op = "crd_nce_loss";
  check_contiguous(feature, op, "feature");
  check_contiguous(bank, op, "bank");
  check_contiguous(index, op, "contrast_index");
  check_contiguous(grad_feature, op, "grad_feature");
  const int64_t samples = feature.size(0), width = feature.size(1), columns = index.size(1), n_data = bank.size(0);
  const int64_t* indices = data<int64_t>(index);
  FASTKD_CHECK(std::all_of(indices, indices + samples * columns, [&](int64_t i) { return i >= 0 && i < n_data; }),
               "crd_nce_loss", "contrast_index: got a row outside the bank, expected 0 to ", n_data - 1);
  const auto run = [&](auto wide, auto narrow) {
    using A = typename decltype(wide)::type;
    using T = typename decltype(narrow)::type;
    const A *f = data<A>(feature), offset = *data<A>(shift), inverse = A(1 / temperature);
    A* grad = mutable_data<A>(grad_feature);
    std::vector<double> partial(samples);
    parallel(samples, 32768 / (columns * width) + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch((std::is_same_v<A, T> ? 0 : Simd<A>::lanes) * width);
      for (int64_t n = begin; n < end; ++n) {
        A* out = grad + n * width;
        partial[n] = contrast_sample(f + n * width, data<T>(bank), indices + n * columns, columns, width, inverse,
                                     offset, out, scratch.data());
        const A scale = inverse / samples;
        for (int64_t c = 0; c < width; ++c) out[c] *= scale;
      }
    });
    const double sum = std::accumulate(partial.begin(), partial.end(), 0.0);
    *mutable_data<A>(loss) = static_cast<A>(sum / samples + constant);
  };
  for_float(bank.scalar_type(), op, [&](auto type) {
    using T = typename decltype(type)::type;
    FASTKD_CHECK(feature.scalar_type() == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float),
                 "crd_nce_loss", "feature must be float32, or float64 like the bank");
    run(Type<Accumulate<T>>{}, type);
  });
}

}  // namespace fastkd
