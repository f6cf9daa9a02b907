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
};

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
        shape_(shape) {}

  // (row, column, channel), channel fastest: the order of pixel targets.
  void read_channels_last(int64_t image, int64_t patch, A* out) const {
    const Pixel* corner = at(image, patch);
    for (int64_t y = 0; y < shape_.height; ++y)
      for (int64_t x = 0; x < shape_.width; ++x)
        for (int64_t c = 0; c < shape_.channels; ++c)
          *out++ = static_cast<A>(corner[y * sh_ + x * sw_ + c * sc_]) * scale_[c] + shift_[c];
  }

  // (channel, row, column): the order of a convolution's weight.
  template <class Out>
  void read_channels_first(int64_t image, int64_t patch, Out* out) const {
    const Pixel* corner = at(image, patch);
    for (int64_t c = 0; c < shape_.channels; ++c)
      for (int64_t y = 0; y < shape_.height; ++y)
        for (int64_t x = 0; x < shape_.width; ++x)
          *out++ = static_cast<Out>(static_cast<A>(corner[y * sh_ + x * sw_ + c * sc_]) * scale_[c] + shift_[c]);
  }

 private:
  const Pixel* at(int64_t image, int64_t patch) const {
    STD_TORCH_CHECK(patch >= 0 && patch < shape_.count, "fastkd: patch id ", patch, " outside [0, ", shape_.count, ")");
    return base_ + image * sb_ + (patch / shape_.columns) * shape_.height * sh_ +
           (patch % shape_.columns) * shape_.width * sw_;
  }

  const Pixel* base_;
  const A *scale_, *shift_;
  int64_t sb_, sc_, sh_, sw_;
  PatchShape shape_;
};

}  // namespace fastkd
