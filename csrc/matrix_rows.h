// Rows of a [N, C] tensor of any floating dtype and strides, as float (or double).
#pragma once

#include "convert.h"

namespace fastkd {

// Calls f(Type<double>{}) for float64, f(Type<float>{}) for any other dtype.
template <class F>
void for_wide(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(Type<double>{}) : f(Type<float>{});
}

class MatrixRows {
 public:
  MatrixRows(const Tensor& tensor, const char* op)
      : tensor_(tensor), op_(op), width_(tensor.size(1)), row_(tensor.stride(0)), column_(tensor.stride(1)) {}

  template <class A>
  void read(int64_t row, A* out) const {
    for_float(tensor_.scalar_type(), op_, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x = data<T>(tensor_) + row * row_;
      if (column_ == 1) {
        convert_row(x, width_, out);
      } else {
        for (int64_t i = 0; i < width_; ++i) out[i] = static_cast<A>(x[i * column_]);
      }
    });
  }

  // The row of a contiguous output.
  template <class A>
  void write(int64_t row, const A* x) const {
    for_float(tensor_.scalar_type(), op_, [&](auto type) {
      using T = typename decltype(type)::type;
      convert_row(x, width_, mutable_data<T>(tensor_) + row * width_);
    });
  }

 private:
  const Tensor& tensor_;
  const char* op_;
  int64_t width_, row_, column_;
};

}  // namespace fastkd
