// log(1 + x) for vectors, beside the exp of simd.h.
#pragma once

#include "simd.h"

namespace fastkd {

// For x > -1; relative error about 3e-7 also where x is tiny. x is cut at -1 + 2^-24.
inline Simd<float>::type log1p(Simd<float>::type x) {
  using S = Simd<float>;
  typedef int32_t Int __attribute__((vector_size(64)));
  const S::type lowest = S::splat(-0.99999994f);
  x = x < lowest ? lowest : x;
  const S::type u = 1.0f + x, lost = x - (u - 1.0f);  // u + lost = 1 + x
  Int bits;
  std::memcpy(&bits, &u, sizeof(bits));
  const Int shifted = bits - 0x3f3504f3;  // the bits of sqrt(1/2): the mantissa comes to [sqrt(1/2), sqrt(2))
  const Int exponent = shifted >> 23;
  const Int mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
  S::type m;
  std::memcpy(&m, &mantissa, sizeof(m));
  const S::type n = __builtin_convertvector(exponent, S::type), r = m - 1.0f;
  S::type p = S::splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const S::type square = r * r;
  const S::type low = (p * r - 0.5f) * square + n * -2.12194440e-4f + lost * reciprocal(u);
  return n * 0.693359375f + (r + low);
}

inline Simd<double>::type log1p(Simd<double>::type x) {
  for (int64_t i = 0; i < Simd<double>::lanes; ++i) x[i] = std::log1p(x[i]);
  return x;
}

inline Simd<double>::type reciprocal(Simd<double>::type x) { return 1.0 / x; }

}  // namespace fastkd
