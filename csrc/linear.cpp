// The three products of a linear layer in bfloat16, y = x W^T + b, dx = g W and dW = g^T x with db = sum_rows g, on AMX
// tiles. W, b and their gradients may be float32: W is rounded while it is packed, gradients leave the accumulators.
#include "linear_amx.h"

namespace fastkd {

bool has_amx() { return amx::available(); }

#if defined(FASTKD_AMX)

using amx::matrix;

// x [M, K] bfloat16, weight [N, K], bias [N] float32 -> out [M, N] bfloat16.
void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const int64_t m = x.size(0), n = weight.size(0), depth = x.size(1);
  amx::check_product(x, weight, out, depth, weight.size(1), m, n);
  const float* shift = bias ? data<float>(*bias) : nullptr;
  BFloat16* to = mutable_data<BFloat16>(out);
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<BFloat16>{matrix<BFloat16>(x)}, amx::TransposedColumns<T>{matrix<T>(weight)},
              [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                amx::store_block(c, shift ? shift + j : nullptr, rows, columns, to + i * n + j, n);
              });
  });
}

// grad [M, N] bfloat16, weight [N, K] -> out [M, K] bfloat16.
void linear_grad_input(const Tensor& grad, const Tensor& weight, const Tensor& out) {
  const int64_t m = grad.size(0), n = weight.size(1), depth = grad.size(1);
  amx::check_product(grad, weight, out, depth, weight.size(0), m, n);
  BFloat16* to = mutable_data<BFloat16>(out);
  amx::for_parameter(weight, [&](auto type) {
    using T = typename decltype(type)::type;
    amx::gemm(m, n, depth, amx::Rows<BFloat16>{matrix<BFloat16>(grad)}, amx::Columns<T>{matrix<T>(weight)},
              [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                amx::store_block(c, nullptr, rows, columns, to + i * n + j, n);
              });
  });
}

// grad [M, N], x [M, K] bfloat16 -> grad_weight [N, K] float32, grad_bias [N] float32.
void linear_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& grad_weight,
                        const std::optional<Tensor>& grad_bias) {
  constexpr int64_t most = 2048;  // rows at a time, so that a chunk of grad^T fits L2
  const int64_t m = grad.size(1), n = x.size(1), depth = x.size(0);
  amx::check_product(grad, x, grad_weight, grad.size(0), depth, m, n);
  float* to = mutable_data<float>(grad_weight);
  std::vector<float> sums(grad_bias ? round_up(m, 32) : 0, 0.0f);
  const auto part = [&](const Tensor& t, int64_t start) {
    auto whole = matrix<BFloat16>(t);
    return amx::Matrix<BFloat16>{whole.base + start * whole.row, whole.row, std::min(most, depth - start), whole.columns};
  };
  for (int64_t start = 0; start < std::max<int64_t>(depth, 1); start += most) {
    amx::gemm(m, n, std::min(most, depth - start),
              amx::TransposedRows<BFloat16>{part(grad, start), grad_bias ? sums.data() : nullptr},
              amx::Columns<BFloat16>{part(x, start)}, [&](int64_t i, int64_t j) { amx::fetch_to_write(to + i * n + j); },
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* c) {
                for (int64_t r = 0; r < rows; ++r)
                  for (int64_t half = 0; half < columns; half += 16) {
                    const __mmask16 valid = amx::first16(columns - half);
                    float* line = to + (i + r) * n + j + half;
                    __m512 value = _mm512_loadu_ps(c + 32 * r + half);
                    if (start > 0) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, line));
                    _mm512_mask_storeu_ps(line, valid, value);
                  }
              });
  }
  if (grad_bias) std::copy_n(sums.data(), m, mutable_data<float>(*grad_bias));
}

#else

namespace {
void no_amx() { STD_TORCH_CHECK(false, "fastkd linear: this library was built without AMX"); }
}  // namespace

void linear(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&) { no_amx(); }
void linear_grad_input(const Tensor&, const Tensor&, const Tensor&) { no_amx(); }
void linear_grad_weight(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&) { no_amx(); }

#endif

}  // namespace fastkd
