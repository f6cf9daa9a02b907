// exp for double vectors, to about 1e-16: 2^n times the Taylor polynomial of degree 13 on [-ln2/2, ln2/2].
#pragma once

#include "simd.h"

namespace fastkd {

// Below -700 (-inf included) it is 0; above 700 the result is not defined.
inline Simd<double>::type exp_double(Simd<double>::type x) {
  using S = Simd<double>;
  typedef uint64_t Bits __attribute__((vector_size(64)));
  constexpr double inverse_factorial[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
  const auto underflow = x < -700.0;
  const S::type inside = underflow ? S::type{} : x;
  const S::type magic = S::splat(6755399441055744.0);  // 1.5 * 2^52: adding it rounds
  const S::type shifted = inside * 1.44269504088896341 + magic, n = shifted - magic;
  const S::type r = (inside - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  S::type p{};
  for (const double c : inverse_factorial) p = p * r + c;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const Bits exponent = (bits + 1023) << 52;  // the low bits of `shifted` hold n
  S::type scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return underflow ? S::type{} : p * scale;
}

}  // namespace fastkd
