// Pseudo-labels: the largest class and its probability from logits that are interpolated in the L1 cache.
#include "bilinear.h"

#include <numeric>

namespace fastkd {
namespace {

template <class A>
using Lane = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;  // an integer as wide as A

template <class A, class L>
void label_strips(const Tensor& logits, A threshold, const Tensor& label, const Tensor& count, A* prob) {
  const int64_t height = label.size(1), width = label.size(2), batch = logits.size(0), classes = logits.size(1);
  const Strips<A> strips(logits, height, width);
  std::vector<int64_t> confident(batch * strips.units, 0);
  L* labels = mutable_data<L>(label);
  strips.run("pseudo_label", [&](int64_t unit, int64_t b, int64_t y, int64_t x, int64_t n, const A* z) {
    A best[kStrip], total[kStrip];
    Lane<A> index[kStrip];
    strip_softmax<true>(z, classes, n, best, total, index);
    const int64_t at = (b * height + y) * width + x;
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A p = 1 / total[i];
      sum += p >= threshold;
      total[i] = p;
      labels[at + i] = static_cast<L>(index[i]);
    }
    if (prob) std::copy_n(total, n, prob + at);
    confident[unit] += sum;
  });
  for (int64_t b = 0; b < batch; ++b) {
    const auto begin = confident.begin() + b * strips.units;
    mutable_data<int64_t>(count)[b] = std::accumulate(begin, begin + strips.units, int64_t(0));
  }
}

template <class A>
void label_dispatch(const Tensor& logits, double threshold, const Tensor& label, const Tensor& count,
                    const Tensor& prob) {
  A* probabilities = prob.numel() ? mutable_data<A>(prob) : nullptr;
  if (label.scalar_type() == ScalarType::Byte)
    label_strips<A, uint8_t>(logits, static_cast<A>(threshold), label, count, probabilities);
  else
    label_strips<A, int64_t>(logits, static_cast<A>(threshold), label, count, probabilities);
}

}  // namespace

void pseudo_label(const Tensor& logits, double threshold, const Tensor& label, const Tensor& count,
                  const Tensor& prob) {
  check_contiguous(label, "pseudo_label", "label");
  check_contiguous(prob, "pseudo_label", "prob");
  FASTKD_CHECK(label.size(0) == logits.size(0) && count.size(0) == logits.size(0), "pseudo_label",
               "one label map and one count for each image");
  if (logits.scalar_type() == ScalarType::Double)
    label_dispatch<double>(logits, threshold, label, count, prob);
  else
    label_dispatch<float>(logits, threshold, label, count, prob);
}

}  // namespace fastkd
