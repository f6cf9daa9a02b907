// Crop, resize and flip of uint8 images with the bits of Pillow (fastkd/ops/images/resized_crop.py has the formulas).
// A pass along columns works on 16 lines at once, turned so that the 16 pixels above each other lie side by side; a
// pass along rows adds whole lines. Either way a vector holds pixels that share a weight, which keeps it in a register.
#include "common.h"
#include "simd.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastkd {
namespace resize {

constexpr int kPlaces = 22;  // binary places of a weight
constexpr int kLines = 16;   // pixels that are summed side by side

struct Window {
  int64_t first, count;
};

// How one axis of `length` pixels becomes `out`: for each output pixel a window of the input and its weights.
struct Axis {
  int64_t most;  // weights per output pixel
  std::vector<Window> windows;
  std::vector<int32_t> weights;

  Axis(int64_t length, int64_t out);
};

// Products and sums must round one by one, as they do in Pillow: no fused multiply-add.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((noinline, optimize("fp-contract=off")))
#endif
Axis::Axis(int64_t length, int64_t out) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  const double scale = static_cast<double>(length) / out, widening = scale < 1 ? 1 : scale, narrowing = 1 / widening;
  const double support = 2 * widening;
  most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  windows.resize(out);
  weights.assign(out * most, 0);
  std::vector<double> w(most);
  for (int64_t i = 0; i < out; ++i) {
    const double centre = (i + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), length) - first;
    double total = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double x = std::fabs((j + first - centre + 0.5) * narrowing);
      const double near = (1.5 * x - 2.5) * x * x + 1, far = (((x - 5) * x + 8) * x - 4) * -0.5;
      w[j] = x < 1 ? near : x < 2 ? far : 0;
      total += w[j];
    }
    for (int64_t j = 0; j < count; ++j) {
      const double scaled = w[j] / total * (1 << kPlaces);
      weights[i * most + j] = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    windows[i] = {first, count};
  }
}

inline uint8_t to_byte(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kPlaces, 0, 255)); }

// 16 sums of 32 bits, in registers as wide as the CPU has them: wider ones would travel through memory.
struct Sums {
#if defined(__AVX512F__)
  static constexpr int lanes = 16;
#elif defined(__AVX2__)
  static constexpr int lanes = 8;
#else
  static constexpr int lanes = 4;
#endif
  static constexpr int parts = kLines / lanes;
  typedef int32_t Part __attribute__((vector_size(4 * lanes)));
  Part part[parts];

  Sums() {
    for (Part& sum : part) sum = Part{} + (1 << (kPlaces - 1));  // half: rounds to nearest
  }

  void add(const uint8_t* pixels, int32_t weight) {
    for (int i = 0; i < parts; ++i) part[i] += widened(pixels + i * lanes) * weight;
  }

  // The conversions are spelt out: compilers take those of vectors apart.
  static Part widened(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Part)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return (Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return Part{p[0], p[1], p[2], p[3]};
#endif
  }

  // Shifted and cut to 0..255.
  void store(uint8_t* p) const {
#if defined(__AVX512F__)
    const __m512i positive = _mm512_max_epi32((__m512i)(part[0] >> kPlaces), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(positive));
#elif defined(__AVX2__)
    const __m256i mixed = _mm256_packs_epi32((__m256i)(part[0] >> kPlaces), (__m256i)(part[1] >> kPlaces));
    const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
#else
    for (int i = 0; i < kLines; ++i) p[i] = to_byte(part[i / lanes][i % lanes]);
#endif
  }
};

// 16 pieces of 16 bytes, transposed.
inline void transpose(const uint8_t* const (&from)[kLines], uint8_t* const (&to)[kLines]) {
#if defined(__SSE2__)
  __m128i a[kLines], b[kLines];
  for (int i = 0; i < kLines; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
  for (int round = 0; round < 4; ++round) {  // each interleaves the two halves of what is there: a perfect shuffle
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    std::copy(b, b + kLines, a);
  }
  for (int i = 0; i < kLines; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i]), a[i]);
#else
  uint8_t tile[kLines][kLines];
  for (int i = 0; i < kLines; ++i)
    for (int j = 0; j < kLines; ++j) tile[j][i] = from[i][j];
  for (int i = 0; i < kLines; ++i) std::memcpy(to[i], tile[i], kLines);
#endif
}

// lines[0..15][bytes] -> turned[bytes rounded up][16]
void turn(const uint8_t* const (&lines)[kLines], int64_t bytes, uint8_t* turned) {
  uint8_t padded[kLines][kLines] = {};
  for (int64_t at = 0; at < bytes; at += kLines) {
    const uint8_t* from[kLines];
    uint8_t* to[kLines];
    for (int i = 0; i < kLines; ++i) {
      from[i] = lines[i] + at;
      to[i] = turned + (at + i) * kLines;
      if (at + kLines > bytes) {  // nothing behind the end is read
        std::memcpy(padded[i], from[i], bytes - at);
        from[i] = padded[i];
      }
    }
    transpose(from, to);
  }
}

// turned[bytes rounded up][16] -> count lines
void turn_back(const uint8_t* turned, int64_t bytes, uint8_t* lines, int64_t pitch, int64_t count) {
  uint8_t tile[kLines][kLines];
  for (int64_t at = 0; at < bytes; at += kLines) {
    const uint8_t* from[kLines];
    uint8_t* to[kLines];
    for (int i = 0; i < kLines; ++i) {
      from[i] = turned + (at + i) * kLines;
      to[i] = tile[i];
    }
    transpose(from, to);
    const int64_t size = std::min<int64_t>(kLines, bytes - at);
    for (int64_t i = 0; i < count; ++i)
      size == kLines ? std::memcpy(lines + i * pitch + at, tile[i], kLines)
                     : std::memcpy(lines + i * pitch + at, tile[i], size);
  }
}

// lines [count][length * C] -> [count][out * C], mirrored where asked.
template <int C>
void columns(const Axis& axis, const uint8_t* from, int64_t from_pitch, int64_t length, int64_t count, bool mirror,
             uint8_t* to, int64_t to_pitch, std::vector<uint8_t>& scratch) {
  const int64_t out = axis.windows.size(), wide = round_up(length * C, kLines), narrow = round_up(out * C, kLines);
  scratch.resize((wide + narrow) * kLines);
  uint8_t *turned = scratch.data(), *done = turned + wide * kLines;
  for (int64_t line = 0; line < count; line += kLines) {
    const uint8_t* lines[kLines];
    for (int64_t i = 0; i < kLines; ++i) lines[i] = from + std::min(line + i, count - 1) * from_pitch;
    turn(lines, length * C, turned);
    for (int64_t x = 0; x < out; ++x) {
      const Window window = axis.windows[x];
      const int32_t* weights = axis.weights.data() + x * axis.most;
      const uint8_t* pixel = turned + window.first * C * kLines;
      Sums sums[C];
      for (int64_t j = 0; j < window.count; ++j, pixel += C * kLines)
        for (int c = 0; c < C; ++c) sums[c].add(pixel + c * kLines, weights[j]);
      uint8_t* target = done + (mirror ? out - 1 - x : x) * C * kLines;
      for (int c = 0; c < C; ++c) sums[c].store(target + c * kLines);
    }
    turn_back(done, out * C, to + line * to_pitch, to_pitch, std::min<int64_t>(kLines, count - line));
  }
}

// lines [length][bytes] -> [out][bytes]
void rows(const Axis& axis, const uint8_t* from, int64_t from_pitch, int64_t bytes, uint8_t* to, int64_t to_pitch) {
  for (size_t y = 0; y < axis.windows.size(); ++y, to += to_pitch) {
    const Window window = axis.windows[y];
    const int32_t* weights = axis.weights.data() + y * axis.most;
    const uint8_t* first = from + window.first * from_pitch;
    int64_t at = 0;
    const auto together = [&](auto vectors) {  // several vectors share the loads of the weights
      constexpr int kVectors = decltype(vectors)::value;
      for (; at + kVectors * kLines <= bytes; at += kVectors * kLines) {
        Sums sums[kVectors];
        for (int64_t j = 0; j < window.count; ++j)
          for (int v = 0; v < kVectors; ++v) sums[v].add(first + j * from_pitch + at + v * kLines, weights[j]);
        for (int v = 0; v < kVectors; ++v) sums[v].store(to + at + v * kLines);
      }
    };
    together(std::integral_constant<int, 4>{});
    together(std::integral_constant<int, 1>{});
    for (; at < bytes; ++at) {
      int32_t sum = 1 << (kPlaces - 1);
      for (int64_t j = 0; j < window.count; ++j) sum += first[j * from_pitch + at] * weights[j];
      to[at] = to_byte(sum);
    }
  }
}

// One image: its box from `corner` on, lines `pitch` bytes apart.
template <int C>
void crop(const uint8_t* corner, int64_t pitch, int64_t tall, int64_t wide, int64_t height, int64_t width, bool mirror,
          uint8_t* out, std::vector<uint8_t>& between, std::vector<uint8_t>& scratch) {
  const Axis across(wide, width), down(tall, height);
  if (tall > height && tall - height > 2 * (wide - width)) {
    between.resize(height * wide * C);
    rows(down, corner, pitch, wide * C, between.data(), wide * C);
    columns<C>(across, between.data(), wide * C, wide, height, mirror, out, width * C, scratch);
  } else {
    between.resize(tall * width * C);
    columns<C>(across, corner, pitch, wide, tall, mirror, between.data(), width * C, scratch);
    rows(down, between.data(), width * C, width * C, out, width * C);
  }
}

}  // namespace resize

void resized_crop(const Tensor& pixels, const Tensor& offsets, const Tensor& sizes, const Tensor& boxes,
                  const Tensor& flip, const std::vector<int64_t>& max_box, const Tensor& out) {
  constexpr const char* op = "resized_crop";
  check_contiguous(pixels, op, "pixels");
  check_contiguous(offsets, op, "offsets");
  check_contiguous(sizes, op, "sizes");
  check_contiguous(boxes, op, "boxes");
  check_contiguous(flip, op, "flip");
  check_contiguous(out, op, "out");
  const int64_t batch = out.size(0), height = out.size(1), width = out.size(2), channels = out.size(3);
  const int64_t *offset = data<int64_t>(offsets), *size = data<int64_t>(sizes), *box = data<int64_t>(boxes);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t *s = size + 2 * b, *x = box + 4 * b;
    FASTKD_CHECK(x[0] >= 0 && x[1] >= 0 && x[2] >= 1 && x[3] >= 1 && x[0] + x[2] <= s[0] && x[1] + x[3] <= s[1],
                 "resized_crop", "box ", b, " is not inside of its image");
    FASTKD_CHECK(offset[b] >= 0 && offset[b] + s[0] * s[1] * channels <= pixels.numel(), "resized_crop", "image ", b,
                 " is not inside of pixels");
  }
  parallel(batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> between, scratch;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t *x = box + 4 * b, pitch = size[2 * b + 1] * channels;
      const uint8_t* corner = data<uint8_t>(pixels) + offset[b] + x[0] * pitch + x[1] * channels;
      uint8_t* to = mutable_data<uint8_t>(out) + b * height * width * channels;
      const auto run = channels == 3 ? resize::crop<3> : resize::crop<1>;
      run(corner, pitch, x[2], x[3], height, width, data<bool>(flip)[b], to, between, scratch);
    }
  });
}

}  // namespace fastkd
