// What every native op shares: tensors as typed pointers with strides, checks, dtype dispatch, parallel loops.
//
// All functions are called through schemas (ops.cpp) from fastkd/ops/<room>/<op>.py, which has validated the
// arguments and allocated the outputs. The checks here guard memory, not usage.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

namespace fastkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Accumulate in float, and in double where the data are double.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Type {
  using type = T;
};

#define FASTKD_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "fastkd " op ": ", __VA_ARGS__)

// Calls f(Type<T>{}) with the C++ type of a floating dtype.
template <class F>
void for_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    case ScalarType::Half: return f(Type<Half>{});
    default: STD_TORCH_CHECK(false, "fastkd ", op, ": expected a floating dtype");
  }
}

// The same for images, which may also be uint8.
template <class F>
void for_pixel(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Byte) return f(Type<uint8_t>{});
  for_float(dtype, op, f);
}

template <class T>
const T* data(const Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr());
}

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), "fastkd ", op, ": ", name, " must be contiguous");
}

// Runs f(begin, end) over [0, n) on torch's own threads, `grain` items or more a task.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain < 1 ? 1 : grain, f);
}

template <class To, class From>
inline To cast(From x) {
  return static_cast<To>(x);
}

}  // namespace fastkd
