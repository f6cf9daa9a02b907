// C = A B^T of 8-bit integers with int32 sums, for weights B that never change. Both operands are packed: 16 rows of A
// by 64 of the depth are a tile [16 rows][64], 16 columns of B by 64 a tile [16][16 columns][4], 1 KB each; tiles of a
// strip of 16 follow each other along the depth, filled up with zeros. That is the order of the AMX registers, and one
// line of B is also what AVX-512 VNNI multiplies by four values of A.
#pragma once

#include "amx.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace fastkd::int8 {

constexpr int64_t kTile = 1024;           // bytes
constexpr int64_t kDepth = 16;            // tiles in one sweep: two strips of B take 32 KB, so that they stay in L1
constexpr int64_t kChunkBytes = 1 << 20;  // of A, so that it stays in L2

// What the kernels below share: c [32][32] = (or +=) A B^T over `tiles` tiles of two strips each. Sums of the rows of A
// over the whole depth come along for the one that needs them.
struct Strips {
  const int8_t *a, *b;
  int64_t strip;  // bytes from a strip to the next
  const int32_t* row_sums;
};

inline int32_t four(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Anywhere; with AVX2 four rows at a time. There too one factor is unsigned: |a| times b with the sign of a. Pairs of
// these products fit 16 bits, since no code is -128.
struct Plain {
  void operator()(int64_t tiles, const Strips& s, int32_t* c, bool add) const {
    if (!add) std::fill_n(c, 1024, 0);
    for (int64_t j = 0; j < 2; ++j)
      for (int64_t i = 0; i < 32; i += 4)
        rows(tiles, s.a + i / 16 * s.strip + i % 16 * 64, s.b + j * s.strip, c + 32 * i + 16 * j);
  }

  static void rows(int64_t tiles, const int8_t* a, const int8_t* b, int32_t* c) {
#if defined(__AVX2__)
    const auto at = [&](int r, int half) { return reinterpret_cast<__m256i*>(c + 32 * r + 8 * half); };
    __m256i sums[4][2];
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half) sums[r][half] = _mm256_loadu_si256(at(r, half));
    for (int64_t q = 0; q < 16 * tiles; ++q, b += 64) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32));
      const auto dot = [](__m256i x, __m256i w) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x)), _mm256_set1_epi16(1));
      };
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m256i x = _mm256_set1_epi32(four(a + q / 16 * kTile + q % 16 * 4 + 64 * r));
        sums[r][0] = _mm256_add_epi32(sums[r][0], dot(x, low));
        sums[r][1] = _mm256_add_epi32(sums[r][1], dot(x, high));
      }
    }
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half) _mm256_storeu_si256(at(r, half), sums[r][half]);
#else
    for (int64_t q = 0; q < 16 * tiles; ++q, b += 64)
      for (int64_t r = 0; r < 4; ++r) {
        const int8_t* x = a + q / 16 * kTile + q % 16 * 4 + 64 * r;
        for (int64_t n = 0; n < 16; ++n)
          for (int64_t k = 0; k < 4; ++k) c[32 * r + n] += x[k] * b[4 * n + k];
      }
#endif
  }
};

#if defined(__AVX512F__)

// The instruction takes one factor unsigned: 128 is added to B, and 128 times the sums of A taken off again.
struct Vnni {
  static bool available() { return __builtin_cpu_supports("avx512vnni"); }

  __attribute__((target("avx512f,avx512vnni"))) void operator()(int64_t tiles, const Strips& s, int32_t* c,
                                                                bool add) const {
    for (int64_t i = 0; i < 32; i += 8) {
      const int8_t* a = s.a + i / 16 * s.strip + i % 16 * 64;
      __m512i sums[8][2];
      for (int r = 0; r < 8; ++r)
        for (int j = 0; j < 2; ++j)
          sums[r][j] = add ? _mm512_loadu_si512(c + 32 * (i + r) + 16 * j)
                           : _mm512_set1_epi32(-128 * s.row_sums[i + r]);
      const __m512i flip = _mm512_set1_epi8(-128);
      for (int64_t q = 0; q < 16 * tiles; ++q) {
        const __m512i low = _mm512_xor_si512(_mm512_loadu_si512(s.b + 64 * q), flip);
        const __m512i high = _mm512_xor_si512(_mm512_loadu_si512(s.b + s.strip + 64 * q), flip);
        const int8_t* x = a + q / 16 * kTile + q % 16 * 4;
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          const __m512i value = _mm512_set1_epi32(four(x + 64 * r));
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, value);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, value);
        }
      }
      for (int r = 0; r < 8; ++r)
        for (int j = 0; j < 2; ++j) _mm512_storeu_si512(c + 32 * (i + r) + 16 * j, sums[r][j]);
    }
  }
};

#endif

#if defined(FASTKD_AMX) && defined(__AMX_INT8__)

struct Amx {
  static bool available() {
    static const bool present = [] {
      unsigned a, b, c, d;
      return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1) && amx::available();
    }();
    return present;
  }

  void operator()(int64_t tiles, const Strips& s, int32_t* c, bool add) const {
    if (add) {
      _tile_loadd(0, c, 128);
      _tile_loadd(1, c + 16, 128);
      _tile_loadd(2, c + 512, 128);
      _tile_loadd(3, c + 528, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const int8_t *a = s.a, *b = s.b;
    for (int64_t l = 0; l < tiles; ++l, a += kTile, b += kTile) {
      _tile_stream_loadd(4, a, 64);  // past L1, which belongs to B
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + s.strip, 64);
      _tile_stream_loadd(5, a + s.strip, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
  }

  amx::Tiles configured;
};

#endif

// Memory of the calling thread, 64-byte aligned.
template <class T, int SLOT>
T* scratch(int64_t count) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < count * static_cast<int64_t>(sizeof(T)) + 64)
    memory.resize(count * sizeof(T) + 64);
  return reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory.data()), 64));
}

// A panel of rows at a time, one chunk that fits L2 per thread: pack(row, to, row_sums) packs the strip of 16 rows from
// `row` on, then all threads share the columns evenly. finish(i, j, c) takes the block of C at (i, j) from c [32][32].
template <class Kernel, class Pack, class Finish>
void gemm(int64_t m, int64_t n, int64_t depth, const int8_t* b, const Pack& pack, const Finish& finish) {
  const int64_t rows = (m + 31) / 32, columns = (n + 31) / 32;  // in blocks of 32
  const int64_t tiles = (depth + 63) / 64, strip = tiles * kTile, threads = torch::stable::get_num_threads();
  const int64_t fit = std::max<int64_t>(1, kChunkBytes / (2 * strip));
  const int64_t panels = (rows + threads * fit - 1) / (threads * fit);
  const int64_t sweeps = (tiles + kDepth - 1) / kDepth, sweep = (tiles + sweeps - 1) / sweeps;
  const int64_t most = panels ? (rows + panels - 1) / panels : 0;
  int8_t* const a = scratch<int8_t, 0>(most * 2 * strip);
  int32_t* const row_sums = scratch<int32_t, 1>(most * 32);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = rows * panel / panels, count = rows * (panel + 1) / panels - first;
    parallel(2 * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(32 * first + 16 * i, a + i * strip, row_sums + 16 * i);
    });
    const int64_t chunks = (count + fit - 1) / fit;
    parallel(chunks * columns, 1, [&](int64_t begin, int64_t end) {
      const Kernel multiply;
      int32_t* const sums = scratch<int32_t, 2>((fit + 1) * 1024);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / columns, j = task % columns;
        const int64_t top = count * chunk / chunks, bottom = count * (chunk + 1) / chunks;
        // A block is finished after the next one is multiplied: loads that follow tile stores at once would stall.
        const auto block = [&](int64_t i) { return sums + (sweeps > 1 ? i - top : i % 2) * 1024; };
        for (int64_t l = 0; l < tiles; l += sweep)
          for (int64_t i = top; i < bottom; ++i) {
            const Strips strips{a + 2 * i * strip + l * kTile, b + 2 * j * strip + l * kTile, strip, row_sums + 32 * i};
            multiply(std::min(sweep, tiles - l), strips, block(i), l > 0);
            if (l + sweep >= tiles && i > top) finish(32 * (first + i - 1), 32 * j, block(i - 1));
          }
        finish(32 * (first + bottom - 1), 32 * j, block(bottom - 1));
      }
    });
  }
}

}  // namespace fastkd::int8
