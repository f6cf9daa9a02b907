// Pixel loss of a linear prediction, whose buffer ends as the residual: unit * (prediction - target), the gradient up
// to a factor. On AMX tiles the loss is taken where a block of the product leaves the tiles, so that the prediction is
// never written; elsewhere the product is the vendor library's and one pass overwrites it.
#include "convert.h"
#include "linear_amx.h"
#include "pixels.h"

#include <numeric>

namespace fastkd {

// residual [B * K, P] holds predictions without their bias. The mean of squares goes to `loss`.
void pixel_residual(const std::optional<Tensor>& bias, const Tensor& images, const Tensor& ids, const Tensor& affine,
                    const std::vector<int64_t>& patch, bool norm_pix, double eps, double unit, const Tensor& loss,
                    const Tensor& residual) {
  check_contiguous(residual, "pixel_residual", "residual");
  const PatchShape shape(images, patch);
  const int64_t n = shape.pixels(), each = ids.size(1), rows = ids.size(0) * each;
  FASTKD_CHECK(residual.numel() == rows * n, "pixel_residual", "residual has the wrong size");
  for_float(residual.scalar_type(), "pixel_residual", [&](auto type) {
    for_pixel(images.scalar_type(), "pixel_residual", [&](auto pixel) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      const PatchReader<typename decltype(pixel)::type, A> reader(images, affine, shape);
      const std::vector<A> none(bias ? 0 : n, A(0));
      const A *shift = bias ? data<A>(*bias) : none.data(), scale = static_cast<A>(unit);
      const int64_t* id = data<int64_t>(ids);
      const int64_t id_b = ids.stride(0), id_k = ids.stride(1);
      T* values = mutable_data<T>(residual);
      std::vector<double> partial(rows);
      parallel(rows, 32768 / n + 1, [&](int64_t begin, int64_t end) {
        std::vector<A> pred(n), target(n);
        for (int64_t row = begin; row < end; ++row) {
          T* line = values + row * n;
          reader.read_channels_last(row / each, id[row / each * id_b + row % each * id_k], target.data());
          if (norm_pix) normalise_patch(target.data(), n, static_cast<A>(eps));
          convert_row(line, n, pred.data());
          A sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < n; ++i) {
            const A difference = pred[i] + shift[i] - target[i];
            sum += difference * difference;
            pred[i] = difference * scale;
          }
          convert_row(pred.data(), n, line);
          partial[row] = sum;
        }
      });
      // Summed in row order: the same bits for any number of threads.
      *mutable_data<A>(loss) = static_cast<A>(std::accumulate(partial.begin(), partial.end(), 0.0) / (rows * n));
    });
  });
}

#if defined(FASTKD_AMX)

namespace {

// Patches as vectors of (row, column, channel), 16 values at a time.
template <class Pixel>
class PatchWindows {
 public:
  // What is read of a window, in registers.
  struct Lanes {
    __m512 scale, shift;
    __mmask16 first, second;
    int32_t start, jump;
    bool runs;
    const int32_t* offset;
  };

  struct alignas(64) Window {
    float scale[16] = {}, shift[16] = {};
    int32_t offset[16] = {};          // elements from the patch's corner
    __mmask16 first = 0, second = 0;  // lanes of one run of neighbours in memory, then of another
    int32_t jump = 0;                 // where lane 0 of the second run would lie
    bool runs = true;                 // whether two runs are enough

    void find_runs(int64_t count) {
      const int64_t n = std::min<int64_t>(count, 16);
      int64_t i = 1, start = 0;
      const auto run = [&] {
        while (i < n && offset[i] == offset[start] + i - start) ++i;
      };
      if (n <= 0) return;
      run();
      first = amx::first16(i);
      if (i == n) return;
      jump = static_cast<int32_t>(offset[i] - i);
      second = amx::first16(n) & ~first;
      start = i++;
      run();
      runs = i == n;
    }
  };

  PatchWindows(const Tensor& images, const Tensor& affine, const PatchShape& shape)
      : pixels_(shape.pixels()), windows_(round_up(pixels_, 32) / 16) {
    const int64_t sc = images.stride(1), sh = images.stride(2), sw = images.stride(3), channels = shape.channels;
    const float* values = data<float>(affine);
    for (int64_t i = 0; i < pixels_; ++i) {
      const int64_t c = i % channels, x = i / channels % shape.width, y = i / (channels * shape.width);
      const int64_t offset = y * sh + x * sw + c * sc;
      FASTKD_CHECK(offset < int64_t{1} << 29, "linear_pixel_loss", "a patch spans too much memory");
      Window& w = windows_[i / 16];
      const int64_t lane = i % 16;
      w.offset[lane] = static_cast<int32_t>(offset);
      w.scale[lane] = values[c];
      w.shift[lane] = values[channels + c];
    }
    for (int64_t k = 0; k < static_cast<int64_t>(windows_.size()); ++k) windows_[k].find_runs(pixels_ - 16 * k);
  }

  int64_t count() const { return (pixels_ + 15) / 16; }
  __mmask16 lanes(int64_t k) const { return amx::first16(pixels_ - 16 * k); }

  // Brings windows k and k + 1 of the patch at `corner` into the cache.
  void fetch(const Pixel* corner, int64_t k) const {
    _mm_prefetch(corner + windows_[k].offset[0], _MM_HINT_T0);
    _mm_prefetch(corner + windows_[k + 1].offset[0], _MM_HINT_T0);
  }

  // Where values 16 k and on lie.
  Lanes window(int64_t k) const {
    const Window& w = windows_[k];
    return {_mm512_load_ps(w.scale), _mm512_load_ps(w.shift), w.first, w.second, w.offset[0], w.jump, w.runs, w.offset};
  }

  // These values of the patch at `corner`, times scale plus shift; lanes beyond the patch are 0.
  static __m512 read(const Pixel* corner, const Lanes& w) {
    return _mm512_fmadd_ps(load(corner, w), w.scale, w.shift);
  }

 private:
  static __m512 load(const Pixel* corner, const Lanes& w) {
    if constexpr (std::is_same_v<Pixel, uint8_t>) {
      __m128i bytes;
      if (w.runs) {
        bytes = _mm_maskz_loadu_epi8(w.first, corner + w.start);
        bytes = _mm_mask_loadu_epi8(bytes, w.second, corner + w.jump);
      } else {
        alignas(16) uint8_t line[16];
        for (int i = 0; i < 16; ++i) line[i] = (w.first | w.second) >> i & 1 ? corner[w.offset[i]] : 0;
        bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(line));
      }
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    } else {
      const __m512i offsets = _mm512_load_si512(w.offset);
      return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), w.first | w.second, offsets, corner, 4);
    }
  }

  int64_t pixels_;
  std::vector<Window> windows_;
};

// The target of a predicted row: (pixels - mean) * factor.
template <class Pixel>
struct TargetRow {
  const Pixel* corner;
  float mean = 0, factor = 1;

  void normalise(const PatchWindows<Pixel>& patches, int64_t n, float eps) {
    // From the first pixel on: the mean of a flat patch is exact, and nothing is left to divide by sqrt(eps).
    const float start = _mm512_cvtss_f32(patches.read(corner, patches.window(0)));
    mean = start + sum<false>(patches, start) / n;
    factor = 1 / std::sqrt(sum<true>(patches, mean) / (n - 1) + eps);
  }

  template <bool squares>
  float sum(const PatchWindows<Pixel>& patches, float from) const {
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = 0; k < patches.count(); ++k) {
      const __m512 d = _mm512_maskz_sub_ps(patches.lanes(k), patches.read(corner, patches.window(k)), _mm512_set1_ps(from));
      total = squares ? _mm512_fmadd_ps(d, d, total) : _mm512_add_ps(total, d);
    }
    return _mm512_reduce_add_ps(total);
  }
};

template <class Pixel>
std::vector<TargetRow<Pixel>> target_rows(const Tensor& images, const Tensor& ids, const PatchShape& shape,
                                          const PatchWindows<Pixel>& patches, bool norm_pix, float eps) {
  const int64_t each = ids.size(1), id_b = ids.stride(0), id_k = ids.stride(1), n = shape.pixels();
  const int64_t sb = images.stride(0), down = images.stride(2) * shape.height, right = images.stride(3) * shape.width;
  const Pixel* base = data<Pixel>(images);
  const int64_t* id = data<int64_t>(ids);
  std::vector<TargetRow<Pixel>> rows(ids.size(0) * each);
  parallel(rows.size(), 32768 / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / each, patch = id[b * id_b + row % each * id_k];
      shape.check(patch);
      rows[row].corner = base + b * sb + patch / shape.columns * down + patch % shape.columns * right;
      if (norm_pix) rows[row].normalise(patches, n, eps);
    }
  });
  return rows;
}

}  // namespace

// x [B * K, D] bfloat16, weight [P, D] and bias [P] float32, images uint8 or float32 -> residual [B * K, P] bfloat16.
void linear_pixel_loss(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& images,
                       const Tensor& ids, const Tensor& affine, const std::vector<int64_t>& patch, bool norm_pix,
                       double eps, double unit, const Tensor& loss, const Tensor& residual) {
  const PatchShape shape(images, patch);
  const int64_t m = ids.size(0) * ids.size(1), n = shape.pixels(), depth = x.size(1), columns = (n + 31) / 32;
  FASTKD_CHECK(amx::available() && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1 && x.size(0) == m &&
                   weight.scalar_type() == ScalarType::Float && weight.stride(1) == 1 && weight.size(0) == n &&
                   weight.size(1) == depth && residual.is_contiguous() && residual.numel() == m * n,
               "linear_pixel_loss", "shapes, dtypes or strides do not match");
  BFloat16* to = mutable_data<BFloat16>(residual);
  const std::vector<float> none(bias ? 0 : n, 0.0f);
  const float* shift = bias ? data<float>(*bias) : none.data();
  const auto run = [&](auto type) {
    using Pixel = typename decltype(type)::type;
    const PatchWindows<Pixel> patches(images, affine, shape);
    const auto targets = target_rows<Pixel>(images, ids, shape, patches, norm_pix, static_cast<float>(eps));
    // 16 sums for each block of 32 x 32 values, to which its rows are added one after the other: a block comes in pieces.
    std::vector<float> partial((m + 31) / 32 * columns * 16, 0.0f);
    const __m512 factor = _mm512_set1_ps(static_cast<float>(unit));
    amx::gemm(
        m, n, depth, amx::Rows<BFloat16>{amx::matrix<BFloat16>(x)},
        amx::TransposedColumns<float>{amx::matrix<float>(weight)},
        [&](int64_t i, int64_t j) {
          amx::fetch_to_write(to + i * n + j);
          patches.fetch(targets[std::min(i, m - 1)].corner, j / 16);  // asked for whole tiles of 16 rows
        },
        [&](int64_t i, int64_t j, int64_t rows, int64_t width, const float* c) {
          const __mmask16 lanes[2] = {amx::first16(width), amx::first16(width - 16)};
          const __m512 add[2] = {_mm512_maskz_loadu_ps(lanes[0], shift + j),
                                 _mm512_maskz_loadu_ps(lanes[1], shift + j + 16)};
          const auto low = patches.window(j / 16), high = patches.window(j / 16 + 1);
          const auto difference = [&](const auto& window, const TargetRow<Pixel>& row, const float* sum, int half) {
            const __m512 centred = _mm512_sub_ps(patches.read(row.corner, window), _mm512_set1_ps(row.mean));
            const __m512 pred = _mm512_add_ps(_mm512_loadu_ps(sum), add[half]);
            const __m512 d = _mm512_fnmadd_ps(centred, _mm512_set1_ps(row.factor), pred);
            return _mm512_maskz_mov_ps(lanes[half], d);
          };
          float* const sums = partial.data() + (i / 32 * columns + j / 32) * 16;
          __m512 squares = _mm512_loadu_ps(sums);
          for (int64_t r = 0; r < rows; ++r, c += 32) {
            const TargetRow<Pixel>& row = targets[i + r];
            const __m512 d0 = difference(low, row, c, 0), d1 = difference(high, row, c + 16, 1);
            squares = _mm512_fmadd_ps(d0, d0, _mm512_fmadd_ps(d1, d1, squares));
            const auto line = _mm512_cvtne2ps_pbh(_mm512_mul_ps(d1, factor), _mm512_mul_ps(d0, factor));
            _mm512_mask_storeu_epi16(to + (i + r) * n + j, amx::first32(width), (__m512i)line);
          }
          _mm512_storeu_ps(sums, squares);
        });
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (size_t k = 0; k < partial.size(); ++k) total += partial[k];
    *mutable_data<float>(loss) = static_cast<float>(total / (static_cast<double>(m) * n));
  };
  if (images.scalar_type() == ScalarType::Byte) return run(Type<uint8_t>{});
  FASTKD_CHECK(images.scalar_type() == ScalarType::Float, "linear_pixel_loss", "expected uint8 or float32 images");
  run(Type<float>{});
}

#else

void linear_pixel_loss(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                       const Tensor&, const std::vector<int64_t>&, bool, double, double, const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "fastkd linear_pixel_loss: this library was built without AMX");
}

#endif

}  // namespace fastkd
