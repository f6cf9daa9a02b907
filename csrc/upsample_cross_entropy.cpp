// Weighted cross entropy of logits that are resized to their label on the fly, and its gradient for the small logits.
#include "bilinear.h"

#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kConsistencyOp = "masked_consistency_loss";
constexpr int64_t kTileRows = 16;  // rows of cells of one piece of the gradient: one more than that is computed

// Class and weight of each position.
template <class A>
class Targets {
 public:
  using I = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;  // an integer as wide as A

  Targets(const Tensor& label, const std::optional<Tensor>& weight, int64_t ignore)
      : label_(label), ignore_(ignore), weight_(weight ? data<A>(*weight) : nullptr),
        bytes_(label.scalar_type() == ScalarType::Byte) {
    for (int d = 0; d < 3 && weight; ++d) stride_[d] = weight->stride(d);
  }

  // Both for n positions; the weight, times `unit`, is 0 where the position does not count. Says whether any counts.
  bool read(int64_t b, int64_t y, int64_t x, int64_t n, A unit, I* target, A* factor) const {
    const int64_t at = b * label_.stride(0) + y * label_.stride(1) + x * label_.stride(2), step = label_.stride(2);
    return bytes_ ? read(data<uint8_t>(label_) + at, step, b, y, x, n, unit, target, factor)
                  : read(data<int64_t>(label_) + at, step, b, y, x, n, unit, target, factor);
  }

 private:
  template <class L>
  bool read(const L* label, int64_t step, int64_t b, int64_t y, int64_t x, int64_t n, A unit, I* target,
            A* factor) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = label[i * step];
      target[i] = static_cast<I>(c);
      factor[i] = c == ignore_ ? A(0) : unit;
    }
    if (weight_) {
      const A* w = weight_ + b * stride_[0] + y * stride_[1] + x * stride_[2];
      for (int64_t i = 0; i < n; ++i) factor[i] = factor[i] == 0 ? A(0) : factor[i] * w[i * stride_[2]];
    }
    A any = 0;
    for (int64_t i = 0; i < n; ++i) any = std::max(any, std::abs(factor[i]));
    return any > 0;
  }

  const Tensor& label_;
  int64_t ignore_;
  const A* weight_;
  bool bytes_;
  int64_t stride_[3] = {0, 0, 0};
};

template <class A>
void consistency_forward(const Tensor& logits, const Tensor& label, const std::optional<Tensor>& weight,
                         int64_t ignore, const Tensor& lse, const Tensor& loss) {
  const int64_t height = label.size(1), width = label.size(2), classes = logits.size(1);
  const Strips<A> strips(logits, height, width);
  const Targets<A> targets(label, weight, ignore);
  std::vector<double> partial(logits.size(0) * strips.units, 0.0);
  A* result = mutable_data<A>(lse);
  strips.run(kConsistencyOp, [&](int64_t unit, int64_t b, int64_t y, int64_t x, int64_t n, const A* z) {
    A best[kStrip], total[kStrip], factor[kStrip];
    typename Targets<A>::I target[kStrip];
    strip_softmax<false>(z, classes, n, best, total, target);
    targets.read(b, y, x, n, A(1), target, factor);
    A* out = result + (b * height + y) * width + x;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = best[i] + std::log(total[i]);
      if (factor[i] == 0) continue;
      const bool known = target[i] >= 0 && target[i] < classes;
      sum += static_cast<double>(factor[i]) * (out[i] - (known ? z[target[i] * kStrip + i] : A(0)));
    }
    partial[unit] += sum;
  });
  // Summed in the order of the units: the same bits for any number of threads.
  const double all = std::accumulate(partial.begin(), partial.end(), 0.0);
  *mutable_data<A>(loss) = static_cast<A>(all / static_cast<double>(label.numel()));
}

// exp(z - lse) - [class is the target], times the factor, for a vector of positions.
template <class A>
inline typename Simd<A>::type entropy_gradient(typename Simd<A>::type z, const A* lse, const A* factor,
                                               const typename Targets<A>::I* target, int64_t c) {
  using S = Simd<A>;
  const typename S::type f = S::load(factor);
  decltype(f > f) chosen;
  std::memcpy(&chosen, target, sizeof(chosen));
  typename S::type p = exp(z - S::load(lse));
  p = chosen == static_cast<typename Targets<A>::I>(c) ? p - 1 : p;
  return f != 0 ? p * f : typename S::type{};
}

template <class A, class T>
void gradient_same(A scale, const Tensor& logits, const Targets<A>& targets, const A* lse, int64_t height,
                   int64_t width, T* grad) {
  using S = Simd<A>;
  const int64_t classes = logits.size(1);
  Strips<A>(logits, height, width)
      .run(kConsistencyOp, [&](int64_t, int64_t b, int64_t y, int64_t x, int64_t n, const A* z) {
        A factor[kStrip] = {}, total[kStrip] = {}, line[kStrip];
        typename Targets<A>::I target[kStrip] = {};
        const bool any = targets.read(b, y, x, n, scale, target, factor);
        std::copy_n(lse + (b * height + y) * width + x, n, total);
        T* out = grad + (b * classes * height + y) * width + x;
        for (int64_t c = 0; c < classes; ++c, out += height * width) {
          if (!any) {
            std::fill_n(out, n, T(0));
            continue;
          }
          for (int64_t i = 0; i < n; i += S::lanes)
            S::store(line + i, entropy_gradient(S::load(z + c * kStrip + i), total + i, factor + i, target + i, c));
          convert_row(line, n, out);
        }
      });
}

// Which positions of a line each cell gathers from, and with which shares: [taps, cells].
template <class A>
struct Gather {
  int64_t taps = 0;
  std::vector<int32_t> position;
  std::vector<A> share;

  explicit Gather(const Axis<A>& axis) {
    const int64_t cells = axis.values;
    for (int64_t i = 0; i < cells; ++i) taps = std::max(taps, end(axis, i) - begin(axis, i));
    position.resize(taps * cells);
    share.assign(taps * cells, A(0));
    for (int64_t i = 0; i < cells; ++i) {
      const int64_t first = begin(axis, i), count = end(axis, i) - first;
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t x = first + std::min(k, std::max<int64_t>(count - 1, 0));
        position[k * cells + i] = static_cast<int32_t>(std::min(x, axis.outputs - 1));
        if (k >= count) continue;
        share[k * cells + i] = (axis.left[x] == i ? 1 - axis.share[x] : A(0)) + (axis.right[x] == i ? axis.share[x] : A(0));
      }
    }
  }

  static int64_t begin(const Axis<A>& axis, int64_t cell) { return cell ? axis.first[cell - 1] : 0; }
  static int64_t end(const Axis<A>& axis, int64_t cell) { return axis.first[std::min(cell + 1, axis.values)]; }
};

template <class A, class T>
void gradient_resized(A scale, const Tensor& logits, const Targets<A>& targets, const A* lse, int64_t height,
                      int64_t width, T* grad) {
  using S = Simd<A>;
  const int64_t classes = logits.size(1), h = logits.size(2), w = logits.size(3);
  const int64_t sb = logits.stride(0), sc = logits.stride(1), sh = logits.stride(2), sw = logits.stride(3);
  const Axis<A> down(h, height), across(w, width);
  const Gather<A> gather(across);
  // Tiles of cells of which each gathers all that it needs, whatever the number of threads.
  const int64_t cells = std::clamp<int64_t>(2 * kStrip * w / width, 1, w), columns = (w + cells - 1) / cells;
  const int64_t rows = (h + kTileRows - 1) / kTileRows;
  int64_t longest = 0;
  for (int64_t i = 0; i < w; i += cells)
    longest = std::max(longest, gather.end(across, std::min(i + cells, w) - 1) - gather.begin(across, i));
  // One more than the longest: where a cell without positions (when shrinking) points to, with a share of 0.
  const int64_t pitch = round_up(longest + 1, S::lanes), size = classes * pitch;
  parallel(logits.size(0) * rows * columns, 1, [&](int64_t first_unit, int64_t last_unit) {
    std::vector<A> scratch(4 * size + 2 * pitch + w + cells);
    std::vector<typename Targets<A>::I> target(pitch);
    A *upper = scratch.data(), *lower = upper + size, *here = lower + size, *next = here + size;
    A *factor = next + size, *total = factor + pitch, *line = total + pitch, *result = line + w;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t b = unit / (rows * columns), j0 = unit / columns % rows * kTileRows, i0 = unit % columns * cells;
      const int64_t j1 = std::min(j0 + kTileRows, h), i1 = std::min(i0 + cells, w);
      const int64_t x0 = gather.begin(across, i0), n = gather.end(across, i1 - 1) - x0;
      const T* source = data<T>(logits) + b * sb;
      std::fill_n(here, size, A(0));
      std::fill(factor + n, factor + pitch, A(0));  // lanes beyond the last position add nothing
      for (int64_t row = std::max<int64_t>(j0 - 1, 0); row < j1; ++row) {
        const int64_t below = std::min(row + 1, h - 1);
        std::fill_n(next, size, A(0));
        if (n > 0 && down.first[row] < down.first[row + 1]) {
          interpolate_across(source + row * sh, classes, sc, sw, across, x0, n, pitch, line, upper);
          interpolate_across(source + below * sh, classes, sc, sw, across, x0, n, pitch, line, lower);
        }
        for (int64_t y = down.first[row]; n > 0 && y < down.first[row + 1]; ++y) {
          if (!targets.read(b, y, x0, n, scale, target.data(), factor)) continue;
          std::copy_n(lse + (b * height + y) * width + x0, n, total);
          const A to_next = below == row ? A(0) : down.share[y], to_here = 1 - to_next;  // the last row has no next one
          for (int64_t c = 0; c < classes; ++c) {
            const A *u = upper + c * pitch, *l = lower + c * pitch;
            A *p = here + c * pitch, *q = next + c * pitch;
            for (int64_t i = 0; i < n; i += S::lanes) {
              const auto z = S::load(u + i) * to_here + S::load(l + i) * to_next;
              const auto g = entropy_gradient(z, total + i, factor + i, target.data() + i, c);
              S::store(p + i, S::load(p + i) + g * to_here);
              S::store(q + i, S::load(q + i) + g * to_next);
            }
          }
        }
        if (row >= j0) {
          const int32_t shift = static_cast<int32_t>(x0);
          for (int64_t c = 0; c < classes; ++c) {
            const A* from = here + c * pitch;
            std::fill_n(result, i1 - i0, A(0));
            for (int64_t k = 0; n > 0 && k < gather.taps; ++k) {
              const int32_t* at = gather.position.data() + k * w + i0;
              const A* share = gather.share.data() + k * w + i0;
#pragma omp simd
              for (int64_t i = 0; i < i1 - i0; ++i) result[i] += share[i] * from[at[i] - shift];
            }
            convert_row(result, i1 - i0, grad + ((b * classes + c) * h + row) * w + i0);
          }
        }
        std::swap(here, next);
      }
    }
  });
}

template <class A>
void check_targets(const Tensor& logits, const Tensor& label, const std::optional<Tensor>& weight, const Tensor& lse) {
  FASTKD_CHECK(label.size(0) == logits.size(0), "masked_consistency_loss", "one label map for each image");
  constexpr ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  FASTKD_CHECK(!weight || weight->scalar_type() == wide, "masked_consistency_loss", "weight must be float32 (float64)");
  check_contiguous(lse, kConsistencyOp, "lse");
}

}  // namespace

void masked_consistency_loss(const Tensor& logits, const Tensor& label, const std::optional<Tensor>& weight,
                             int64_t ignore_index, const Tensor& lse, const Tensor& loss) {
  const auto run = [&](auto wide) {
    using A = typename decltype(wide)::type;
    check_targets<A>(logits, label, weight, lse);
    consistency_forward<A>(logits, label, weight, ignore_index, lse, loss);
  };
  logits.scalar_type() == ScalarType::Double ? run(Type<double>{}) : run(Type<float>{});
}

void masked_consistency_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& label,
                                      const std::optional<Tensor>& weight, int64_t ignore_index, const Tensor& lse,
                                      const Tensor& grad_logits) {
  check_contiguous(grad_logits, "masked_consistency_loss_backward", "grad_logits");
  for_float(logits.scalar_type(), kConsistencyOp, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    check_targets<A>(logits, label, weight, lse);
    const int64_t height = label.size(1), width = label.size(2);
    const A scale = *data<A>(grad_loss) / static_cast<A>(label.numel());
    const Targets<A> targets(label, weight, ignore_index);
    const bool resized = height != logits.size(2) || width != logits.size(3);
    (resized ? gradient_resized<A, T> : gradient_same<A, T>)(scale, logits, targets, data<A>(lse), height, width,
                                                              mutable_data<T>(grad_logits));
  });
}

}  // namespace fastkd
