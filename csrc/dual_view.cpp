// Dual-view loss: an image's features are read once and stay in the L2 cache while both views are compared.
#include "convert.h"

#include <array>
#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kDualViewOp = "dual_view_loss";

// Token rows of one image.
template <class A>
struct Image {
  const A* rows;
  int64_t stride;
  const A* operator()(int64_t n) const { return rows + n * stride; }
};

// Images [N, C] of a [B, N, C] tensor with any strides and floating dtype.
template <class A>
class Images {
 public:
  explicit Images(const Tensor& t)
      : tensor_(t), dtype_(t.scalar_type()), positions_(t.size(1)), channels_(t.size(2)), sb_(t.stride(0)),
        sn_(t.stride(1)), sc_(t.stride(2)) {}

  // Where the rows lie dense and in A: themselves. Else a dense copy in `buffer`, converted and transposed by tiles that
  // fit the L1 cache.
  Image<A> read(int64_t b, std::vector<A>& buffer) const {
    Image<A> result{nullptr, channels_};
    for_float(dtype_, kDualViewOp, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x = data<T>(tensor_) + b * sb_;
      if constexpr (std::is_same_v<T, A>) {
        if (sc_ == 1) {
          result = {x, sn_};
          return;
        }
      }
      buffer.resize(positions_ * channels_);
      result.rows = buffer.data();
      if (sc_ == 1) {
        for (int64_t n = 0; n < positions_; ++n) convert_row(x + n * sn_, channels_, buffer.data() + n * channels_);
      } else {
        across(x, buffer.data());
      }
    });
    return result;
  }

 private:
  template <class T>
  void across(const T* x, A* out) const {
    constexpr int64_t tile = 16;
    for (int64_t n = 0; n < positions_; n += tile)
      for (int64_t c = 0; c < channels_; c += tile) {
        const int64_t rows = std::min(tile, positions_ - n), columns = std::min(tile, channels_ - c);
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < rows; ++i)
            out[(n + i) * channels_ + c + j] = static_cast<A>(x[(n + i) * sn_ + (c + j) * sc_]);
      }
  }

  const Tensor& tensor_;
  ScalarType dtype_;
  int64_t positions_, channels_, sb_, sn_, sc_;
};

template <class A>
void mean_of_rows(const Image<A>& image, int64_t positions, int64_t channels, A* mean) {
  std::fill_n(mean, channels, A(0));
  for (int64_t n = 0; n < positions; ++n) add_row(image(n), channels, mean);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) mean[c] /= positions;
}

template <class A>
A inverse_norm(A squares) {
  return A(1) / std::max(std::sqrt(squares), A(1e-12));
}

template <class A>
A inverse_norm(const A* x, int64_t channels) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += x[c] * x[c];
  return inverse_norm(squares);
}

template <class A>
A centred_inverse_norm(const A* x, const A* mean, int64_t channels) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += (x[c] - mean[c]) * (x[c] - mean[c]);
  return inverse_norm(squares);
}

// Numbers of [2, B, N] or [2, 2, B, N] statistics: `view` 0 is plain, 1 is centred.
template <class A>
struct Statistics {
  A* values;
  int64_t views, rows;
  A& inverse(int view, int64_t row) const { return values[view * rows + row]; }
  A& along(int view, int64_t row) const { return values[(views + view) * rows + row]; }
};

template <class A>
Statistics<A> statistics(const Tensor& t, const Tensor& tokens) {
  // The kernels write the student's only.
  return {const_cast<A*>(data<A>(t)), 2, tokens.size(0) * tokens.size(1)};
}

template <class A>
void write_row(const Tensor& out, int64_t row, const A* x, int64_t channels) {
  for_float(out.scalar_type(), kDualViewOp, [&](auto type) {
    using T = typename decltype(type)::type;
    convert_row(x, channels, mutable_data<T>(out) + row * channels);
  });
}

template <class F>
void dual_view_dispatch(const Tensor& mean, F&& f) {
  mean.scalar_type() == ScalarType::Double ? f(Type<double>{}) : f(Type<float>{});
}

}  // namespace

void dual_view_target(const Tensor& teacher, const Tensor& mean, const Tensor& inverse_norms) {
  const int64_t batch = teacher.size(0), positions = teacher.size(1), channels = teacher.size(2);
  dual_view_dispatch(mean, [&](auto type) {
    using A = typename decltype(type)::type;
    const Images<A> images(teacher);
    const Statistics<A> norms = statistics<A>(inverse_norms, teacher);
    A* means = mutable_data<A>(mean);
    parallel(batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> buffer;
      for (int64_t b = begin; b < end; ++b) {
        const Image<A> t = images.read(b, buffer);
        A* m = means + b * channels;
        mean_of_rows(t, positions, channels, m);
        for (int64_t n = 0; n < positions; ++n) {
          norms.inverse(0, b * positions + n) = inverse_norm(t(n), channels);
          norms.inverse(1, b * positions + n) = centred_inverse_norm(t(n), m, channels);
        }
      }
    });
  });
}

void dual_view_loss(const Tensor& plain, const std::optional<Tensor>& alt, const Tensor& teacher,
                    const Tensor& teacher_mean, const Tensor& teacher_inverse, double alpha_plain, double alpha_alt,
                    const Tensor& mean, const Tensor& rows, const Tensor& losses) {
  const int64_t batch = plain.size(0), positions = plain.size(1), channels = plain.size(2);
  dual_view_dispatch(mean, [&](auto type) {
    using A = typename decltype(type)::type;
    const Images<A> plains(plain), alts(alt ? *alt : plain), teachers(teacher);
    const Statistics<A> theirs = statistics<A>(teacher_inverse, plain), ours = statistics<A>(rows, plain);
    const A* teacher_means = data<A>(teacher_mean);
    A* means = mutable_data<A>(mean);
    std::vector<std::array<double, 2>> partial(batch);
    parallel(batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> buffers[3];
      for (int64_t b = begin; b < end; ++b) {
        const Image<A> p = plains.read(b, buffers[0]), q = alt ? alts.read(b, buffers[1]) : p;
        const Image<A> t = teachers.read(b, buffers[2]);
        const A* tm = teacher_means + b * channels;
        A* m = means + b * channels;
        mean_of_rows(q, positions, channels, m);
        for (int64_t n = 0; n < positions; ++n) {
          const int64_t row = b * positions + n;
          const A *x = p(n), *y = q(n), *z = t(n);
          const A px = inverse_norm(x, channels), py = centred_inverse_norm(y, m, channels);
          const A tx = theirs.inverse(0, row), ty = theirs.inverse(1, row);
          A square_x = 0, square_y = 0, along_x = 0, along_y = 0;
#pragma omp simd reduction(+ : square_x, square_y, along_x, along_y)
          for (int64_t c = 0; c < channels; ++c) {
            const A u = x[c] * px, d = u - z[c] * tx;
            const A w = (y[c] - m[c]) * py, e = w - (z[c] - tm[c]) * ty;
            square_x += d * d;
            along_x += u * d;
            square_y += e * e;
            along_y += w * e;
          }
          partial[b][0] += square_x;
          partial[b][1] += square_y;
          ours.inverse(0, row) = px;
          ours.inverse(1, row) = py;
          // Below the floor of the norm the divisor is a constant: nothing to project out.
          ours.along(0, row) = px < A(1e12) ? along_x : A(0);
          ours.along(1, row) = py < A(1e12) ? along_y : A(0);
        }
      }
    });
    const double alpha[2] = {alpha_plain, alpha_alt};
    for (int view = 0; view < 2; ++view) {
      double sum = 0;  // in the order of the images: the same bits for any number of threads
      for (const auto& image : partial) sum += image[view];
      mutable_data<A>(losses)[view] = static_cast<A>(sum * alpha[view] / batch);
    }
  });
}

void dual_view_loss_backward(const Tensor& grad_losses, const Tensor& plain, const std::optional<Tensor>& alt,
                             const Tensor& teacher, const Tensor& teacher_mean, const Tensor& teacher_inverse,
                             const Tensor& mean, const Tensor& rows, double alpha_plain, double alpha_alt,
                             const std::optional<Tensor>& grad_alt, const Tensor& grad_plain) {
  const int64_t batch = plain.size(0), positions = plain.size(1), channels = plain.size(2);
  check_contiguous(grad_plain, "dual_view_loss_backward", "grad_plain");
  dual_view_dispatch(mean, [&](auto type) {
    using A = typename decltype(type)::type;
    const Images<A> plains(plain), alts(alt ? *alt : plain), teachers(teacher);
    const Statistics<A> theirs = statistics<A>(teacher_inverse, plain), ours = statistics<A>(rows, plain);
    const A *teacher_means = data<A>(teacher_mean), *means = data<A>(mean), *upstream = data<A>(grad_losses);
    const A scale_plain = A(upstream[0] * (2 * alpha_plain / batch)), scale_alt = A(upstream[1] * (2 * alpha_alt / batch));
    parallel(batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> buffers[3], gradients(positions * channels), line(2 * channels);
      A *lost = line.data(), *g = lost + channels;  // the mean of the second view's gradient; one row of the first's
      for (int64_t b = begin; b < end; ++b) {
        const Image<A> p = plains.read(b, buffers[0]), q = alt ? alts.read(b, buffers[1]) : p;
        const Image<A> t = teachers.read(b, buffers[2]);
        const A *m = means + b * channels, *tm = teacher_means + b * channels;
        std::fill_n(lost, channels, A(0));
        for (int64_t n = 0; n < positions; ++n) {
          const int64_t row = b * positions + n;
          const A *x = p(n), *y = q(n), *z = t(n);
          const A px = ours.inverse(0, row), py = ours.inverse(1, row);
          const A tx = theirs.inverse(0, row), ty = theirs.inverse(1, row);
          const A along_x = ours.along(0, row), along_y = ours.along(1, row);
          const A factor_x = scale_plain * px, factor_y = scale_alt * py;
          A* h = gradients.data() + n * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            const A u = x[c] * px, w = (y[c] - m[c]) * py;
            g[c] = (u - z[c] * tx - u * along_x) * factor_x;
            h[c] = (w - (z[c] - tm[c]) * ty - w * along_y) * factor_y;
            lost[c] += h[c];
          }
          if (alt) {
            write_row(grad_plain, row, g, channels);
          } else {
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) h[c] += g[c];
          }
        }
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) lost[c] /= positions;
        for (int64_t n = 0; n < positions; ++n) {
          const A* h = gradients.data() + n * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) g[c] = h[c] - lost[c];
          write_row(grad_alt ? *grad_alt : grad_plain, b * positions + n, g, channels);
        }
      }
    });
  });
}

}  // namespace fastkd
