// USKD: everything in double. The sort of each row takes most of the time, and ranks of exact scores have no rounding
// that could swap neighbours.
#include "exp_double.h"
#include "matrix_rows.h"
#include "ranked.h"

#include <limits>
#include <numeric>

namespace fastkd {
namespace {

constexpr const char* kUskdOp = "uskd_loss";
constexpr double kUskdSmoothing = 0.1, kUskdRankEps = 1e-6, kUskdNothing = -std::numeric_limits<double>::infinity();
// Columns of the first pass, in the order of COLUMNS in uskd.py; "rest" is without targets.
enum UskdColumn {
  kUskdValid, kUskdSquare, kUskdLabel = 3, kUskdValue = 5, kUskdStudent = 7, kUskdWeak = 11, kUskdColumns = 15
};

// A row as double, padded to whole vectors with -inf.
void uskd_read(const Tensor& tensor, int64_t row, double* out) {
  const int64_t width = tensor.size(1);
  MatrixRows(tensor, kUskdOp).read(row, out);
  std::fill(out + width, out + round_up(width, Simd<double>::lanes), kUskdNothing);
}

struct UskdTargets {
  int64_t label[2] = {0, -1};
  double value[2] = {1, 0};
  bool valid = true, known = true;

  bool removed(int k) const { return value[k] > 0; }
};

UskdTargets uskd_targets(const Tensor& target, int64_t row, int64_t classes, int64_t ignore_index,
                         const double* scores) {
  UskdTargets found;
  if (!scores) {
    const int64_t label = data<int64_t>(target)[row * target.stride(0)];
    found.valid = label != ignore_index;
    found.known = !found.valid || (label >= 0 && label < classes);
    found.label[0] = found.valid && found.known ? label : 0;
    return found;
  }
  found.label[0] = std::max_element(scores, scores + classes) - scores;  // the first of equals
  const int64_t l = found.label[0];
  const double *before = std::max_element(scores, scores + l);
  const double *after = std::max_element(scores + l + 1, scores + classes);
  const bool is_before = l > 0 && (l + 1 == classes || *before >= *after);
  found.label[1] = (is_before ? before : after) - scores;
  for (int k = 0; k < 2; ++k) found.value[k] = scores[found.label[k]];
  return found;
}

// Maximum and logarithm of the sum of exponentials, over all classes and over those that are not removed; x ends
// with -inf at the removed ones.
template <class A>
void uskd_log_sums(double* x, int64_t padded, const UskdTargets& targets, A* out) {
  using S = Simd<double>;
  double taken[2] = {kUskdNothing, kUskdNothing};
  for (int k = 0; k < 2; ++k)
    if (targets.removed(k)) std::swap(taken[k], x[targets.label[k]]);
  double rest = kUskdNothing;
#pragma omp simd reduction(max : rest)
  for (int64_t i = 0; i < padded; ++i) rest = std::max(rest, x[i]);
  S::type sums{};
  for (int64_t i = 0; i < padded; i += S::lanes) sums += exp_double(S::load(x + i) - rest);
  double sum = 0;
  for (int64_t i = 0; i < S::lanes; ++i) sum += sums[i];
  const double top = std::max({rest, taken[0], taken[1]});
  const double all = sum * std::exp(rest - top) + std::exp(taken[0] - top) + std::exp(taken[1] - top);
  const double found[] = {top, std::log(all), rest, std::log(sum)};
  std::copy_n(found, 4, out);
}

// One side of a row in the second pass: logarithms and softmax, over all classes and without targets.
struct UskdSide {
  double top, rest_top, share;  // log-sum-exp of all, of the rest; probability of the rest

  template <class A>
  explicit UskdSide(const A* stats)
      : top(double(stats[0]) + stats[1]), rest_top(double(stats[2]) + stats[3]),
        share(std::exp((double(stats[2]) - stats[0]) + (double(stats[3]) - stats[1]))), max_(stats[0]), sum_(stats[1]),
        rest_max_(stats[2]), rest_sum_(stats[3]) {}

  double log(double x) const { return (x - max_) - sum_; }
  double rest_log(double x) const { return (x - rest_max_) - rest_sum_; }

  // out += scale * softmax. Equal logits get equal bits, targets or not: their order is a tie.
  void add_softmax(const double* x, int64_t padded, double scale, double* out) const {
    using S = Simd<double>;
    for (int64_t i = 0; i < padded; i += S::lanes)
      S::store(out + i, S::load(out + i) + scale * exp_double((S::load(x + i) - max_) - sum_));
  }

  // out = softmax without targets, 0 at these.
  void rest_softmax(const double* x, int64_t padded, const UskdTargets& targets, double* out) const {
    using S = Simd<double>;
    for (int64_t i = 0; i < padded; i += S::lanes)
      S::store(out + i, exp_double((S::load(x + i) - rest_max_) - rest_sum_));
    for (int k = 0; k < 2; ++k)
      if (targets.removed(k)) out[targets.label[k]] = 0;
  }

 private:
  double max_, sum_, rest_max_, rest_sum_;
};

}  // namespace

void uskd_loss_rows(const Tensor& student, const Tensor& weak, const Tensor& target, int64_t ignore_index,
                    const Tensor& stats) {
  check_contiguous(stats, kUskdOp, "stats");
  FASTKD_CHECK(stats.size(1) == kUskdColumns, "uskd_loss", "another number of columns");
  const int64_t classes = student.size(1), padded = round_up(classes, Simd<double>::lanes);
  const bool two = target.dim() == 2;
  for_wide(stats.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    A* out = mutable_data<A>(stats);
    parallel(student.size(0), 16384 / classes + 1, [&](int64_t begin, int64_t end) {
      std::vector<double> x(padded), scores(two ? padded : 0);
      for (int64_t row = begin; row < end; ++row) {
        if (two) uskd_read(target, row, scores.data());
        const auto targets = uskd_targets(target, row, classes, ignore_index, two ? scores.data() : nullptr);
        A* line = out + row * kUskdColumns;
        std::fill_n(line, kUskdColumns, A(0));
        uskd_read(student, row, x.data());
        double z[2] = {};
        for (int k = 0; k < 2; ++k)
          if (targets.label[k] >= 0) z[k] = x[targets.label[k]];
        uskd_log_sums(x.data(), padded, targets, line + kUskdStudent);
        const double max = line[kUskdStudent], sum = line[kUskdStudent + 1];
        line[kUskdValid] = targets.valid;
        for (int k = 0; k < 2; ++k) {
          const bool there = targets.valid && targets.label[k] >= 0;
          line[kUskdSquare + k] = there ? std::exp(2 * (z[k] - max - sum)) : 0;
          line[kUskdLabel + k] = targets.label[k];
          line[kUskdValue + k] = targets.value[k];
        }
        if (!targets.known) line[kUskdSquare] = std::numeric_limits<A>::quiet_NaN();
        uskd_read(weak, row, x.data());
        uskd_log_sums(x.data(), padded, targets, line + kUskdWeak);
      }
    });
  });
}

void uskd_loss(const Tensor& student, const Tensor& weak, const Tensor& target, const Tensor& stats, const Tensor& sums,
               const Tensor& means, double alpha, double beta, double mu, double ce_weight, int64_t rank_score,
               const Tensor& grad_student, const Tensor& grad_weak, const Tensor& loss) {
  const int64_t batch = student.size(0), classes = student.size(1), padded = round_up(classes, Simd<double>::lanes);
  const bool two = target.dim() == 2, with_grad = grad_student.numel() > 0;
  std::vector<double> zipf(classes), partial(batch, 0.0);
  for (int64_t i = 0; i < classes; ++i) zipf[i] = 1.0 / (1 + i);
  for_wide(loss.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    const A *lines = data<A>(stats), *total = data<A>(sums), *shared = data<A>(means);
    double mean[2];
    for (int k = 0; k < 2; ++k) mean[k] = double(shared[1 + k]) / std::max(double(shared[0]), 1.0);

    parallel(batch, 4096 / classes + 1, [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(6 * padded);
      double *z = scratch.data(), *u = z + padded, *rest = u + padded, *w = rest + padded, *y = w + padded,
             *zeta = y + padded;
      std::vector<int32_t> ranks(classes);
      Ranked ranked(classes);
      for (int64_t row = begin; row < end; ++row) {
        const A* line = lines + row * kUskdColumns;
        if (line[kUskdValid] == 0) {
          std::fill_n(z, classes, 0.0);
          for (const Tensor* grad : {&grad_student, &grad_weak})
            if (with_grad) MatrixRows(*grad, kUskdOp).write(row, z);
          continue;
        }
        UskdTargets targets;
        double p[2] = {}, p_sum = 0, score_sum = 1;
        for (int k = 0; k < 2; ++k) {
          targets.label[k] = static_cast<int64_t>(line[kUskdLabel + k]), targets.value[k] = line[kUskdValue + k];
          if (targets.removed(k)) p[k] = line[kUskdSquare + k] + targets.value[k] - mean[k], p_sum += p[k];
        }
        uskd_read(student, row, z);
        uskd_read(weak, row, u);
        if (two) {
          uskd_read(target, row, y);
          score_sum = std::accumulate(y, y + classes, 0.0);
        } else {
          std::fill_n(y, classes, 0.0);
          y[targets.label[0]] = 1;
        }
        const UskdSide of_z(line + kUskdStudent), of_u(line + kUskdWeak);
        of_z.rest_softmax(z, padded, targets, rest);
        std::fill_n(w, padded, 0.0);
        of_u.add_softmax(u, padded, 1, w);
        double row_loss = 0, log_taken = 0, q[2] = {};
        for (int k = 0; k < 2; ++k) {
          if (!targets.removed(k)) continue;
          const double log_q = of_z.log(z[targets.label[k]]);
          q[k] = std::exp(log_q);
          log_taken += log_q;
          row_loss -= alpha * p[k] * log_q;
        }

        // Scores of all classes, targets included; then Zipf labels by rank.
        const double weak_scale = 1 / (of_u.share + kUskdRankEps), log_scale = 1 / (1 - log_taken + kUskdRankEps);
        for (int64_t i = 0; i < padded; ++i) zeta[i] = w[i] * weak_scale;
        if (rank_score == 0) {
          for (int64_t i = 0; i < classes; ++i) zeta[i] += of_z.log(z[i]) * log_scale;
        } else {
          of_z.add_softmax(z, padded, 1 / (of_z.share + kUskdRankEps), zeta);
        }
        ranked(zeta, ranks.data());
        for (int64_t i = 0; i < classes; ++i) zeta[i] = zipf[ranks[i]];
        for (int k = 0; k < 2; ++k)
          if (targets.removed(k)) zeta[targets.label[k]] = 0;
        double zeta_sum = 0, rest_loss = 0, weak_loss = 0, ce = 0;
        const double smooth = kUskdSmoothing / classes;
#pragma omp simd reduction(+ : zeta_sum, rest_loss, weak_loss, ce)
        for (int64_t i = 0; i < classes; ++i) {
          zeta_sum += zeta[i];
          rest_loss -= zeta[i] * of_z.rest_log(z[i]);
          weak_loss -= ((1 - kUskdSmoothing) * y[i] + smooth) * of_u.log(u[i]);
          ce -= y[i] * of_z.log(z[i]);
        }
        partial[row] = row_loss + beta * rest_loss / zeta_sum + mu * weak_loss + ce_weight * ce;
        if (!with_grad) continue;

        const double all = alpha * p_sum + ce_weight * score_sum, of_rest = all * of_z.share + beta;
        const double of_zeta = beta / zeta_sum, of_w = mu * ((1 - kUskdSmoothing) * score_sum + kUskdSmoothing);
#pragma omp simd
        for (int64_t i = 0; i < classes; ++i) {
          rest[i] = of_rest * rest[i] - of_zeta * zeta[i] - ce_weight * y[i];
          w[i] = of_w * w[i] - mu * ((1 - kUskdSmoothing) * y[i] + smooth);
        }
        for (int k = 0; k < 2; ++k)
          if (targets.removed(k)) rest[targets.label[k]] += all * q[k] - alpha * p[k];
        MatrixRows(grad_student, kUskdOp).write(row, rest);
        MatrixRows(grad_weak, kUskdOp).write(row, w);
      }
    });
    // Summed in row order: the same bits for any number of threads.
    const double sum = std::accumulate(partial.begin(), partial.end(), 0.0);
    *mutable_data<A>(loss) = static_cast<A>(sum / std::max(double(total[0]), 1.0));
  });
}

}  // namespace fastkd
