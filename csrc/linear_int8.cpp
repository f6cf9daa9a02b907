// A linear layer on 8-bit integers: rows of x are quantised as they are packed, and the exact sums become floats on the
// way out. The weight comes packed (fastkd/ops/blocks/linear_int8.py).
#include "convert.h"
#include "gelu_math.h"
#include "gemm_int8.h"
#include "simd.h"

namespace fastkd {
namespace {

using gelu_math::V;
typedef int32_t Int __attribute__((vector_size(64)));

// 16 numbers at p, of which `count` exist; the others are zero.
template <class T>
inline V load16(const T* p, int64_t count) {
  alignas(64) float line[16] = {};
  convert_row(p, std::min<int64_t>(count, 16), line);
  return Simd<float>::load(line);
}
#if defined(__AVX512BF16__)
inline V load16(const BFloat16* p, int64_t count) {
  const __m256i bits = count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                   : _mm256_maskz_loadu_epi16((1 << count) - 1, p);
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
#endif

// The first `count` of 16 numbers to p.
template <class T>
inline void store16(V x, int64_t count, T* p) {
  alignas(64) float line[16];
  Simd<float>::store(line, x);
  convert_row(line, std::min<int64_t>(count, 16), p);
}
#if defined(__AVX512BF16__)
inline void store16(V x, int64_t count, BFloat16* p) {
  const auto bits = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  if (count >= 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  else _mm256_mask_storeu_epi16(p, (1 << count) - 1, bits);
}
#endif

// To the nearest integer, to even where two are equally near, as 16 bytes.
inline void store_codes(V x, int8_t* to, Int& sum) {
#if defined(__AVX512F__)
  const __m512i codes = _mm512_cvtps_epi32((__m512)x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
  sum += (Int)codes;
#else
  for (int64_t k = 0; k < 16; ++k) {
    const int32_t code = static_cast<int32_t>(__builtin_rintf(x[k]));
    to[k] = static_cast<int8_t>(code);
    sum[k] += code;
  }
#endif
}

// One row to codes round(x 127 / max |x|), zero from `width` to the end of its last tile, 64 to a tile of 16 rows.
// Returns the scale. All in float32 with the roundings of the reference; a NaN anywhere makes the scale NaN.
template <class T>
inline float quantize_row(const T* x, int64_t width, int64_t tiles, int8_t* to, int32_t& row_sum) {
  constexpr int32_t size_bits = 0x7fffffff, tiny = 0x0da24260;  // 1e-30; sizes compare as integers do, NaN above all
  Int most = Int{} + tiny;
  for (int64_t i = 0; i < width; i += 16) {
    const Int size = (Int)load16(x + i, width - i) & size_bits;
    most = size > most ? size : most;
  }
  int32_t largest = tiny;
  for (int64_t k = 0; k < 16; ++k) largest = std::max(largest, most[k]);
  float size;
  std::memcpy(&size, &largest, 4);
  const float inverse = 127.0f / size;
  Int sum = {};
  for (int64_t l = 0; l < tiles; ++l, to += int8::kTile)
    for (int64_t k = 0; k < 64; k += 16) {
      const int64_t i = 64 * l + k;
      store_codes(i < width ? load16(x + i, width - i) * inverse : V{}, to + k, sum);
    }
  row_sum = 0;
  for (int64_t k = 0; k < 16; ++k) row_sum += sum[k];
  return size / 127.0f;
}

// What becomes of 16 sums of a row, of which `count` exist: factors, bias, GELU where wanted.
template <class T>
inline void finish16(const int32_t* sums, float row_factor, const float* factor, const float* shift, bool gelu,
                     int64_t count, T* to) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t k = 0; k < std::min<int64_t>(count, 16); ++k) {
      const double x = sums[k] * (static_cast<double>(row_factor) * factor[k]) + shift[k];
      to[k] = gelu ? x * 0.5 * std::erfc(-x * M_SQRT1_2) : x;
    }
  } else {
    Int bits;
    std::memcpy(&bits, sums, 64);
    V x = __builtin_convertvector(bits, V) * (row_factor * Simd<float>::load(factor)) + Simd<float>::load(shift);
    if (gelu) {
      V bell;
      x *= gelu_math::gaussian_for<T>(x, bell);
    }
    store16(x, count, to);
  }
}

template <class Kernel, class T>
void linear_int8_on(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                    bool gelu, const Tensor& out) {
  const int64_t m = x.size(0), depth = x.size(1), n = scale.size(0), tiles = (depth + 63) / 64;
  const T* from = data<T>(x);
  T* to = mutable_data<T>(out);
  std::vector<float> factor(round_up(n, 32)), shift(round_up(n, 32));
  std::copy_n(data<float>(scale), n, factor.begin());
  if (bias) std::copy_n(data<float>(*bias), n, shift.begin());
  std::vector<float> row_scale(round_up(m, 32));
  int8::gemm<Kernel>(
      m, n, depth, data<int8_t>(packed),
      [&](int64_t row, int8_t* strip, int32_t* row_sums) {
        for (int64_t r = 0; r < std::min<int64_t>(16, m - row); ++r)
          row_scale[row + r] = quantize_row(from + (row + r) * x.stride(0), depth, tiles, strip + 64 * r, row_sums[r]);
      },
      [&](int64_t i, int64_t j, const int32_t* c) {
        for (int64_t r = 0; r < std::min<int64_t>(32, m - i); ++r, c += 32)
          for (int64_t k = 0; k < std::min<int64_t>(32, n - j); k += 16)
            finish16(c + k, row_scale[i + r], &factor[j + k], &shift[j + k], gelu, n - j - k, to + (i + r) * n + j + k);
      });
}

}  // namespace

// x [M, K] floating with dense rows, packed [ceil(N / 32) * 2, ceil(K / 64) * 16, 16, 4] int8, scale [N] and bias [N]
// float32 -> out [M, N] like x, of which GELU is taken where wanted.
void linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                 bool gelu, const Tensor& out) {
  const int64_t m = x.size(0), depth = x.size(1), n = scale.size(0);
  const bool sizes = packed.numel() == round_up(n, 32) * round_up(depth, 64) && out.size(0) == m && out.size(1) == n;
  FASTKD_CHECK(sizes && (depth == 1 || x.stride(1) == 1) && packed.is_contiguous() && scale.is_contiguous() &&
                   out.is_contiguous() && packed.scalar_type() == ScalarType::Char &&
                   scale.scalar_type() == ScalarType::Float && out.scalar_type() == x.scalar_type() &&
                   (!bias || (bias->is_contiguous() && bias->size(0) == n && bias->scalar_type() == ScalarType::Float)),
               "linear_int8", "shapes, dtypes or strides do not match");
  for_float(x.scalar_type(), "linear_int8", [&](auto type) {
    using T = typename decltype(type)::type;
#if defined(FASTKD_AMX) && defined(__AMX_INT8__)
    if (int8::Amx::available()) return linear_int8_on<int8::Amx, T>(x, packed, scale, bias, gelu, out);
#endif
#if defined(__AVX512F__)
    if (int8::Vnni::available()) return linear_int8_on<int8::Vnni, T>(x, packed, scale, bias, gelu, out);
#endif
    linear_int8_on<int8::Plain, T>(x, packed, scale, bias, gelu, out);
  });
}

}  // namespace fastkd
