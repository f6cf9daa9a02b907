// Moving average of many tensors: one parallel loop over chunks of all of them, however small each is.
#include "convert.h"

namespace fastkd {
namespace {

constexpr int64_t kEmaChunk = 16384;  // elements of a task

struct EmaTask {
  int64_t tensor, begin, end;
};

// torch.lerp's two forms: weight 0 keeps phi and weight 1 gives theta, to the last bit.
template <class A>
void ema_line(const A* phi, const A* theta, int64_t n, A weight, A* out) {
  if (weight < A(0.5)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = phi[i] + weight * (theta[i] - phi[i]);
  } else {
    const A rest = 1 - weight;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = theta[i] - rest * (theta[i] - phi[i]);
  }
}

template <class Phi, class Theta>
void ema_range(Phi* phi, const Theta* theta, int64_t n, Accumulate<Phi> weight) {
  using A = Accumulate<Phi>;
  if constexpr (std::is_same_v<Phi, A> && std::is_same_v<Theta, A>) {
    ema_line(phi, theta, n, weight, phi);
  } else {
    constexpr int64_t block = 1024;
    A wide[2 * block];
    for (int64_t i = 0; i < n; i += block) {
      const int64_t count = std::min(block, n - i);
      convert_row(phi + i, count, wide);
      convert_row(theta + i, count, wide + block);
      ema_line(wide, wide + block, count, weight, wide);
      convert_row(wide, count, phi + i);
    }
  }
}

}  // namespace

void ema_update_(const std::vector<Tensor>& averaged, const std::vector<Tensor>& current, const Tensor& weight) {
  constexpr const char* op = "ema_update_";
  std::vector<EmaTask> tasks;
  for (int64_t t = 0; t < static_cast<int64_t>(averaged.size()); ++t) {
    const int64_t n = averaged[t].numel();
    FASTKD_CHECK(current[t].numel() == n, "ema_update_", "averaged and current must have the same sizes");
    for (int64_t begin = 0; begin < n; begin += kEmaChunk)
      tasks.push_back({t, begin, std::min(n, begin + kEmaChunk)});
  }
  parallel(tasks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const auto [t, begin, end] = tasks[k];
      for_float(averaged[t].scalar_type(), op, [&](auto type) {
        using Phi = typename decltype(type)::type;
        for_float(current[t].scalar_type(), op, [&](auto other) {
          using Theta = typename decltype(other)::type;
          if constexpr (std::is_same_v<Accumulate<Phi>, Accumulate<Theta>>)
            ema_range(mutable_data<Phi>(averaged[t]) + begin, data<Theta>(current[t]) + begin, end - begin,
                      *data<Accumulate<Phi>>(weight));
        });
      });
    }
  });
}

}  // namespace fastkd
