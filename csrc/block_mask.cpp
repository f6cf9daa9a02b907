// Square patches of an image set to zero: whole runs of a row are copied or cleared.
#include "common.h"

#include <algorithm>

namespace fastkd {
namespace {

// First pixel of each cell, and the end, by the rule of PyTorch's nearest interpolation: floor of a float product.
inline std::vector<int64_t> cell_starts(int64_t pixels, int64_t cells) {
  const float scale = static_cast<float>(cells) / pixels;
  std::vector<int64_t> start(cells + 1, pixels);
  for (int64_t i = pixels - 1; i >= 0; --i)
    start[std::min(static_cast<int64_t>(static_cast<float>(i) * scale), cells - 1)] = i;
  for (int64_t cell = cells - 1; cell >= 0; --cell) start[cell] = std::min(start[cell], start[cell + 1]);
  return start;
}

}  // namespace

void mask_image(const Tensor& images, const Tensor& keep, const Tensor& out) {
  check_contiguous(out, "mask_image", "out");
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t cells_x = keep.size(3);
  FASTKD_CHECK(keep.scalar_type() == ScalarType::Bool && keep.size(0) == images.size(0), "mask_image",
               "keep must be bool, one grid per image");
  const auto rows = cell_starts(height, keep.size(2)), columns = cell_starts(width, cells_x);
  const bool* kept = data<bool>(keep);
  const int64_t kb = keep.stride(0), kh = keep.stride(2), kw = keep.stride(3);
  for_float(images.scalar_type(), "mask_image", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = data<T>(images);
    T* to = mutable_data<T>(out);
    const int64_t sb = images.stride(0), sc = images.stride(1), sh = images.stride(2), sw = images.stride(3);
    parallel(images.size(0) * channels * height, 32768 / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % height, c = row / height % channels, b = row / height / channels;
        const int64_t cell_y = std::upper_bound(rows.begin(), rows.end(), y) - rows.begin() - 1;
        const bool* line = kept + b * kb + cell_y * kh;
        const T* source = from + b * sb + c * sc + y * sh;
        T* target = to + row * width;
        for (int64_t cell = 0; cell < cells_x; ++cell) {
          const int64_t first = columns[cell], last = columns[cell + 1];
          if (!line[cell * kw])
            std::fill(target + first, target + last, T(0));
          else if (sw == 1)
            std::copy(source + first, source + last, target + first);
          else
            for (int64_t x = first; x < last; ++x) target[x] = source[x * sw];
        }
      }
    });
  });
}

}  // namespace fastkd
