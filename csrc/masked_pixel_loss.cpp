// Pixel loss of masked patches: targets are made row by row in a scratch line, never as a tensor.
#include "convert.h"
#include "pixels.h"

#include <numeric>

namespace fastkd {
namespace {

struct PixelLoss {
  const Tensor &pred, &images, &ids, &affine;
  const std::optional<Tensor>& weight;
  PatchShape shape;
  bool norm_pix;
  double eps;

  // Runs visit(row, b, k, w, pred row as A, target row as A) over the rows whose weight is not 0, and
  // skip(row) over the others.
  template <class T, class Pixel, class Visit, class Skip>
  void for_rows(const Visit& visit, const Skip& skip) const {
    using A = Accumulate<T>;
    const int64_t rows = pred.size(1), total = pred.size(0) * rows, pixels = shape.pixels();
    const A* weights = weight ? data<A>(*weight) : nullptr;
    const T* values = data<T>(pred);
    const int64_t sb = pred.stride(0), sk = pred.stride(1), sp = pred.stride(2);
    const PatchReader<Pixel, A> reader(images, affine, shape);
    parallel(total, 32768 / pixels + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> x(pixels), target(pixels);
      for (int64_t row = begin; row < end; ++row) {
        const A w = weights ? weights[row] : A(1) / A(total);
        if (w == 0) {
          skip(row);
          continue;
        }
        const int64_t b = row / rows, k = row % rows;
        reader.read_channels_last(b, data<int64_t>(ids)[b * ids.stride(0) + k * ids.stride(1)], target.data());
        if (norm_pix) normalise_patch(target.data(), pixels, static_cast<A>(eps));
        const T* p = values + b * sb + k * sk;
        if (sp == 1)
          convert_row(p, pixels, x.data());
        else
          for (int64_t i = 0; i < pixels; ++i) x[i] = static_cast<A>(p[i * sp]);
        visit(row, w, x.data(), target.data());
      }
    });
  }
};

}  // namespace

void masked_pixel_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                       const std::optional<Tensor>& weight, const Tensor& affine, const std::vector<int64_t>& patch,
                       bool norm_pix, double eps, const Tensor& loss) {
  const PixelLoss op{pred, images, ids, affine, weight, PatchShape(images, patch), norm_pix, eps};
  for_float(pred.scalar_type(), "masked_pixel_loss", [&](auto type) {
    for_pixel(images.scalar_type(), "masked_pixel_loss", [&](auto pixel) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      const int64_t n = op.shape.pixels();
      std::vector<double> partial(pred.size(0) * pred.size(1), 0.0);
      op.for_rows<T, typename decltype(pixel)::type>(
          [&](int64_t row, A w, const A* x, const A* target) {
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) sum += (x[i] - target[i]) * (x[i] - target[i]);
            partial[row] = static_cast<double>(sum) * w / n;
          },
          [](int64_t) {});
      // Summed in row order: the same bits for any number of threads.
      *mutable_data<A>(loss) = static_cast<A>(std::accumulate(partial.begin(), partial.end(), 0.0));
    });
  });
}

void masked_pixel_loss_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& images, const Tensor& ids,
                                const std::optional<Tensor>& weight, const Tensor& affine,
                                const std::vector<int64_t>& patch, bool norm_pix, double eps,
                                const Tensor& grad_pred) {
  check_contiguous(grad_pred, "masked_pixel_loss_backward", "grad_pred");
  const PixelLoss op{pred, images, ids, affine, weight, PatchShape(images, patch), norm_pix, eps};
  for_float(pred.scalar_type(), "masked_pixel_loss_backward", [&](auto type) {
    for_pixel(images.scalar_type(), "masked_pixel_loss_backward", [&](auto pixel) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      const int64_t n = op.shape.pixels();
      const A upstream = *data<A>(grad_loss);
      T* out = mutable_data<T>(grad_pred);
      op.for_rows<T, typename decltype(pixel)::type>(
          [&](int64_t row, A w, const A* x, A* target) {
            const A scale = upstream * w * 2 / n;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) target[i] = (x[i] - target[i]) * scale;
            convert_row(target, n, out + row * n);
          },
          [&](int64_t row) { std::fill_n(out + row * n, n, T(0)); });
    });
  });
}

}  // namespace fastkd
