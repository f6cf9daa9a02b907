// Logit losses: a row is read into cache, its exponentials take the place of its logits there, and loss and gradient
// come from these. Rows longer than a block go block by block: statistics, then the gradient, for which exponentials
// are made again. Blocks and their order depend on the number of classes alone: the same bits for any number of threads.
#include "convert.h"
#include "logit_loss.h"

#include <numeric>

namespace fastkd {
namespace logits {

constexpr const char* kOp = "logit_loss";
constexpr int64_t kBlock = 32768;  // classes; six lines of floats fit the L2 cache
constexpr int64_t kFewRows = 64;   // so many rows or fewer are shared out by blocks

// Columns of a matrix [N, C] of any floating dtype and strides, as float (or double).
struct Matrix {
  const Tensor* tensor;
  ScalarType dtype;
  int64_t row_stride, column_stride;

  explicit Matrix(const Tensor& t)
      : tensor(&t), dtype(t.scalar_type()), row_stride(t.stride(0)), column_stride(t.stride(1)) {}

  template <class A>
  void read(int64_t row, int64_t column, int64_t n, A* out) const {
    for_float(dtype, kOp, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x = data<T>(*tensor) + row * row_stride + column * column_stride;
      if (column_stride == 1) {
        convert_row(x, n, out);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(x[i * column_stride]);
      }
    });
  }

  template <class A>
  void write(int64_t row, int64_t column, int64_t n, const A* x) const {
    for_float(dtype, kOp, [&](auto type) {
      using T = typename decltype(type)::type;
      convert_row(x, n, mutable_data<T>(*tensor) + row * row_stride + column);
    });
  }

  template <class A>
  A at(int64_t row, int64_t column) const {
    A x;
    read(row, column, 1, &x);
    return x;
  }
};

template <class A>
struct Call {
  Matrix student;
  std::optional<Matrix> teacher, scores, grad;
  const int64_t* index = nullptr;
  const A *weight = nullptr, *sample_weight = nullptr;
  Settings<A> settings;
  int64_t rows, classes, ignore_index;
  A scale = 1, ce_scale = 1;  // of every row, by reduction

  int64_t blocks() const { return (classes + kBlock - 1) / kBlock; }
  bool given(int64_t row) const { return !index || index[row] != ignore_index; }
  bool known(int64_t row) const { return !index || (index[row] >= 0 && index[row] < classes); }
  A class_weight(int64_t c) const { return weight ? weight[c] : A(1); }
  bool soft() const { return settings.term[kCe] != 0 && (scores || settings.term[kSmoothing] != 0); }
};

// Lines of one block, padded with logits of -inf to whole vectors.
template <class A>
struct Lines {
  using S = Simd<A>;
  using V = typename S::type;
  static constexpr int64_t kChunk = 4096;  // classes that float lanes add up before a double takes their sum

  const Call<A>& call;
  const Settings<A>& o;
  int64_t row, first, width, padded;
  std::vector<A> memory;
  A *z, *v, *hot, *slope, *t;  // z becomes e and then the gradient, v becomes f

  explicit Lines(const Call<A>& c) : call(c), o(c.settings) {
    const int64_t line = round_up(std::min(c.classes, kBlock), S::lanes);
    memory.resize(5 * line);
    z = memory.data(), v = z + line, hot = v + line, slope = hot + line, t = slope + line;
  }

  void load(int64_t r, int64_t block) {
    row = r, first = block * kBlock, width = std::min(call.classes - first, kBlock), padded = round_up(width, S::lanes);
    line(call.student, z);
    if (o.teacher) line(*call.teacher, v);
  }

  void line(const Matrix& matrix, A* x) {
    matrix.read(row, first, width, x);
    std::fill(x + width, x + padded, kNothing<A>);
    if (call.index && call.index[row] >= first && call.index[row] < first + width) x[call.index[row] - first] = kNothing<A>;
  }

  A largest(const A* x) const {
    V most = S::load(x);
    for (int64_t i = S::lanes; i < padded; i += S::lanes) {
      const V y = S::load(x + i);
      most = most > y ? most : y;
    }
    A result = most[0];
    for (int64_t i = 1; i < S::lanes; ++i) result = std::max(result, A(most[i]));
    return result;
  }

  static A total(V x) {
    A sum = 0;
    for (int64_t i = 0; i < S::lanes; ++i) sum += x[i];
    return sum;
  }

  // Statistics of the block about its own base.
  Sums<A> sums() {
    Sums<A> s;
    s.student_base = largest(z);
    if (o.teacher) s.teacher_base = largest(v);
    if (call.soft()) add_target(s);
    if (o.hot && o.term[kNkdTarget] != 0) add_hot_teacher(s);
    exponentials(s);
    return s;
  }

  void exponentials(Sums<A>& s) {
    if (o.reverse) {
      o.hot ? exponentials<true, true, true>(s) : exponentials<true, false, true>(s);
    } else if (o.teacher) {
      o.hot ? exponentials<true, true, false>(s) : exponentials<true, false, false>(s);
    } else {
      exponentials<false, false, false>(s);
    }
  }

  template <bool kTeacher, bool kHot, bool kReverse>
  void exponentials(Sums<A>& s) {
    const A zero = Row<A>::at(s.student_base), teacher_zero = Row<A>::at(s.teacher_base), cold = o.cold;
    double sums[6] = {};
    for (int64_t begin = 0; begin < padded; begin += kChunk) {
      V e{}, f{}, f_gap{}, f_a{}, e_gap{}, e_hot{};
      for (int64_t i = begin; i < std::min(begin + kChunk, padded); i += S::lanes) {
        const V dz = S::load(z + i) - zero, a = dz * cold, ea = exp(a);
        S::store(z + i, ea);
        e += ea;
        if constexpr (kHot) {
          const V h = exp(dz);
          S::store(hot + i, h);
          e_hot += h;
        }
        if constexpr (kTeacher) {
          const V b = (S::load(v + i) - teacher_zero) * cold, fb = exp(b), gap = b - a;
          S::store(v + i, fb);
          f += fb;
          f_gap += fb != 0 ? fb * gap : V{};
          f_a += fb != 0 ? fb * a : V{};
          if constexpr (kReverse) {
            const V back = ea != 0 ? -gap : V{};
            S::store(slope + i, back);
            e_gap += ea * back;
          }
        }
      }
      const V parts[6] = {e, f, f_gap, f_a, e_gap, e_hot};
      for (int k = 0; k < 6; ++k) sums[k] += total(parts[k]);
    }
    s.e = A(sums[0]), s.f = A(sums[1]), s.f_gap = A(sums[2]), s.f_a = A(sums[3]), s.e_gap = A(sums[4]);
    s.e_hot = A(sums[5]);
  }

  void add_hot_teacher(Sums<A>& s) const {
    const A zero = Row<A>::at(s.teacher_base);
    double sum = 0;
    for (int64_t begin = 0; begin < padded; begin += kChunk) {
      V part{};
      for (int64_t i = begin; i < std::min(begin + kChunk, padded); i += S::lanes) part += exp(S::load(v + i) - zero);
      sum += total(part);
    }
    s.f_hot = A(sum);
  }

  // Weights of the classes in ce, without the target class; the line is padded with 0.
  void read_target() {
    const A smooth = o.term[kSmoothing], each = smooth / A(call.classes);
    if (call.scores) {
      call.scores->read(row, first, width, t);
      for (int64_t i = 0; i < width; ++i) t[i] = ((1 - smooth) * t[i] + each) * call.class_weight(first + i);
    } else {
      for (int64_t i = 0; i < width; ++i) t[i] = each * call.class_weight(first + i);
    }
    std::fill(t + width, t + padded, A(0));
    if (call.index && call.index[row] >= first && call.index[row] < first + width) t[call.index[row] - first] = 0;
  }

  void add_target(Sums<A>& s) {
    read_target();
    const A zero = Row<A>::at(s.student_base);
    double weights = 0, products = 0;
    for (int64_t i = 0; i < width; ++i) {
      weights += t[i];
      if (t[i] != 0) products += double(t[i]) * (z[i] - zero);
    }
    s.t = A(weights), s.t_z = A(products);
  }

  // G of the classes, and what they add to the losses and to sum e G.
  void slopes(const Row<A>& r, double& loss, double& mean) {
    const A* term = o.term;
    for (int64_t begin = 0; begin < padded; begin += kChunk) {
      V jsd{}, tvd{}, weighted{};
      for (int64_t i = begin; i < std::min(begin + kChunk, padded); i += S::lanes) {
        const V e = S::load(z + i), q = e * r.q_of_e, p = S::load(v + i) * r.p_of_f;
        const Centred<A, V> x(term, q, p);
        V g = x.slope;
        if (o.reverse) g += term[kReverseKl] * S::load(slope + i);
        S::store(slope + i, g);
        jsd += x.jsd, tvd += x.tvd, weighted += e * g;
      }
      loss += term[kJsd] * total(jsd) + A(0.5) * term[kTvd] * total(tvd);
      mean += total(weighted);
    }
  }

  // The gradient of the block, in place of e, then in the output.
  void gradient(const Gradient<A>& g) {
    if (o.hot) {
      o.centred ? gradient<true, true, true>(g) : gradient<true, true, false>(g);
    } else if (o.teacher) {
      o.centred ? gradient<true, false, true>(g) : gradient<true, false, false>(g);
    } else {
      gradient<false, false, false>(g);
    }
    if (call.soft()) {
      read_target();
      for (int64_t i = 0; i < width; ++i) z[i] -= g.of_t * t[i];
    }
    if (call.index && call.index[row] >= first && call.index[row] < first + width) z[call.index[row] - first] = g.target;
    call.grad->write(row, first, width, z);
  }

  template <bool kTeacher, bool kHot, bool kCentred>
  void gradient(const Gradient<A>& g) {
    for (int64_t i = 0; i < padded; i += S::lanes) {
      const V e = S::load(z + i);
      V out = e * g.of_e;
      if constexpr (kTeacher) out += S::load(v + i) * g.of_f;
      if constexpr (kHot) out += S::load(hot + i) * g.of_hot;
      if constexpr (kCentred) out += e * S::load(slope + i) * g.of_slope;
      S::store(z + i, out);
    }
  }
};

template <class A>
Row<A> row_of(const Call<A>& call, const Sums<A>& sums, int64_t row) {
  if (!call.index) return Row<A>(sums, call.settings, kNothing<A>, kNothing<A>, A(0));
  const int64_t y = call.index[row];
  A t = call.class_weight(y);
  if (call.settings.term[kCe] == 0) {
    t = 0;
  } else if (call.soft()) {
    const A smooth = call.settings.term[kSmoothing];
    t *= (1 - smooth) * (call.scores ? call.scores->template at<A>(row, y) : A(1)) + smooth / A(call.classes);
  }
  return Row<A>(sums, call.settings, call.student.template at<A>(row, y),
                call.settings.teacher ? call.teacher->template at<A>(row, y) : kNothing<A>, t);
}

// The losses of the target class in Centred, and its G.
template <class A>
A target_slope(const Settings<A>& o, const Row<A>& r, double& loss) {
  using V = typename Simd<A>::type;
  const Centred<A, V> x(o.term, Simd<A>::splat(r.q.p), Simd<A>::splat(r.p.p));
  loss += o.term[kJsd] * x.jsd[0] + A(0.5) * o.term[kTvd] * x.tvd[0];
  A g = x.slope[0];
  if (o.reverse && r.q.p != 0) {
    // The G of the other classes lack this constant.
    g += o.term[kReverseKl] * ((r.q.log_p - r.p.log_p) - (r.log_f - r.log_e + r.q.log_rest - r.p.log_rest));
  }
  return g;
}

// Not inlined: GCC 12 crashes where this vector code becomes part of a callback.
template <class A, class F>
__attribute__((noinline)) void some_blocks(Lines<A>& lines, int64_t begin, int64_t end, const F& f) {
  for (int64_t block = begin; block < end; ++block) f(lines, block);
}

// Calls f(lines, block) for the blocks of a row, on this thread, or on all.
template <class A, class F>
void for_blocks(const Call<A>& call, Lines<A>* own, const F& f) {
  if (own) return some_blocks(*own, 0, call.blocks(), f);
  parallel(call.blocks(), 1, [&](int64_t begin, int64_t end) {
    Lines<A> lines(call);
    some_blocks(lines, begin, end, f);
  });
}

// The loss of one row; its gradient is written.
template <class A>
double logit_row(const Call<A>& call, int64_t row, Lines<A>* own) {
  const Settings<A>& o = call.settings;
  const int64_t blocks = call.blocks();
  if (!call.given(row)) {
    if (call.grad) {
      const std::vector<A> zeros(std::min(call.classes, kBlock));
      for (int64_t c = 0; c < call.classes; c += kBlock)
        call.grad->write(row, c, std::min(call.classes - c, kBlock), zeros.data());
    }
    return 0;
  }
  if (!call.known(row)) {  // a wrong class: nothing outside the row is read
    if (call.grad) {
      const std::vector<A> nan(std::min(call.classes, kBlock), std::numeric_limits<A>::quiet_NaN());
      for (int64_t c = 0; c < call.classes; c += kBlock)
        call.grad->write(row, c, std::min(call.classes - c, kBlock), nan.data());
    }
    return std::numeric_limits<double>::quiet_NaN();
  }
  std::vector<Sums<A>> parts(blocks);
  for_blocks(call, own, [&](Lines<A>& lines, int64_t block) {
    lines.load(row, block);
    parts[block] = lines.sums();
  });
  Sums<A> sums = parts[0];
  for (int64_t block = 1; block < blocks; ++block) sums.add(parts[block], o.cold);
  const Row<A> r = row_of(call, sums, row);
  double loss = 0, mean = 0;
  // A row of one block still has its exponentials at hand.
  const auto again = [&](Lines<A>& lines, int64_t block) {
    if (blocks == 1) return;
    lines.load(row, block);
    Sums<A> unused = sums;
    lines.exponentials(unused);
  };
  A slope_of_target = 0;
  if (o.centred) {
    std::vector<double> losses(blocks), means(blocks);
    for_blocks(call, own, [&](Lines<A>& lines, int64_t block) {
      again(lines, block);
      lines.slopes(r, losses[block], means[block]);
    });
    loss = std::accumulate(losses.begin(), losses.end(), 0.0);
    mean = std::accumulate(means.begin(), means.end(), 0.0) / (sums.e != 0 ? sums.e : A(1));
    slope_of_target = target_slope(o, r, loss);
  }
  const A weight = call.sample_weight ? call.sample_weight[row] : A(1);
  const A scale = weight * call.scale, ce_scale = weight * call.ce_scale;
  if (call.grad) {
    const Gradient<A> g(sums, o, r, scale, ce_scale, A(mean), slope_of_target);
    for_blocks(call, own, [&](Lines<A>& lines, int64_t block) {
      again(lines, block);
      double unused = 0;
      if (o.centred && blocks > 1) lines.slopes(r, unused, unused);
      lines.gradient(g);
    });
  }
  if (o.teacher) loss += r.distillation(sums, o);
  loss *= scale;
  return o.term[kCe] != 0 ? loss + double(o.term[kCe] * ce_scale) * r.cross_entropy(sums, o) : loss;
}

}  // namespace logits

void logit_loss(const Tensor& student, const std::optional<Tensor>& teacher, const std::optional<Tensor>& index,
                const std::optional<Tensor>& scores, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& items,
                const std::vector<double>& terms, int64_t ignore_index, double fixed, const Tensor& loss,
                const Tensor& divisors, const std::optional<Tensor>& grad) {
  using namespace logits;
  const int64_t rows = student.size(0), classes = student.size(1);
  const auto fits = [&](const std::optional<Tensor>& t) { return !t || (t->size(0) == rows && t->size(1) == classes); };
  FASTKD_CHECK(fits(teacher) && fits(scores) && fits(grad), "logit_loss", "matrices must have one shape");
  FASTKD_CHECK(terms.size() == 12 && (!grad || grad->stride(1) == 1), "logit_loss", "unknown terms or layout");
  FASTKD_CHECK((!index || (index->size(0) == rows && index->is_contiguous())) &&
                   (!weight || (weight->size(0) == classes && weight->is_contiguous())) &&
                   (!sample_weight || (sample_weight->size(0) == rows && sample_weight->is_contiguous())),
               "logit_loss", "vectors must be contiguous, with a number a row or class");
  for_float(loss.scalar_type(), kOp, [&](auto type) {
    using A = Accumulate<typename decltype(type)::type>;
    const auto matrix = [](const std::optional<Tensor>& t) { return t ? std::optional<Matrix>(Matrix(*t)) : std::nullopt; };
    Call<A> call{Matrix(student), matrix(teacher), matrix(scores), matrix(grad),
                 index ? data<int64_t>(*index) : nullptr, weight ? data<A>(*weight) : nullptr,
                 sample_weight ? data<A>(*sample_weight) : nullptr, Settings<A>(terms, teacher.has_value()), rows,
                 classes, ignore_index};
    double count = fixed, ce_count = fixed;
    if (items) {
      count = ce_count = *data<A>(*items);
    } else if (fixed <= 0) {
      ce_count = 0;
      for (int64_t row = 0; row < rows; ++row)
        if (call.given(row) && call.known(row)) count += 1, ce_count += scores ? 1 : call.class_weight(call.index[row]);
    }
    A* inverse = mutable_data<A>(divisors);
    inverse[0] = count != 0 ? A(1 / count) : A(0);
    inverse[1] = ce_count != 0 ? A(1 / ce_count) : A(0);
    call.scale = inverse[0], call.ce_scale = inverse[1];
    double later = 1;
    if (grad && grad->scalar_type() == ScalarType::Half) {  // the gradient is divided by backward
      call.scale = 1, call.ce_scale = inverse[0] != 0 ? inverse[1] / inverse[0] : A(0), later = inverse[0];
    }
    std::vector<double> losses(rows);
    if (call.blocks() > 1 && rows <= kFewRows) {
      for (int64_t row = 0; row < rows; ++row) losses[row] = logit_row<A>(call, row, nullptr);
    } else {
      parallel(rows, 16384 / classes + 1, [&](int64_t begin, int64_t end) {
        Lines<A> lines(call);
        for (int64_t row = begin; row < end; ++row) losses[row] = logit_row(call, row, &lines);
      });
    }
    A* out = mutable_data<A>(loss);
    if (loss.dim() == 1) {
      for (int64_t row = 0; row < rows; ++row) out[row] = A(losses[row] * later);
    } else {
      *out = A(std::accumulate(losses.begin(), losses.end(), 0.0) * later);
    }
  });
}

void logit_loss_backward(const Tensor& grad_loss, const Tensor& saved, const Tensor& divisors, const Tensor& grad) {
  using namespace logits;
  const int64_t rows = saved.size(0), classes = saved.size(1);
  FASTKD_CHECK(grad.size(0) == rows && grad.size(1) == classes && grad.stride(1) == 1, "logit_loss_backward",
               "grad must have the shape of saved and dense rows");
  FASTKD_CHECK(grad_loss.dim() == 0 || (grad_loss.size(0) == rows && grad_loss.is_contiguous()), "logit_loss_backward",
               "grad_loss must be one number, or one a row");
  for_float(grad_loss.scalar_type(), kOp, [&](auto type) {
    using A = Accumulate<typename decltype(type)::type>;
    const A* above = data<A>(grad_loss);
    const A divided = saved.scalar_type() == ScalarType::Half ? *data<A>(divisors) : A(1);
    const bool each = grad_loss.dim() == 1;
    const Matrix from(saved), to(grad);
    parallel(rows, 32768 / classes + 1, [&](int64_t begin, int64_t end) {
      std::vector<A> line(std::min(classes, kBlock));
      for (int64_t row = begin; row < end; ++row) {
        const A factor = (each ? above[row] : *above) * divided;
        for (int64_t c = 0; c < classes; c += kBlock) {
          const int64_t n = std::min(classes - c, kBlock);
          from.read(row, c, n, line.data());
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) line[i] *= factor;
          to.write(row, c, n, line.data());
        }
      }
    });
  });
}

}  // namespace fastkd
