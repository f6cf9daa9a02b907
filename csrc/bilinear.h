// Bilinear interpolation (align_corners=False) of [B, C, h, w] maps, strip by strip; see fastkd/ops/features/bilinear.py.
#pragma once

#include "convert.h"
#include "simd.h"

#include <algorithm>

namespace fastkd {

// The taps of each output along one axis, and where the outputs of each value begin.
template <class A>
struct Axis {
  int64_t values, outputs;
  std::vector<int32_t> left, right;
  std::vector<A> share;         // of the right tap
  std::vector<int64_t> first;   // first[v]: the first output whose left tap is v or later; first[values] = outputs

  Axis(int64_t values_, int64_t outputs_)
      : values(values_), outputs(outputs_), left(outputs), right(outputs), share(outputs), first(values + 1, outputs) {
    for (int64_t i = outputs - 1; i >= 0; --i) {
      const int64_t place = std::max<int64_t>((2 * i + 1) * values - outputs, 0), tap = place / (2 * outputs);
      left[i] = static_cast<int32_t>(tap);
      right[i] = static_cast<int32_t>(std::min(tap + 1, values - 1));
      share[i] = static_cast<A>(place - tap * 2 * outputs) / static_cast<A>(2 * outputs);
      first[tap] = i;
    }
    for (int64_t v = values - 1; v >= 0; --v) first[v] = std::min(first[v], first[v + 1]);
  }
};

constexpr int64_t kStrip = 128;  // positions of a line that are worked on together: what 20 classes need fits L1

// The logits of `count` positions of a line, interpolated across: out[c * pitch + x - begin].
template <class A, class T>
void interpolate_across(const T* line, int64_t classes, int64_t sc, int64_t sw, const Axis<A>& axis, int64_t begin,
                        int64_t count, int64_t pitch, A* scratch, A* out) {
  const int64_t base = axis.left[begin], cells = axis.right[begin + count - 1] - base + 1;
  const int32_t *left = axis.left.data() + begin, *right = axis.right.data() + begin;
  const A* share = axis.share.data() + begin;
  const int32_t shift = static_cast<int32_t>(base);
  for (int64_t c = 0; c < classes; ++c) {
    const T* source = line + c * sc + base * sw;
    if (sw == 1)
      convert_row(source, cells, scratch);
    else
      for (int64_t i = 0; i < cells; ++i) scratch[i] = static_cast<A>(source[i * sw]);
    A* result = out + c * pitch;
#pragma omp simd
    for (int64_t x = 0; x < count; ++x)
      result[x] = scratch[left[x] - shift] * (1 - share[x]) + scratch[right[x] - shift] * share[x];
  }
}

// Calls visit(unit, b, y, x, count, z) for all positions (b, y, x ... x + count) of the maps resized to height x width;
// z[c * kStrip + i] holds the logits. `unit` counts pieces of work of one image each, `units` of them an image: sums
// kept by unit have the same bits for any number of threads.
template <class A>
class Strips {
 public:
  Strips(const Tensor& logits, int64_t height, int64_t width)
      : logits_(logits), classes_(logits.size(1)), h_(logits.size(2)), w_(logits.size(3)), height_(height),
        width_(width), resized_(h_ != height || w_ != width), strips_((width + kStrip - 1) / kStrip),
        units((resized_ ? h_ : height) * strips_) {}

  template <class Visit>
  void run(const char* op, const Visit& visit) const {
    for_float(logits_.scalar_type(), op, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (std::is_same_v<Accumulate<T>, A>) {
        if (resized_)
          resized<T>(visit);
        else
          same<T>(visit);
      }
    });
  }

 private:
  const Tensor& logits_;
  int64_t classes_, h_, w_, height_, width_;
  bool resized_;
  int64_t strips_;

 public:
  const int64_t units;

 private:
  int64_t grain() const { return 65536 / (classes_ * kStrip) + 1; }

  template <class T, class Visit>
  void same(const Visit& visit) const {
    const int64_t sb = logits_.stride(0), sc = logits_.stride(1), sh = logits_.stride(2), sw = logits_.stride(3);
    parallel(logits_.size(0) * units, grain(), [&](int64_t begin, int64_t end) {
      std::vector<A> z(classes_ * kStrip);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / units, y = unit % units / strips_, x = unit % strips_ * kStrip;
        const int64_t count = std::min(kStrip, width_ - x);
        const T* source = data<T>(logits_) + b * sb + y * sh + x * sw;
        for (int64_t c = 0; c < classes_; ++c, source += sc) {
          A* out = z.data() + c * kStrip;
          if (sw == 1)
            convert_row(source, count, out);
          else
            for (int64_t i = 0; i < count; ++i) out[i] = static_cast<A>(source[i * sw]);
        }
        visit(unit, b, y, x, count, z.data());
      }
    });
  }

  template <class T, class Visit>
  void resized(const Visit& visit) const {
    const int64_t sb = logits_.stride(0), sc = logits_.stride(1), sh = logits_.stride(2), sw = logits_.stride(3);
    const Axis<A> down(h_, height_), across(w_, width_);
    parallel(logits_.size(0) * units, grain() / 4 + 1, [&](int64_t begin, int64_t end) {
      const int64_t size = classes_ * kStrip;
      std::vector<A> scratch(3 * size + w_);
      A *upper = scratch.data(), *lower = upper + size, *z = lower + size, *line = z + size;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / units, row = unit % units / strips_, x = unit % strips_ * kStrip;
        const int64_t count = std::min(kStrip, width_ - x);
        if (down.first[row] == down.first[row + 1]) continue;
        const T* source = data<T>(logits_) + b * sb;
        interpolate_across(source + row * sh, classes_, sc, sw, across, x, count, kStrip, line, upper);
        interpolate_across(source + std::min(row + 1, h_ - 1) * sh, classes_, sc, sw, across, x, count, kStrip, line,
                           lower);
        for (int64_t y = down.first[row]; y < down.first[row + 1]; ++y) {
          const A below = down.share[y], above = 1 - below;
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) z[i] = upper[i] * above + lower[i] * below;
          visit(unit, b, y, x, count, z);
        }
      }
    });
  }
};

// Over the classes of a strip: the largest logit, the sum of exp(z - largest), and optionally the first largest class.
template <bool INDEX, class A, class I>
void strip_softmax(const A* z, int64_t classes, int64_t count, A* best, A* total, I* index) {
  using S = Simd<A>;
  for (int64_t x = 0; x < count; x += S::lanes) {
    typename S::type largest = S::load(z + x), sum = {};
    decltype(largest > largest) at = {};
    for (int64_t c = 1; c < classes; ++c) {
      const typename S::type v = S::load(z + c * kStrip + x);
      const auto larger = v > largest;
      largest = larger ? v : largest;
      if constexpr (INDEX) at = larger ? (at ^ at) + static_cast<I>(c) : at;
    }
    for (int64_t c = 0; c < classes; ++c) sum += exp(S::load(z + c * kStrip + x) - largest);
    S::store(best + x, largest);
    S::store(total + x, sum);
    if constexpr (INDEX) std::memcpy(index + x, &at, sizeof(at));
  }
}

}  // namespace fastkd
