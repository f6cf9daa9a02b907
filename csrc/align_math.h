// The element-wise maths of feature_alignment_loss, for the CPU and the CUDA kernel alike.
#pragma once

#include <cmath>
#include <type_traits>

#ifdef __CUDACC__
#define FASTKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTKD_HOST_DEVICE inline
#endif

namespace fastkd {

// The order of LOSSES in fastkd/ops/features/feature_alignment.py.
enum AlignLoss : int { kL1, kL2, kSmoothL1, kCosine };

// Calls f(std::integral_constant<int, kind>{}).
template <class F>
FASTKD_HOST_DEVICE void for_kind(int kind, const F& f) {
  switch (kind) {
    case kL1: return f(std::integral_constant<int, kL1>{});
    case kL2: return f(std::integral_constant<int, kL2>{});
    case kSmoothL1: return f(std::integral_constant<int, kSmoothL1>{});
    default: return f(std::integral_constant<int, kCosine>{});
  }
}

template <class A>
struct Align {
  A beta, inverse_beta;
  A scale;  // of one element in the mean: 1 / (rows * width); for cosine, whose mean is over rows, 1 / rows
  static constexpr A kFloor = A(1e-12);

  Align(double beta_, double rows, double width, int kind)
      : beta(A(beta_)), inverse_beta(A(1 / beta_)), scale(A(1 / (kind == kCosine ? rows : rows * width))) {}

  // 1 / max(||x||, 1e-12) from the sum of squares.
  static FASTKD_HOST_DEVICE A inverse_norm(A squares) {
    const A norm = std::sqrt(squares);
    return A(1) / (norm < kFloor ? kFloor : norm);
  }
  static FASTKD_HOST_DEVICE bool below_floor(A squares) { return std::sqrt(squares) < kFloor; }

  // What one element adds to its row's sum: 0 where u = v = 0.
  template <int kind>
  FASTKD_HOST_DEVICE A value(A u, A v) const {
    const A d = u - v, size = std::fabs(d);
    if constexpr (kind == kL1) {
      return size;
    } else if constexpr (kind == kL2) {
      return d * d;
    } else if constexpr (kind == kSmoothL1) {
      return size < beta ? A(0.5) * d * d * inverse_beta : size - A(0.5) * beta;
    } else {
      return u * v;
    }
  }

  // The row's share of the loss.
  FASTKD_HOST_DEVICE A finish(int kind, A sum) const { return scale * (kind == kCosine ? A(1) - sum : sum); }

  // d loss / d u of one element, before `scale`.
  template <int kind>
  static FASTKD_HOST_DEVICE A gradient(A u, A v, A inverse_beta) {
    const A d = u - v;
    if constexpr (kind == kL1) {
      return A(d > 0) - A(d < 0);
    } else if constexpr (kind == kL2) {
      return A(2) * d;
    } else if constexpr (kind == kSmoothL1) {
      const A slope = d * inverse_beta;
      return slope > A(1) ? A(1) : slope < A(-1) ? A(-1) : slope;
    } else {
      return -v;
    }
  }
};

}  // namespace fastkd
