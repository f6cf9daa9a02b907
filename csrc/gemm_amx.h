// C = A B in bfloat16 on AMX tiles, from row-major matrices of bfloat16 or float32 that are packed on the way.
//
// Packing rounds float32 weights and brings either operand into tiles whichever way its depth runs, so no cast and no
// transposed copy of a matrix is ever written. B is packed whole by all threads; then each task packs a chunk of rows
// of A that fits its L2 and sweeps the columns of B, kDepth at a time so that 32 columns of B stay in its L1, where
// streaming loads keep A from replacing them.
#pragma once

#include "amx.h"

#include <algorithm>

#if defined(FASTKD_AMX)

namespace fastkd::amx {

constexpr int64_t kTile = 16 * 32;        // values of a packed tile
constexpr int64_t kDepth = 16;            // tiles along the depth in one sweep: 32 columns of B take 32 KB
constexpr int64_t kChunkBytes = 1 << 20;  // of A in one task

// A row-major matrix.
template <class T>
struct Matrix {
  const T* base;
  int64_t row, rows, columns;  // row: elements from one row to the next
};

inline __m512i load32(const BFloat16* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
inline __m512i load32(const float* p, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first16(n), p), high = _mm512_maskz_loadu_ps(first16(n - 16), p + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
inline __m256i load16(const BFloat16* p, int64_t n) { return _mm256_maskz_loadu_epi16(first16(n), p); }
inline __m256i load16(const float* p, int64_t n) { return round16(_mm512_maskz_loadu_ps(first16(n), p)); }

// r[i] = row i of a 16 x 32 block at (row, column); zero outside the matrix.
template <class T>
inline void load_rows(const Matrix<T>& from, int64_t row, int64_t column, __m512i (&r)[16]) {
  const T* base = from.base + row * from.row + column;
  for (int i = 0; i < 16; ++i)
    r[i] = row + i < from.rows ? load32(base + i * from.row, from.columns - column) : _mm512_setzero_si512();
}

// r[l] = rows 2 l and 2 l + 1 of a 32 x 16 block at (row, column), interleaved; zero outside the matrix.
template <class T>
inline void load_pairs(const Matrix<T>& from, int64_t row, int64_t column, __m512i (&r)[16]) {
  const T* base = from.base + row * from.row + column;
  const int64_t columns = from.columns - column, rows = from.rows - row;
  const auto line = [&](int64_t i) {
    return _mm512_cvtepu16_epi32(i < rows ? load16(base + i * from.row, columns) : _mm256_setzero_si256());
  };
  for (int l = 0; l < 16; ++l) r[l] = _mm512_or_si512(line(2 * l), _mm512_slli_epi32(line(2 * l + 1), 16));
}

// How tile (i, l) of an operand is packed; i counts rows of A or columns of B, l the depth. Where the depth runs along
// the rows of the matrix in memory, A takes them as they lie and B transposes them; where it runs across, the reverse.
template <class T, bool FIRST, bool ALONG>
struct Operand {
  static constexpr int64_t together = ALONG ? 1 : 4;  // strips side by side: lines of memory are used whole
  Matrix<T> from;
  float* sums = nullptr;  // of the rows of A, to a multiple of 16, added up on the way (only where A is transposed)

  void operator()(int64_t i, int64_t l, bool first_time, Bits* tile) const {
    __m512i r[16];
    if constexpr (ALONG) load_rows(from, i, l, r);
    else load_pairs(from, l, i, r);
    if (FIRST && !ALONG && sums && first_time) {
      __m512 sum = _mm512_loadu_ps(sums + i);
      const __m512i ones = _mm512_set1_epi16(0x3f80);
      for (int p = 0; p < 16; ++p) sum = _mm512_dpbf16_ps(sum, (__m512bh)r[p], (__m512bh)ones);
      _mm512_storeu_ps(sums + i, sum);
    }
    if constexpr (FIRST != ALONG) transpose16(r);
    for (int k = 0; k < 16; ++k) _mm512_store_si512(tile + 32 * k, r[k]);
  }
};
template <class T>
using Rows = Operand<T, true, true>;  // A is the matrix
template <class T>
using TransposedRows = Operand<T, true, false>;  // A is its transpose
template <class T>
using Columns = Operand<T, false, false>;  // B is the matrix
template <class T>
using TransposedColumns = Operand<T, false, true>;  // B is its transpose

// Packs strips [begin, end) of 16 rows of A or columns of B, the first of them strip `first` of the matrix.
template <class Operand>
inline void pack(const Operand& operand, int64_t begin, int64_t end, int64_t first, int64_t tiles, bool first_time,
                 Bits* out) {
  for (int64_t i = begin; i < end; i += Operand::together)
    for (int64_t l = 0; l < tiles; ++l)
      for (int64_t k = i; k < std::min(end, i + Operand::together); ++k)
        operand(16 * (first + k), 32 * l, first_time, out + (k * tiles + l) * kTile);
}

// c [32][32] = (or +=) A B over `depth` tiles; a and b are two packed strips each, one after the other.
// Meanwhile the place of the result is brought into the cache, a store that waits for memory costs more than a product,
// and the block before is finished: the tile unit works by itself, and vector instructions between its own are free.
template <bool TWO, class Fetch, class Meanwhile>
inline void multiply(int64_t depth, const Bits* a, int64_t strip_a, const Bits* b, int64_t strip_b, float* c, bool add,
                     bool last, const Fetch& fetch, const Meanwhile& meanwhile) {
  constexpr int64_t rows = TWO ? 32 : 16;
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    if (TWO) _tile_loadd(2, c + 512, 128);
    if (TWO) _tile_loadd(3, c + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) _tile_zero(2);
    if (TWO) _tile_zero(3);
  }
  for (int64_t l = 0; l < depth; ++l, a += kTile, b += kTile) {
    if (last)
      for (int64_t i = rows * l / depth; i < rows * (l + 1) / depth; ++i) fetch(i);
    _tile_stream_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + strip_b, 64);
    if (TWO) _tile_stream_loadd(5, a + strip_a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) _tile_dpbf16ps(2, 5, 6);
    if (TWO) _tile_dpbf16ps(3, 5, 7);
    meanwhile(l + 1, depth);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if (TWO) _tile_stored(2, c + 512, 128);
  if (TWO) _tile_stored(3, c + 528, 128);
}

// Brings 32 values of a row of a matrix into the cache.
template <class T>
inline void fetch_to_write(T* p) {
  for (size_t at = 0; at < 32; at += 64 / sizeof(T)) _m_prefetchw(p + at);
}
template <class T>
inline void fetch_to_read(const T* p) {
  for (size_t at = 0; at < 32; at += 64 / sizeof(T)) _mm_prefetch(p + at, _MM_HINT_T0);
}

// C [m, n] = A [m, depth] B [depth, n].
//   fetch(i, j)                       32 values of row i of C from column j are about to be finished
//   finish(i, j, rows, columns, c)    takes `rows` x `columns` values of C at (i, j) from c [rows][32], at most 32 x 32
// j is a multiple of 32.
template <class A, class B, class Fetch, class Finish>
void gemm(int64_t m, int64_t n, int64_t depth, const A& pack_a, const B& pack_b, const Fetch& fetch,
          const Finish& finish) {
  if (m == 0 || n == 0) return;
  const int64_t rows = (m + 31) / 32, columns = (n + 31) / 32;
  const int64_t tiles = std::max<int64_t>(1, (depth + 31) / 32), strip = tiles * kTile;  // a sum of nothing is 0
  Bits* const b = Scratch<1>(2 * columns * strip * sizeof(Bits)).template take<Bits>(2 * columns * strip);
  parallel(2 * columns, B::together, [&](int64_t begin, int64_t end) { pack(pack_b, begin, end, 0, tiles, true, b); });
  // Tasks of equal size: chunks of rows that fit L2, a multiple of the number of threads; columns are cut only where
  // there are fewer blocks of rows than threads.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fit = std::max<int64_t>(1, kChunkBytes / (2 * strip * sizeof(Bits)));
  const int64_t wanted = std::min(rows, round_up((rows + fit - 1) / fit, threads));
  const int64_t chunk = (rows + wanted - 1) / wanted, chunks = (rows + chunk - 1) / chunk;
  const int64_t cuts = std::min(columns, (threads + chunks - 1) / chunks), cut = (columns + cuts - 1) / cuts;
  const int64_t sweeps = (tiles + kDepth - 1) / kDepth, sweep = (tiles + sweeps - 1) / sweeps;
  parallel(chunks * cuts, 1, [&](int64_t begin, int64_t end) {
    Scratch<> scratch(2 * chunk * strip * sizeof(Bits) + (chunk + 1) * 1024 * sizeof(float) + 128);
    Bits* const a = scratch.take<Bits>(2 * chunk * strip);
    float* const c = scratch.take<float>((chunk + 1) * 1024);
    const Tiles configured;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / cuts * chunk, count = std::min(chunk, rows - first), left = task % cuts * cut;
      pack(pack_a, 0, 2 * count, 2 * first, tiles, left == 0, a);
      // A block is finished while the next one is multiplied: loads that follow tile stores at once would stall.
      struct { int64_t i, j, rows = 0, columns; const float* c; } before;
      int64_t finished = 0;
      const auto finish_share = [&](int64_t part, int64_t parts) {
        const int64_t until = before.rows * part / parts;
        if (until == finished) return;
        finish(before.i + finished, before.j, until - finished, before.columns, before.c + 32 * finished);
        finished = until;
        for (int64_t r = until; r < std::min<int64_t>(until + 4, before.rows); ++r) fetch(before.i + r, before.j);
      };
      for (int64_t j = left; j < std::min(columns, left + cut); ++j)
        for (int64_t l = 0; l < tiles; l += sweep)
          for (int64_t i = 0; i < count; ++i) {
            const int64_t row = 32 * (first + i), column = 32 * j, length = std::min(sweep, tiles - l);
            const Bits *x = a + 2 * i * strip + l * kTile, *y = b + 2 * j * strip + l * kTile;
            float* block = c + (sweeps > 1 ? i : (i + j * count) % 2) * 1024;
            const bool last = l + sweep >= tiles;
            const auto fetch_row = [&](int64_t r) { fetch(row + r, column); };
            if (m - row > 16) multiply<true>(length, x, strip, y, strip, block, l > 0, last, fetch_row, finish_share);
            else multiply<false>(length, x, strip, y, strip, block, l > 0, last, fetch_row, finish_share);
            before.rows = finished = 0;
            if (last)
              before = {row, column, std::min<int64_t>(32, m - row), std::min<int64_t>(32, n - column), block};
          }
      finish_share(1, 1);
    }
  });
}

}  // namespace fastkd::amx

#endif
