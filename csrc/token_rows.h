// What ops on rows of tokens share: row pointers, tables in the tokens' dtype or wider, reproducible sums over images.
#pragma once

#include "convert.h"

namespace fastkd {

// Element (i, j) of a 2-D tensor, or where its dense innermost row starts in a 3-D one. Sizes and strides of a Tensor
// are calls into torch: take them out of the loops.
template <class T>
class At {
 public:
  explicit At(const Tensor& t) : base_(data<T>(t)), outer_(t.stride(0)), inner_(t.stride(1)) {}
  const T* operator()(int64_t i, int64_t j) const { return base_ + i * outer_ + j * inner_; }

 private:
  const T* base_;
  int64_t outer_, inner_;
};

// Calls f(Type<...>{}) for a tensor in dtype T or in T's accumulation type (float beside 16-bit floats).
template <class T, class F>
void for_same_or_wide(const std::optional<Tensor>& t, const char* op, F&& f) {
  using A = Accumulate<T>;
  if constexpr (!std::is_same_v<T, A>)
    if (t && t->scalar_type() == ScalarType::Float) return f(Type<A>{});
  if (t)
    for_float(t->scalar_type(), op, [&](auto type) {
      STD_TORCH_CHECK((std::is_same_v<typename decltype(type)::type, T>), "fastkd ", op, ": dtypes do not fit");
    });
  f(Type<T>{});
}

// Where to compute a row that ends up in `out`: there, or in `scratch` where `out` has a narrower type.
template <class A, class T>
A* line_for(T* out, std::vector<A>& scratch) {
  if constexpr (std::is_same_v<A, T>)
    return out;
  else
    return scratch.data();
}

// total[0 .. width) = sum over b of what add(b, sums) adds to its `sums`: at most 64 chunks of images side by side,
// whose borders depend on the batch alone, then the chunks in order. The same bits for any number of threads.
template <class A, class Add>
std::vector<A> sum_over_images(int64_t batch, int64_t width, const Add& add) {
  const int64_t images = std::max<int64_t>((batch + 63) / 64, 1), chunks = (batch + images - 1) / images;
  std::vector<A> sums(std::max<int64_t>(chunks, 1) * width, A(0));
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * images; b < std::min(end * images, batch); ++b) add(b, sums.data() + b / images * width);
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) add_row(sums.data() + chunk * width, width, sums.data());
  sums.resize(width);
  return sums;
}

}  // namespace fastkd
