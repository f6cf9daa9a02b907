// Rows of a [B, T, D] tensor with any strides and floating dtype, seen as float (or double).
#pragma once

#include "convert.h"

namespace fastkd {

template <class A>
class Rows {
 public:
  Rows(const Tensor& tensor, const char* op)
      : tensor_(tensor), op_(op), dtype_(tensor.scalar_type()), tokens_(tensor.size(1)), width_(tensor.size(2)),
        sb_(tensor.stride(0)), st_(tensor.stride(1)), sc_(tensor.stride(2)) {}

  int64_t count() const { return tensor_.size(0) * tokens_; }
  int64_t width() const { return width_; }

  // The row itself where it lies there dense and in A already, else a converted copy in `buffer`.
  const A* read(int64_t row, A* buffer) const {
    const A* result = buffer;
    for_float(dtype_, op_, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x = data<T>(tensor_) + (row / tokens_) * sb_ + (row % tokens_) * st_;
      if constexpr (std::is_same_v<T, A>) {
        if (sc_ == 1) {
          result = x;
          return;
        }
      }
      if (sc_ == 1) {
        convert_row(x, width_, buffer);
      } else {
        for (int64_t i = 0; i < width_; ++i) buffer[i] = static_cast<A>(x[i * sc_]);
      }
    });
    return result;
  }

  // Where a dense row of type A starts, so that results can go there at once; nullptr in any other case.
  A* in_place(int64_t row) const {
    const bool same = dtype_ == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    return same && sc_ == 1 ? mutable_data<A>(tensor_) + (row / tokens_) * sb_ + (row % tokens_) * st_ : nullptr;
  }

  void write(int64_t row, const A* x) const {
    for_float(dtype_, op_, [&](auto type) {
      using T = typename decltype(type)::type;
      T* out = mutable_data<T>(tensor_) + (row / tokens_) * sb_ + (row % tokens_) * st_;
      if (sc_ == 1) {
        convert_row(x, width_, out);
      } else {
        for (int64_t i = 0; i < width_; ++i) out[i * sc_] = static_cast<T>(x[i]);
      }
    });
  }

 private:
  const Tensor& tensor_;
  const char* op_;
  ScalarType dtype_;
  int64_t tokens_, width_, sb_, st_, sc_;
};

}  // namespace fastkd
