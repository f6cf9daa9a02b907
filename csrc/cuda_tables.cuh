// Tables of rows beside tokens, such as positions: in the tokens' dtype, or float32 beside 16-bit tokens.
#pragma once

#include "cuda_rows.cuh"

namespace fastkd::cuda {

template <class T>
struct TableRows {
  const void* data;
  bool wide;
  int width;

  TableRows(const Table& table, int64_t width) : data(table.data), wide(table.wide), width(width) {}

  bool vector() const { return width % kVector == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  // This thread's elements of row i, as Row::read has them.
  template <bool vector>
  __device__ __forceinline__ void read(int64_t i, int base, float (&x)[kItems]) const {
    if (wide)
      Row<const float>{static_cast<const float*>(data) + i * width, 1, width}.template read<vector>(base, x);
    else
      Row<const T>{static_cast<const T*>(data) + i * width, 1, width}.template read<vector>(base, x);
  }
};

}  // namespace fastkd::cuda
