// Runs csrc/*.cu on the CPU: every CUDA thread is a fiber, and barriers and shuffles switch between them.
// It checks the kernels' arithmetic, indexing and barriers; it says nothing about memory ordering or speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
  size_t first = 0;  // where its members begin in the order in which threads are tried
  int arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;  // for the first switch; the others are jumps, which leave the signal mask alone and are fast
  jmp_buf jump;
  bool started = false;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 index;
  bool done = false;
  Barrier* waits = nullptr;
  long generation = 0;
};

// What a lane brings to a matrix instruction.
struct Fragments {
  uint32_t a[4], b[2];
  const uint16_t* row;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;
  std::vector<Fragments> fragments;
  Barrier all;
  jmp_buf scheduler;
  size_t try_first = 0;  // no thread before this one can go on
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
};
inline Block block;

inline unsigned thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

__attribute__((noinline)) inline void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

__attribute__((noinline)) inline void run(Fiber& fiber) {
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier, int members) {
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    block.try_first = std::min(block.try_first, barrier.first);
    return;
  }
  Fiber* self = block.current;
  self->waits = &barrier;
  self->generation = barrier.generation;
  jump(self->jump, block.scheduler);
}

inline void enter() {
  (*block.kernel)();
  block.current->done = true;
  _longjmp(block.scheduler, 1);
}

inline void run_block() {
  const size_t count = block.fibers.size();
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = block.fibers[i];
    f.done = f.started = false;
    f.waits = nullptr;
    f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  // One end of the block runs ahead as far as it can, in every other block the far end: a missing barrier shows.
  const bool backwards = (blockIdx.x + blockIdx.y) % 2;
  for (size_t warp = 0; warp < block.warps.size(); ++warp)
    block.warps[warp].first = backwards ? count - std::min(count, 32 * warp + 32) : 32 * warp;
  block.try_first = 0;
  for (size_t left = count; left > 0;) {
    Fiber* next = nullptr;
    for (size_t& i = block.try_first; i < count && !next; ++i) {
      Fiber& f = block.fibers[backwards ? count - 1 - i : i];
      if (!f.done && !(f.waits && f.waits->generation == f.generation)) next = &f;
    }
    if (!next) {
      std::fprintf(stderr, "cuda emulation: threads wait at a barrier that others never reach\n");
      std::abort();
    }
    next->waits = nullptr;
    block.current = next;
    threadIdx = next->index;
    run(*next);
    left -= next->done;
  }
}

}  // namespace emulation

alignas(16) inline unsigned char emulated_shared_memory[163 << 10];  // what a block may have from sm_80 on

inline void emulate(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  using emulation::block;
  const unsigned count = threads.x * threads.y * threads.z;
  gridDim = grid;
  blockDim = threads;
  block.fibers.resize(count);
  block.warps.assign((count + 31) / 32, {});
  block.exchange.assign(block.warps.size() * 32, 0);
  block.fragments.assign(block.warps.size() * 32, {});
  block.all = {};
  block.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(emulated_shared_memory, 0xff, sizeof emulated_shared_memory);  // NaN in every float type
        emulation::run_block();
      }
}

inline void __syncthreads() { emulation::wait(emulation::block.all, emulation::block.fibers.size()); }

// A lane gets what lane `from` of its warp holds.
template <class T>
T exchange_lanes(T value, unsigned from) {
  using namespace emulation;
  const unsigned self = thread_number(), warp = self / 32;
  const int members = std::min<int>(32, block.fibers.size() - warp * 32);
  std::memcpy(&block.exchange[self], &value, sizeof value);
  wait(block.warps[warp], members);
  T result;
  std::memcpy(&result, &block.exchange[warp * 32 + from], sizeof result);
  wait(block.warps[warp], members);
  return result;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return exchange_lanes(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return exchange_lanes(value, emulation::thread_number() % 32 ^ lanes);
}

// The two matrix instructions, from the tables of the PTX ISA ("Matrix fragments for mma.m16n8k16 with floating point
// type" and "ldmatrix"): element i of a lane's fragment of A, B or C/D lies at (row, column) as given here.
// groupID = lane >> 2, threadID_in_group = lane % 4; two elements a register, the lower half first.
template <class Number>
void emulated_mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Number& number) {
  using namespace emulation;
  const unsigned self = thread_number(), warp = self / 32 * 32;
  Fragments& mine = block.fragments[self];
  std::copy(a, a + 4, mine.a);
  mine.b[0] = b0, mine.b[1] = b1;
  wait(block.warps[warp / 32], 32);
  float A[16][16], B[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fragments& from = block.fragments[warp + lane];
    const unsigned groupID = lane >> 2, threadID_in_group = lane % 4;
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned row = i < 2 || (4 <= i && i < 6) ? groupID : groupID + 8;
      const unsigned column = threadID_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      A[row][column] = number(from.a[i / 2] >> 16 * (i % 2) & 0xffff);
    }
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = threadID_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      B[row][groupID] = number(from.b[i / 2] >> 16 * (i % 2) & 0xffff);
    }
  }
  const unsigned groupID = self % 32 >> 2, threadID_in_group = self % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k)
      sum[i] += A[i < 2 ? groupID : groupID + 8][k] * B[k][threadID_in_group * 2 + (i & 1)];
  wait(block.warps[warp / 32], 32);
}

// Lanes 0-7, 8-15, 16-23, 24-31 give the addresses of rows 0-7 of matrices 0 to 3. Row r of matrix m goes to lanes
// 4 r to 4 r + 3, two neighbours each, in register m; with .trans column r takes its place.
inline void emulated_ldmatrix_x4(uint32_t (&x)[4], const uint16_t* row, bool transposed) {
  using namespace emulation;
  const unsigned self = thread_number(), lane = self % 32, warp = self - lane;
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    std::fprintf(stderr, "cuda emulation: ldmatrix needs rows aligned to 16 bytes\n");
    std::abort();
  }
  block.fragments[self].row = row;
  wait(block.warps[warp / 32], 32);
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = lane / 4, c = lane % 4 * 2 + i;
      pair[i] = transposed ? block.fragments[warp + 8 * m + c].row[r] : block.fragments[warp + 8 * m + r].row[c];
    }
    x[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  wait(block.warps[warp / 32], 32);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float emulated_half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline uint16_t emulated_float_to_half(float value) {
  const _Float16 x = value;
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
inline uint16_t emulated_float_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
