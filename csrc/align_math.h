// The element-wise maths of feature_alignment_loss, for the CPU and the CUDA kernel alike.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FASTKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTKD_HOST_DEVICE inline
#endif

namespace fastkd {

// The order of LOSSES in fastkd/ops/features/feature_alignment.py.
enum AlignLoss : int { kL1, kL2, kSmoothL1, kCosine };

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

  // What one element adds to its row's sum.
  template <int kind>
  FASTKD_HOST_DEVICE A value(A u, A v) const {
    const A d = u - v, size = std::fabs(d);
    if constexpr (kind == kL1) return size;
    if constexpr (kind == kL2) return d * d;
    if constexpr (kind == kSmoothL1) return size < beta ? A(0.5) * d * d * inverse_beta : size - A(0.5) * beta;
    if constexpr (kind == kCosine) return u * v;
  }

  // The row's share of the loss.
  template <int kind>
  FASTKD_HOST_DEVICE A finish(A sum) const {
    return scale * (kind == kCosine ? A(1) - sum : sum);
  }

  // d loss / d u of one element, before `scale`.
  template <int kind>
  static FASTKD_HOST_DEVICE A gradient(A u, A v, A inverse_beta) {
    const A d = u - v;
    if constexpr (kind == kL1) return A(d > 0) - A(d < 0);
    if constexpr (kind == kL2) return A(2) * d;
    if constexpr (kind == kSmoothL1) {
      const A slope = d * inverse_beta;
      return slope > A(1) ? A(1) : slope < A(-1) ? A(-1) : slope;
    }
    if constexpr (kind == kCosine) return -v;
  }
};

}  // namespace fastkd
