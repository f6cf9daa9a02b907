// What the AMX kernels share. A tile has 16 rows of 64 bytes; one instruction multiplies 16 x 32 by 32 x 16 bfloat16
// values and adds the product to 16 x 16 floats. The second operand is stored in pairs along the depth: element (l, n)
// lies at [l / 2][n][l % 2].
#pragma once

#include "simd.h"

#include "common.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define FASTKD_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastkd::amx {

using Bits = uint16_t;  // a bfloat16

// Linux hands out tile registers on request, once per process.
inline bool available() {
  static const bool granted = [] {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

// Eight tiles of 16 rows of 64 bytes. A constant in memory: GCC takes the instruction to read 8 bytes of its operand
// and may drop stores to the rest.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
inline constexpr TileShapes kTileShapes;

// Tile registers for the time of one task.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileShapes); }
  ~Tiles() { _tile_release(); }
};

inline __m256i round16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// Transposes a 16 x 16 block of 32-bit values held in registers.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Scratch memory of one thread, cut into 64-byte aligned pieces. Memory that outlives a parallel loop must be of
// another SLOT than the memory of its tasks, one of which runs on the calling thread.
template <int SLOT = 0>
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory.data()), 64));
  }
  template <class T>
  T* take(int64_t count) {
    char* piece = next_;
    next_ += round_up(count * sizeof(T), 64);
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* next_;
};

}  // namespace fastkd::amx

#else

namespace fastkd::amx {
constexpr bool available() { return false; }
}  // namespace fastkd::amx

#endif
