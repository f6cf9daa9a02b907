// Patches of images (logical NCHW, any strides), as csrc/pixels.h has them for the CPU.
#pragma once

#include "cuda_rows.cuh"

namespace fastkd::cuda {

// i / d by a multiplication; exact for i * d < 2^40.
struct Divider {
  uint64_t multiplier;

  explicit Divider(uint64_t d) : multiplier(((uint64_t{1} << 40) + d - 1) / d) {}
  __device__ __forceinline__ int operator()(int i) const { return static_cast<int>(i * multiplier >> 40); }
};

constexpr int64_t kMostPixels = int64_t{1} << 20;  // a patch
constexpr const char* kTooManyPixels = "more than 2^20 values a patch";

template <class Pixel>
struct Patches {
  const Pixel* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int channels, line, height, width, columns;  // line: elements of a patch's pixel row
  int64_t count;
  Divider by_line, by_channels;
  const float* affine;  // [2, C]: a pixel becomes pixel * affine[0][c] + affine[1][c]

  Patches(const View& images, int patch_height, int patch_width, const float* affine)
      : data(static_cast<const Pixel*>(images.data)), stride_b(images.stride[0]), stride_c(images.stride[1]),
        stride_h(images.stride[2]), stride_w(images.stride[3]), channels(images.size[1]),
        line(patch_width * channels), height(patch_height), width(patch_width),
        columns(images.size[3] / patch_width), count(columns * (images.size[2] / patch_height)),
        by_line(line), by_channels(channels), affine(affine) {}

  // Whether a patch's pixel rows lie dense in memory, channel fastest, and any 8 neighbours that start at a multiple of
  // 8 can be loaded at once.
  bool interleaved() const {
    const auto aligned = [](int64_t elements) { return elements * sizeof(Pixel) % alignof(Chunk<Pixel>) == 0; };
    return stride_c == 1 && stride_w == channels && line % kVector == 0 && aligned(stride_b) && aligned(stride_h) &&
           reinterpret_cast<uintptr_t>(data) % alignof(Chunk<Pixel>) == 0;
  }

  __device__ __forceinline__ const Pixel* corner(int64_t image, int64_t patch) const {
    return data + image * stride_b + patch / columns * height * stride_h + patch % columns * width * stride_w;
  }
  __device__ __forceinline__ float normalised(float pixel, int channel) const {
    return pixel * __ldg(affine + channel) + __ldg(affine + channels + channel);
  }
};

}  // namespace fastkd::cuda
