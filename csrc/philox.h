// Philox4x32-10 (Salmon et al. 2011) for the CPU and the CUDA kernels alike: random numbers by key and counter.
#pragma once

#include "align_math.h"

#include <cstdint>

namespace fastkd {

// The upper 24 bits of the first word for the counter (index, 0, 0, 0). Random noise in [0, 2^24).
FASTKD_HOST_DEVICE uint32_t philox24(uint64_t key, uint32_t index) {
  uint32_t c0 = index, c1 = 0, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p2 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0 >> 8;
}

}  // namespace fastkd
