// Pixel loss of masked patches: a warp (or a block) holds a predicted row, its target and the target's statistics in
// registers; uint8 NHWC pixels are read as they lie, 8 bytes a load.
#include "cuda_pixels.cuh"

namespace fastkd::cuda {
namespace {

// One patch: elements in (row, column, channel) order, normalised.
template <class Pixel>
struct Patch {
  const Patches<Pixel>& from;
  const Pixel* corner;

  __device__ __forceinline__ Patch(const Patches<Pixel>& patches, int64_t image, int64_t patch)
      : from(patches), corner(patches.corner(image, patch)) {}

  template <bool vector>
  __device__ __forceinline__ void read_one_by_one(int base, int width, float (&t)[kItems]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int i = item(base, k, vector);
      t[k] = 0;
      if (i >= width) continue;
      const int y = from.by_line(i), rest = i - y * from.line, x = from.by_channels(rest), c = rest - x * from.channels;
      t[k] = from.normalised(to_float(corner[y * from.stride_h + x * from.stride_w + c * from.stride_c]), c);
    }
  }

  __device__ __forceinline__ void read_packed(int base, int width, float (&t)[kItems]) const {
    Chunk<Pixel> chunk[kChunks];
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const int i = item(base, n * kVector, true), y = from.by_line(i);
      chunk[n] = {};
      if (i < width) chunk[n] = *reinterpret_cast<const Chunk<Pixel>*>(corner + y * from.stride_h + (i - y * from.line));
    }
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const int i = item(base, n * kVector, true);
      int c = i - from.by_channels(i) * from.channels;
      unpack<Pixel>(chunk[n], t + n * kVector);
#pragma unroll
      for (int k = n * kVector; k < (n + 1) * kVector; ++k) {
        t[k] = i < width ? from.normalised(t[k], c) : 0.0f;
        c = c + 1 == from.channels ? 0 : c + 1;
      }
    }
  }
};

// One row in up to three passes: mean, variance, result. As in feature_alignment.cu, rows of up to 16 elements a thread
// are read once, and loops keep the code small.
template <class T, class Pixel, bool backward>
__global__ void __launch_bounds__(kMaxThreads, 1)
    pixel_kernel(Rows<T> preds, Patches<Pixel> patches, const int64_t* ids, int64_t ids_b, int64_t ids_k,
                 const float* weight, unsigned rows, bool vector, bool packed, bool norm_pix, float eps,
                 const float* grad_loss, Rows<T> gradients, float* partial) {
  const unsigned row = row_index();
  if (row >= rows) return;  // whole warps: a block of several rows has one warp a row
  const Row<T> pred = preds[row];
  const unsigned image = row / preds.tokens;
  const int width = pred.width;
  float w = weight ? weight[row] : 1.0f / rows;
  float x[kItems], t[kItems], mean = 0, factor = 1;
  if (w == 0) {  // a visible patch: nothing is read
    if constexpr (backward) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) x[i] = 0;
      for (int base = 0; base < width; base += span())
        vector ? gradients[row].template write<true>(base, x) : gradients[row].template write<false>(base, x);
    } else if (threadIdx.x == 0) {
      partial[row] = 0;
    }
    return;
  }
  int64_t id = ids[image * ids_b + row % preds.tokens * ids_k];
  if (id < 0 || id >= patches.count) {  // an id outside the image shows as NaN; it is not followed
    id = 0;
    w = NAN;
  }
  const Patch<Pixel> patch(patches, image, id);
  const float scale = backward ? *grad_loss * w * (2.0f / width) : 0.0f;
  bool loaded = false;

#pragma unroll 1
  for (int pass = norm_pix ? 0 : 2; pass < 3; ++pass) {
    float sum = 0;
#pragma unroll 1
    for (int base = 0; base < width; base += span()) {
      if (!loaded || width > span()) {
        if (packed) {
          pred.template read<true>(base, x);
          patch.read_packed(base, width, t);
        } else if (vector) {
          pred.template read<true>(base, x);
          patch.template read_one_by_one<true>(base, width, t);
        } else {
          pred.template read<false>(base, x);
          patch.template read_one_by_one<false>(base, width, t);
        }
        loaded = true;
      }
      if (pass == 0) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sum += t[i];
        continue;
      }
      float d[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float centred = item(base, i, vector) < width ? t[i] - mean : 0.0f;
        d[i] = pass == 1 ? centred : x[i] - centred * factor;
      }
      if (backward && pass == 2) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) d[i] *= scale;
        vector ? gradients[row].template write<true>(base, d) : gradients[row].template write<false>(base, d);
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sum += d[i] * d[i];
      }
    }
    if (backward && pass == 2) return;
    sum = row_sum(sum);
    if (pass == 0) mean = sum / width;
    if (pass == 1) factor = 1.0f / std::sqrt(sum / (width - 1) + eps);
    if (pass == 2 && threadIdx.x == 0) partial[row] = sum * w / width;
  }
}

template <bool backward>
const char* run(const PixelLoss& op, const float* grad_loss, void* grad_pred, float* partial, Stream stream) {
  if (op.pred.size[2] > kMostPixels) return kTooManyPixels;
  return for_float(op.pred.dtype, [&](auto type) {
    return for_pixel(op.images.dtype, [&](auto pixel) {
      using T = typename decltype(type)::type;
      using Pixel = typename decltype(pixel)::type;
      const Rows<T> pred(op.pred), gradient(grad_pred, op.pred);
      const Patches<Pixel> patches(op.images, op.patch_height, op.patch_width, op.affine);
      const bool vector = pred.vector() && gradient.vector();
      return launch(pixel_kernel<T, Pixel, backward>, row_geometry(op.rows(), pred.width), stream, pred, patches,
                    static_cast<const int64_t*>(op.ids.data), op.ids.stride[0], op.ids.stride[1], op.weight,
                    static_cast<unsigned>(op.rows()), vector, vector && patches.interleaved(), op.norm_pix, op.eps,
                    grad_loss, gradient, partial);
    });
  });
}

}  // namespace

const char* masked_pixel_loss(const PixelLoss& op, float* partial, float* loss, Stream stream) {
  const char* error = run<false>(op, nullptr, nullptr, partial, stream);
  return error ? error : ordered_sum(partial, op.rows(), loss, stream);
}

const char* masked_pixel_loss_backward(const PixelLoss& op, const float* grad_loss, void* grad_pred, Stream stream) {
  return run<true>(op, grad_loss, grad_pred, nullptr, stream);
}

}  // namespace fastkd::cuda
