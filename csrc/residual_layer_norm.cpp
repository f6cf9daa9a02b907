// Residual addition + LayerNorm, rows in registers and L1: the residual stream is read once and written once.
#include "token_rows.h"

namespace fastkd {
namespace {

constexpr int64_t kChunk = 64;  // rows that share one partial sum of weight gradients, for any number of threads

// The row itself where it is wide already, else a converted copy in `buffer`.
template <class A, class T>
const A* wide_row(const T* row, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) return row;
  convert_row(row, n, buffer);
  return buffer;
}

template <class X, class Delta, class Out>
void norm_forward(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, const Tensor& bias,
                  double eps, const Tensor& total, const Tensor& stats, const Tensor& normed) {
  using A = Accumulate<X>;
  const int64_t tokens = x.size(1), rows = x.size(0) * tokens, dim = x.size(2);
  const At<X> from(x);
  const At<Delta> step(delta ? *delta : x);
  X* sums = delta ? mutable_data<X>(total) : nullptr;
  A* statistics = mutable_data<A>(stats);
  Out* result = mutable_data<Out>(normed);
  const A *w = data<A>(weight), *b = data<A>(bias);
  parallel(rows, 8192 / dim + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * dim);
    A *t = scratch.data(), *d = t + dim;
    for (int64_t row = begin; row < end; ++row) {
      const A* value = wide_row(from(row / tokens, row % tokens), dim, t);
      A mean = 0, square = 0;
      if (sums) {
        X* sum = sums + row * dim;
        const A* add = wide_row(step(row / tokens, row % tokens), dim, d);
        A* line = line_for<A>(sum, scratch);
#pragma omp simd
        for (int64_t j = 0; j < dim; ++j) line[j] = value[j] + add[j];
        if constexpr (!std::is_same_v<X, A>) {  // statistics of what is stored
          convert_row(line, dim, sum);
          convert_row(sum, dim, line);
        }
        value = line;
      }
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < dim; ++j) mean += value[j];
      mean /= dim;
#pragma omp simd reduction(+ : square)
      for (int64_t j = 0; j < dim; ++j) square += (value[j] - mean) * (value[j] - mean);
      const A scale = 1 / std::sqrt(square / dim + A(eps));
      statistics[2 * row] = mean;
      statistics[2 * row + 1] = scale;
      A* out = line_for<A>(result + row * dim, scratch);
#pragma omp simd
      for (int64_t j = 0; j < dim; ++j) out[j] = (value[j] - mean) * scale * w[j] + b[j];
      if constexpr (!std::is_same_v<Out, A>) convert_row(out, dim, result + row * dim);
    }
  });
}

template <class X, class Delta, class G>
void norm_backward(const std::optional<Tensor>& grad_total, const Tensor& grad_normed, const Tensor& total,
                   const Tensor& weight, const Tensor& stats, const Tensor& grad_weight, const Tensor& grad_bias,
                   const std::optional<Tensor>& grad_delta, const Tensor& grad_x) {
  using A = Accumulate<X>;
  const int64_t tokens = total.size(1), rows = total.size(0) * tokens, dim = total.size(2);
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  const At<X> from(total), through(grad_total ? *grad_total : total);
  const At<G> upstream(grad_normed);
  const bool has_through = grad_total.has_value();
  X* gradient = mutable_data<X>(grad_x);
  Delta* gradient_delta = grad_delta ? mutable_data<Delta>(*grad_delta) : nullptr;
  const A *w = data<A>(weight), *statistics = data<A>(stats);
  std::vector<A> partial(chunks * 2 * dim, A(0));
  parallel(chunks, 8192 / (dim * kChunk) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(3 * dim);
    A *h = scratch.data(), *y = h + dim, *u = y + dim;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A *dw = partial.data() + chunk * 2 * dim, *db = dw + dim;
      for (int64_t row = chunk * kChunk; row < std::min(rows, (chunk + 1) * kChunk); ++row) {
        const A mean = statistics[2 * row], scale = statistics[2 * row + 1];
        const A* value = wide_row(from(row / tokens, row % tokens), dim, h);
        const A* g = wide_row(upstream(row / tokens, row % tokens), dim, u);
        A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t j = 0; j < dim; ++j) {
          const A centred = (value[j] - mean) * scale, weighted = g[j] * w[j];
          h[j] = centred;
          y[j] = weighted;
          sum += weighted;
          dot += weighted * centred;
          dw[j] += g[j] * centred;
          db[j] += g[j];
        }
        sum /= dim;
        dot /= dim;
        A* dx = line_for<A>(gradient + row * dim, scratch);  // the scratch line is that of h: read before written
        if (has_through) {
          const A* pass = wide_row(through(row / tokens, row % tokens), dim, u);
#pragma omp simd
          for (int64_t j = 0; j < dim; ++j) dx[j] = pass[j] + scale * (y[j] - sum - h[j] * dot);
        } else {
#pragma omp simd
          for (int64_t j = 0; j < dim; ++j) dx[j] = scale * (y[j] - sum - h[j] * dot);
        }
        if constexpr (!std::is_same_v<X, A>) convert_row(dx, dim, gradient + row * dim);
        if (gradient_delta) convert_row(dx, dim, gradient_delta + row * dim);
      }
    }
  });
  A *dw = mutable_data<A>(grad_weight), *db = mutable_data<A>(grad_bias);
  std::fill_n(dw, dim, A(0));
  std::fill_n(db, dim, A(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t j = 0; j < dim; ++j) {
      dw[j] += partial[chunk * 2 * dim + j];
      db[j] += partial[chunk * 2 * dim + dim + j];
    }
}

// The dtypes that occur: residual X, and a compute dtype for delta and the result that is X or narrower.
template <class F>
void for_norm_types(const Tensor& x, ScalarType compute, const char* op, const F& f) {
  for_float(x.scalar_type(), op, [&](auto type) {
    using X = typename decltype(type)::type;
    if (compute == x.scalar_type()) return f(type, type);
    if constexpr (std::is_same_v<X, float>) {
      if (compute == ScalarType::BFloat16) return f(type, Type<BFloat16>{});
      if (compute == ScalarType::Half) return f(type, Type<Half>{});
    }
    STD_TORCH_CHECK(false, "fastkd ", op, ": the residual stream must be float32 or have the compute dtype");
  });
}

}  // namespace

void residual_layer_norm(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, const Tensor& bias,
                         double eps, const Tensor& total, const Tensor& stats, const Tensor& normed) {
  const auto compute = normed.scalar_type();
  FASTKD_CHECK(!delta || delta->scalar_type() == compute || delta->scalar_type() == x.scalar_type(),
               "residual_layer_norm", "delta must have the dtype of x or of the result");
  for_norm_types(x, compute, "residual_layer_norm", [&](auto residual, auto result) {
    using X = typename decltype(residual)::type;
    using Out = typename decltype(result)::type;
    if (delta && delta->scalar_type() != compute)
      norm_forward<X, X, Out>(x, delta, weight, bias, eps, total, stats, normed);
    else
      norm_forward<X, Out, Out>(x, delta, weight, bias, eps, total, stats, normed);
  });
}

void residual_layer_norm_backward(const std::optional<Tensor>& grad_total, const Tensor& grad_normed,
                                  const Tensor& total, const Tensor& weight, const Tensor& stats,
                                  const Tensor& grad_weight, const Tensor& grad_bias,
                                  const std::optional<Tensor>& grad_delta, const Tensor& grad_x) {
  for_norm_types(total, grad_normed.scalar_type(), "residual_layer_norm_backward", [&](auto residual, auto result) {
    using X = typename decltype(residual)::type;
    using G = typename decltype(result)::type;
    FASTKD_CHECK(!grad_delta || grad_delta->scalar_type() == grad_normed.scalar_type(), "residual_layer_norm_backward",
                 "delta must have the dtype of x or of the result");
    norm_backward<X, G, G>(grad_total, grad_normed, total, weight, stats, grad_weight, grad_bias, grad_delta, grad_x);
  });
}

}  // namespace fastkd
