// Column sums of a [N, D] matrix: fixed chunks of rows, so the result does not depend on the number of threads.
#include "convert.h"

namespace fastkd {

void column_sum(const Tensor& x, const Tensor& out) {
  constexpr int64_t chunk = 64;
  const int64_t rows = x.size(0), dim = x.size(1), stride = x.stride(0), chunks = (rows + chunk - 1) / chunk;
  for_float(x.scalar_type(), "column_sum", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const T* from = data<T>(x);
    std::vector<A> partial(chunks * dim, A(0));
    parallel(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * chunk; row < std::min(rows, end * chunk); ++row)
        add_row(from + row * stride, dim, partial.data() + row / chunk * dim);
    });
    A* sum = mutable_data<A>(out);
    std::fill_n(sum, dim, A(0));
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t j = 0; j < dim; ++j) sum[j] += partial[i * dim + j];
  });
}

}  // namespace fastkd
