// Reads one patch of an image (logical NCHW with any strides, floating or uint8) as normalised numbers.
#pragma once

#include "common.h"

namespace fastkd {

struct PatchShape {
  int64_t channels, height, width, columns, count;

  PatchShape(const Tensor& images, const std::vector<int64_t>& patch)
      : channels(images.size(1)),
        height(patch[0]),
        width(patch[1]),
        columns(images.size(3) / patch[1]),
        count(columns * (images.size(2) / patch[0])) {}
  int64_t pixels() const { return channels * height * width; }
  void check(int64_t patch) const {
    STD_TORCH_CHECK(patch >= 0 && patch < count, "fastkd: patch id ", patch, " outside [0, ", count, ")");
  }
};

// t <- (t - mean) / sqrt(variance + eps), with the unbiased variance.
template <class A>
inline void normalise_patch(A* t, int64_t n, A eps) {
  // From the first pixel on: the mean of a flat patch is exact, and nothing is left to divide by sqrt(eps).
  const A first = t[0];
  A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += t[i] - first;
  const A mean = first + sum / n;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += (t[i] - mean) * (t[i] - mean);
  const A scale = A(1) / std::sqrt(square / (n - 1) + eps);
  for (int64_t i = 0; i < n; ++i) t[i] = (t[i] - mean) * scale;
}

template <class Pixel, class A>
class PatchReader {
 public:
  // affine: [2, C], a pixel becomes pixel * affine[0][c] + affine[1][c].
  PatchReader(const Tensor& images, const Tensor& affine, const PatchShape& shape)
      : base_(data<Pixel>(images)),
        scale_(data<A>(affine)),
        shift_(scale_ + shape.channels),
        sb_(images.stride(0)),
        sc_(images.stride(1)),
        sh_(images.stride(2)),
        sw_(images.stride(3)),
        shape_(shape) {
    for (int64_t x = 0; x < shape.width; ++x) {
      line_scale_.insert(line_scale_.end(), scale_, scale_ + shape.channels);
      line_shift_.insert(line_shift_.end(), shift_, shift_ + shape.channels);
    }
  }

  // (row, column, channel), channel fastest: the order of pixel targets.
  void read_channels_last(int64_t image, int64_t patch, A* out) const {
    const Pixel* corner = at(image, patch);
    if (sc_ == 1 && sw_ == shape_.channels) {  // a line of the patch is dense in memory
      const int64_t line = shape_.width * shape_.channels;
      const A *scale = line_scale_.data(), *shift = line_shift_.data();
      for (int64_t y = 0; y < shape_.height; ++y, corner += sh_, out += line) {
#pragma omp simd
        for (int64_t i = 0; i < line; ++i) out[i] = static_cast<A>(corner[i]) * scale[i] + shift[i];
      }
      return;
    }
    for (int64_t y = 0; y < shape_.height; ++y)
      for (int64_t x = 0; x < shape_.width; ++x)
        for (int64_t c = 0; c < shape_.channels; ++c)
          *out++ = static_cast<A>(corner[y * sh_ + x * sw_ + c * sc_]) * scale_[c] + shift_[c];
  }

  // (channel, row, column): the order of a convolution's weight.
  void read_channels_first(int64_t image, int64_t patch, A* out) const {
    const Pixel* corner = at(image, patch);
    switch (shape_.width) {  // the usual widths as constants: a line is then one or two vectors without a tail loop
      case 14: return channels_first<14>(corner, out);
      case 16: return channels_first<16>(corner, out);
      default: return channels_first<0>(corner, out);
    }
  }

 private:
  template <int WIDTH>
  void channels_first(const Pixel* corner, A* out) const {
    const int64_t width = WIDTH ? WIDTH : shape_.width, plane = shape_.height * width;
    if (sc_ == 1 && sw_ == 3 && shape_.channels == 3) {
      const A r = scale_[0], g = scale_[1], b = scale_[2], r0 = shift_[0], g0 = shift_[1], b0 = shift_[2];
      for (int64_t y = 0; y < shape_.height; ++y) {
        const Pixel* line = corner + y * sh_;
        A* to = out + y * width;
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) {
          to[x] = static_cast<A>(line[3 * x]) * r + r0;
          to[plane + x] = static_cast<A>(line[3 * x + 1]) * g + g0;
          to[2 * plane + x] = static_cast<A>(line[3 * x + 2]) * b + b0;
        }
      }
      return;
    }
    for (int64_t c = 0; c < shape_.channels; ++c) {
      const A scale = scale_[c], shift = shift_[c];
      for (int64_t y = 0; y < shape_.height; ++y, out += width) {
        const Pixel* line = corner + y * sh_ + c * sc_;
        if (sw_ == 1) {
#pragma omp simd
          for (int64_t x = 0; x < width; ++x) out[x] = static_cast<A>(line[x]) * scale + shift;
        } else {
          for (int64_t x = 0; x < width; ++x) out[x] = static_cast<A>(line[x * sw_]) * scale + shift;
        }
      }
    }
  }

  const Pixel* at(int64_t image, int64_t patch) const {
    shape_.check(patch);
    return base_ + image * sb_ + (patch / shape_.columns) * shape_.height * sh_ +
           (patch % shape_.columns) * shape_.width * sw_;
  }

  const Pixel* base_;
  const A *scale_, *shift_;
  std::vector<A> line_scale_, line_shift_;  // for each value of a patch's line
  int64_t sb_, sc_, sh_, sw_;
  PatchShape shape_;
};

}  // namespace fastkd
