// Exact GELU; float64 uses the C library.
#include "convert.h"
#include "gelu_math.h"

namespace fastkd {
namespace {

using gelu_math::V;

// Vectors of 16 numbers at p.
inline V load(const float* p) { return Simd<float>::load(p); }
inline void store(V v, float* p) { Simd<float>::store(p, v); }
template <class T>
inline V load(const T* p) {
  alignas(64) float line[16];
  convert_row(p, 16, line);
  return Simd<float>::load(line);
}
template <class T>
inline void store(V v, T* p) {
  alignas(64) float line[16];
  Simd<float>::store(line, v);
  convert_row(line, 16, p);
}
#if defined(__AVX512BF16__)
inline V load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline void store(V v, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// out[i] = f(in[i]...) in vectors; the last few through copies on the stack.
template <class T, class F, class... In>
void map(int64_t n, const F& f, T* out, const In*... in) {
  constexpr int64_t block = 4096;
  parallel((n + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(n, end * block);
    int64_t i = begin * block;
    for (; i + 16 <= stop; i += 16) store(f(load(in + i)...), out + i);
    if (i == stop) return;
    const auto last = [&](const T* from) {
      T line[16] = {};
      std::copy_n(from + i, stop - i, line);
      return load(line);
    };
    T line[16];
    store(f(last(in)...), line);
    std::copy_n(line, stop - i, out + i);
  });
}

}  // namespace

void gelu(const Tensor& x, const Tensor& out) {
  for_float(x.scalar_type(), "gelu", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < x.numel(); ++i) to[i] = from[i] * 0.5 * std::erfc(-from[i] * M_SQRT1_2);
    } else {
      map(x.numel(), gelu_math::gelu<T>, to, from);
    }
  });
}

void gelu_backward(const Tensor& grad_out, const Tensor& x, const Tensor& grad_x) {
  for_float(x.scalar_type(), "gelu_backward", [&](auto type) {
    using T = typename decltype(type)::type;
    const T *from = data<T>(x), *upstream = data<T>(grad_out);
    T* to = mutable_data<T>(grad_x);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < x.numel(); ++i) {
        const double phi = std::exp(-0.5 * from[i] * from[i]) * 0.3989422804014327;
        to[i] = upstream[i] * (0.5 * std::erfc(-from[i] * M_SQRT1_2) + from[i] * phi);
      }
    } else {
      map(x.numel(), [](V v, V g) { return gelu_math::gelu_slope<T>(v) * g; }, to, from, upstream);
    }
  });
}

}  // namespace fastkd
