// Patch embedding of visible patches: the memory-bound steps around two matrix products of the vendor's library.
#include "cuda_pixels.cuh"
#include "cuda_sums.cuh"
#include "cuda_tables.cuh"

namespace fastkd::cuda {
namespace {

// Where the patches of the rows are listed: ids [B, n] with strides.
struct PatchIds {
  const int64_t* data;
  int64_t stride_b, stride_k;
  unsigned visible;

  explicit PatchIds(const View& v)
      : data(static_cast<const int64_t*>(v.data)), stride_b(v.stride[0]), stride_k(v.stride[1]), visible(v.size[1]) {}
  __device__ __forceinline__ int64_t operator()(unsigned image, unsigned j) const {
    return data[image * stride_b + j * stride_k];
  }
  __device__ __forceinline__ int64_t operator()(unsigned row) const { return (*this)(row / visible, row % visible); }
};

__device__ __forceinline__ bool inside(int64_t id, int64_t patches) { return id >= 0 && id < patches; }

constexpr int kRgb = 3, kPatchesABlock = 4;

// Channels-last pixels, a warp a patch: a lane turns 8 neighbours (3 loads) into 8 neighbours of each channel (3
// 16-byte stores), so that a warp's store is a whole 512 bytes of a channel. An id outside the image gives NaN; it is
// not followed.
template <class T, class Pixel>
__global__ void __launch_bounds__(32 * kPatchesABlock)
    interleaved_kernel(Patches<Pixel> patches, PatchIds ids, T* rows, unsigned count) {
  const unsigned row = blockIdx.x * kPatchesABlock + threadIdx.y;
  if (row >= count) return;
  const int64_t id = ids(row);
  const bool valid = inside(id, patches.count);
  const Pixel* corner = patches.corner(row / ids.visible, valid ? id : 0);
  const int words = patches.width / kVector, plane = patches.height * patches.width;
  T* to = rows + int64_t{row} * kRgb * plane;
  float scale[kRgb], shift[kRgb];
#pragma unroll
  for (int c = 0; c < kRgb; ++c) {
    scale[c] = __ldg(patches.affine + c);
    shift[c] = valid ? __ldg(patches.affine + kRgb + c) : NAN;
  }
  for (int item = threadIdx.x; item < patches.height * words; item += 32) {
    const int y = item / words, x = item % words * kVector;
    const auto* from = reinterpret_cast<const Chunk<Pixel>*>(corner + y * patches.stride_h + x * kRgb);
    Chunk<Pixel> chunk[kRgb];
    float pixel[kRgb * kVector];
#pragma unroll
    for (int i = 0; i < kRgb; ++i) chunk[i] = from[i];
#pragma unroll
    for (int i = 0; i < kRgb; ++i) unpack<Pixel>(chunk[i], pixel + i * kVector);
#pragma unroll
    for (int c = 0; c < kRgb; ++c) {
      float line[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) line[k] = pixel[kRgb * k + c] * scale[c] + shift[c];
      *reinterpret_cast<Chunk<T>*>(to + c * plane + y * patches.width + x) = pack<T>(line);
    }
  }
}

// Any strides and sizes: a block a patch, an element at a time.
template <class T, class Pixel>
__global__ void __launch_bounds__(128)
    strided_kernel(Patches<Pixel> patches, Divider by_plane, Divider by_width, PatchIds ids, T* rows) {
  const unsigned row = blockIdx.x;
  const int64_t id = ids(row);
  const bool valid = inside(id, patches.count);
  const Pixel* corner = patches.corner(row / ids.visible, valid ? id : 0);
  const int plane = patches.height * patches.width, pixels = plane * patches.channels;
  T* to = rows + int64_t{row} * pixels;
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    const int c = by_plane(i), rest = i - c * plane, y = by_width(rest), x = rest - y * patches.width;
    const float pixel = to_float(corner[y * patches.stride_h + x * patches.stride_w + c * patches.stride_c]);
    to[i] = from_float<T>(valid ? patches.normalised(pixel, c) : NAN);
  }
}

// out[b, r] = prefix[r]; out[b, R + j] = projected[b n + j] + bias + position[id]. `projected` may be `out` itself: a
// thread has read an element before it writes it.
template <class T, bool vector>
__global__ void __launch_bounds__(kMaxThreads, 1)
    finish_kernel(Rows<T> projected, PatchIds ids, TableRows<T> bias, TableRows<T> position, int64_t patches,
                  TableRows<T> prefix, Rows<T> out, unsigned rows) {
  const unsigned row = row_index();
  if (row >= rows) return;
  const unsigned image = row / out.tokens, i = row % out.tokens, first = out.tokens - ids.visible;
  const int64_t id = i < first || !position.data ? 0 : ids(image, i - first);
  const bool valid = !position.data || inside(id, patches);
  for (int base = 0; base < out.width; base += span()) {
    float x[kItems], more[kItems];
    if (i < first) {
      prefix.template read<vector>(i, base, x);
    } else {
      projected[image * ids.visible + i - first].template read<vector>(base, x);
      if (bias.data) {
        bias.template read<vector>(0, base, more);
#pragma unroll
        for (int k = 0; k < kItems; ++k) x[k] += more[k];
      }
      if (position.data) {
        position.template read<vector>(valid ? id : 0, base, more);
#pragma unroll
        for (int k = 0; k < kItems; ++k) x[k] = valid ? x[k] + more[k] : NAN;
      }
    }
    out[row].template write<vector>(base, x);
  }
}

}  // namespace

const char* visible_patch_rows(const PatchRows& op, Stream stream) {
  return for_float(op.dtype, [&](auto type) {
    return for_pixel(op.images.dtype, [&](auto pixel) {
      using T = typename decltype(type)::type;
      using Pixel = typename decltype(pixel)::type;
      const Patches<Pixel> patches(op.images, op.patch_height, op.patch_width, op.affine);
      const PatchIds ids(op.ids);
      T* rows = static_cast<T*>(op.rows);
      const int64_t count = op.ids.size[0] * op.ids.size[1], plane = int64_t{patches.height} * patches.width;
      if (plane * patches.channels > kMostPixels) return kTooManyPixels;
      if (patches.channels == kRgb && patches.width % kVector == 0 && patches.interleaved() &&
          dense_vector(rows, plane * kRgb)) {
        const Geometry geometry{dim3((count + kPatchesABlock - 1) / kPatchesABlock), dim3(32, kPatchesABlock)};
        return launch(interleaved_kernel<T, Pixel>, geometry, stream, patches, ids, rows, static_cast<unsigned>(count));
      }
      return launch(strided_kernel<T, Pixel>, {dim3(count), dim3(128)}, stream, patches, Divider(plane),
                    Divider(patches.width), ids, rows);
    });
  });
}

const char* visible_patch_finish(const PatchFinish& op, Stream stream) {
  return for_float(op.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t images = op.ids.size[0], visible = op.ids.size[1], width = op.out.size[2];
    const Rows<T> projected(const_cast<void*>(op.projected), visible * width, width, 1, visible, width), out(op.out);
    const TableRows<T> bias({op.bias, false}, width), position(op.pos_embed, width), prefix({op.prefix, false}, width);
    const bool vector = projected.vector() && out.vector() && bias.vector() && position.vector() && prefix.vector();
    const int64_t rows = images * out.tokens;
    return launch(vector ? finish_kernel<T, true> : finish_kernel<T, false>, row_geometry(rows, width), stream,
                  projected, PatchIds(op.ids), bias, position, op.patches, prefix, out, static_cast<unsigned>(rows));
  });
}

const char* visible_patch_sums(const View& grad_out, void* patches, void* grad_bias, void* grad_prefix,
                               int64_t num_prefix, float* partial, Stream stream) {
  return for_float(grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Rows<T> grad(grad_out);
    const int64_t images = grad_out.size[0], visible = grad_out.size[1] - num_prefix;
    const char* error = sum_tokens(grad, images, num_prefix, visible, 1, partial, static_cast<T*>(grad_bias),
                                   static_cast<T*>(patches), stream);
    if (error) return error;
    return sum_tokens(grad, images, 0, 1, num_prefix, partial, static_cast<T*>(grad_prefix), static_cast<T*>(nullptr),
                      stream);
  });
}

}  // namespace fastkd::cuda
