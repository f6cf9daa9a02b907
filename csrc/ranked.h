// Ranks of a row in descending order of its values, the lower index first among equals.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastkd {

class Ranked {
 public:
  explicit Ranked(int64_t n) : n_(n), items_(n > kFew ? n : 0), other_(items_.size()) {}

  // ranks[i]: how many values come before values[i]. `values` can be read up to whole vectors.
  void operator()(const double* values, int32_t* ranks) {
    if (n_ <= kFew) return count(values, ranks);
    sort_coarsely(values);
    sort_runs(values);
    for (int64_t place = 0; place < n_; ++place) ranks[items_[place].index] = static_cast<int32_t>(place);
  }

 private:
  static constexpr int64_t kFew = 256;
  static constexpr int kDigits = 4;
  struct Item {
    uint32_t key;
    int32_t index;
  };

  void count(const double* values, int32_t* ranks) const {
    using S = Simd<double>;
    typedef int64_t Counts __attribute__((vector_size(64)));  // comparisons give -1
    for (int64_t first = 0; first < n_; first += S::lanes) {
      const S::type own = S::load(values + first);
      const int64_t end = std::min(first + S::lanes, n_);
      Counts before{}, after{};
      for (int64_t j = 0; j < first; ++j) before -= S::splat(values[j]) >= own;
      for (int64_t j = end; j < n_; ++j) after -= S::splat(values[j]) > own;
      for (int64_t i = first; i < end; ++i) {
        int64_t rank = before[i - first] + after[i - first];
        for (int64_t j = first; j < end; ++j) rank += j < i ? values[j] >= values[i] : values[j] > values[i];
        ranks[i] = static_cast<int32_t>(rank);
      }
    }
  }

  // Radix sort of the distance to the largest value in 32-bit fixed point.
  void sort_coarsely(const double* values) {
    const auto [low, high] = std::minmax_element(values, values + n_);
    const double top = *high, limit = 4294967295.0, scale = limit / (top - *low);
    uint32_t counts[kDigits][256] = {};
    for (int64_t i = 0; i < n_; ++i) {
      const double distance = (top - values[i]) * scale;
      const uint32_t key = static_cast<uint32_t>(distance < limit ? distance : limit);  // the limit for NaN, too
      items_[i] = {key, static_cast<int32_t>(i)};
      for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][(key >> (8 * digit)) & 255];
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      uint32_t start = 0;
      for (uint32_t& count : counts[digit]) start += std::exchange(count, start);
      for (const Item& item : items_) other_[counts[digit][(item.key >> (8 * digit)) & 255]++] = item;
      items_.swap(other_);
    }
  }

  // What fixed point does not tell apart is sorted by the exact values.
  void sort_runs(const double* values) {
    for (int64_t first = 0, end = 1; first < n_; first = end++) {
      while (end < n_ && items_[end].key == items_[first].key) ++end;
      if (end - first == 1) continue;
      std::sort(items_.begin() + first, items_.begin() + end, [values](const Item& a, const Item& b) {
        const uint64_t x = descending(values[a.index]), y = descending(values[b.index]);
        return x != y ? x < y : a.index < b.index;
      });
    }
  }

  // Unsigned integers in the opposite order of the numbers; +0 and -0 are one, and NaN has its place.
  static uint64_t descending(double value) {
    value += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits >> 63 ? bits : ~(bits | (uint64_t{1} << 63));
  }

  int64_t n_;
  std::vector<Item> items_, other_;
};

}  // namespace fastkd
