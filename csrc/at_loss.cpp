// Attention transfer: the maps of a sample are made and compared while they are in cache; features are read once.
#include "convert.h"

#include <numeric>

namespace fastkd {
namespace {

// |x|^p: 1 to 4 by products, other powers by std::pow. Calls f(integral_constant<int, p or 0>{}).
template <class F>
void for_power(double p, const F& f) {
  if (p == 1) return f(std::integral_constant<int, 1>{});
  if (p == 2) return f(std::integral_constant<int, 2>{});
  if (p == 3) return f(std::integral_constant<int, 3>{});
  if (p == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 0>{});
}

template <int P, class A>
inline A power(A x, A p) {
  const A size = std::fabs(x);
  if constexpr (P == 0) return std::pow(size, p);
  A result = size;
  for (int k = 1; k < P; ++k) result *= size;
  return result;
}

// |x|^(p-1) sign(x)
template <int P, class A>
inline A power_slope(A x, A p) {
  const A size = std::fabs(x);
  if constexpr (P == 2) return x;
  A result = A(x > 0) - A(x < 0);
  if constexpr (P == 0) return x == 0 ? A(0) : result * std::pow(size, p - 1);
  for (int k = 1; k < P; ++k) result *= size;
  return result;
}

// A [N, C, L] feature as lines that are dense in memory: L long per channel, or C long per position.
template <class T>
struct Maps {
  T* base;
  int64_t samples, channels, length, sn, sc, si;

  Maps(const Tensor& t, T* pointer)
      : base(pointer), samples(t.size(0)), channels(t.size(1)), length(t.size(2)), sn(t.stride(0)), sc(t.stride(1)),
        si(t.stride(2)) {}
  bool by_position() const { return sc == 1 && si != 1; }
  T* channel(int64_t n, int64_t c) const { return base + n * sn + c * sc; }
  T* position(int64_t n, int64_t i) const { return base + n * sn + i * si; }
};

template <int P, class A, class T>
void attention_map(const Maps<const T>& maps, int64_t n, A p, A* map, A* scratch) {
  const int64_t channels = maps.channels, length = maps.length;
  if (maps.by_position()) {
    for (int64_t i = 0; i < length; ++i) {
      const A* x = read_line(maps.position(n, i), channels, 1, scratch);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < channels; ++c) sum += power<P>(x[c], p);
      map[i] = sum / channels;
    }
    return;
  }
  std::fill_n(map, length, A(0));
  for (int64_t c = 0; c < channels; ++c) {
    const A* x = read_line(maps.channel(n, c), length, maps.si, scratch);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) map[i] += power<P>(x[i], p);
  }
  const A inverse = A(1) / channels;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) map[i] *= inverse;
}

// Normalises both maps in place, fills q, returns the sample's share of the loss.
template <class A>
A compare_maps(A* u, A* v, int64_t length, int64_t samples, bool paper, A* q) {
  A uu = 0, vv = 0;
#pragma omp simd reduction(+ : uu, vv)
  for (int64_t i = 0; i < length; ++i) {
    uu += u[i] * u[i];
    vv += v[i] * v[i];
  }
  const A floor = A(1e-12), norm = std::sqrt(uu);
  const A inverse_u = 1 / std::max(norm, floor), inverse_v = 1 / std::max(std::sqrt(vv), floor);
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {  // stored before they are compared: equal maps differ by exactly 0
    u[i] *= inverse_u;
    v[i] *= inverse_v;
  }
  A dd = 0, along = 0;
#pragma omp simd reduction(+ : dd, along)
  for (int64_t i = 0; i < length; ++i) {
    const A d = u[i] - v[i];
    dd += d * d;
    along += u[i] * d;
  }
  const A distance = std::sqrt(dd), count = A(samples) * length;
  const A scale = (paper ? (distance == 0 ? A(0) : 1 / (distance * samples)) : 2 / count) * inverse_u;
  if (norm < floor) along = 0;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) q[i] = (u[i] - v[i] - u[i] * along) * scale;
  return paper ? distance / samples : dd / count;
}

template <int P, class A, class T>
void at_backward(const Maps<const T>& from, const Maps<T>& to, const A* weights, A scale, A p) {
  const int64_t channels = from.channels, length = from.length;
  const bool by_position = from.by_position() && to.by_position();
  const int64_t lines = by_position ? length : channels, width = by_position ? channels : length;
  parallel(from.samples * lines, 16384 / width + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * width);
    A *buffer = scratch.data(), *line = buffer + width;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = k / lines, at = k % lines;
      const A* q = weights + n * length;
      if (by_position) {
        const A* x = read_line(from.position(n, at), width, 1, buffer);
        const A factor = q[at] * scale;
        T* out = to.position(n, at);
        A* result = line;
        if constexpr (std::is_same_v<A, T>) result = out;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) result[c] = power_slope<P>(x[c], p) * factor;
        convert_row(result, width, out);
        continue;
      }
      const A* x = read_line(from.channel(n, at), width, from.si, buffer);
      T* out = to.channel(n, at);
      A* result = line;
      if constexpr (std::is_same_v<A, T>)
        if (to.si == 1) result = out;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) result[i] = power_slope<P>(x[i], p) * (q[i] * scale);
      if (to.si == 1) {
        convert_row(result, width, out);
      } else {
        for (int64_t i = 0; i < width; ++i) out[i * to.si] = static_cast<T>(result[i]);
      }
    }
  });
}

}  // namespace

void at_loss(const Tensor& student, const Tensor& teacher, double p, bool paper, const Tensor& loss, const Tensor& q) {
  constexpr const char* op = "at_loss";
  check_contiguous(q, op, "q");
  FASTKD_CHECK(student.size(0) == teacher.size(0) && student.size(2) == teacher.size(2), "at_loss",
               "student and teacher must have one number of samples and positions");
  for_float(student.scalar_type(), op, [&](auto type) {
    using S = typename decltype(type)::type;
    using A = Accumulate<S>;
    for_float(teacher.scalar_type(), op, [&](auto other) {
      using T = typename decltype(other)::type;
      if constexpr (std::is_same_v<A, Accumulate<T>>) {
        for_power(p, [&](auto power) {
          const Maps<const S> s(student, data<S>(student));
          const Maps<const T> t(teacher, data<T>(teacher));
          const int64_t length = s.length;
          A* gradient = mutable_data<A>(q);
          std::vector<double> partial(s.samples);
          parallel(s.samples, 65536 / ((s.channels + t.channels) * length) + 1, [&](int64_t begin, int64_t end) {
            std::vector<A> scratch(2 * length + std::max({length, s.channels, t.channels}));
            A *u = scratch.data(), *v = u + length, *line = v + length;
            for (int64_t n = begin; n < end; ++n) {
              attention_map<power.value>(s, n, A(p), u, line);
              attention_map<power.value>(t, n, A(p), v, line);
              partial[n] = compare_maps(u, v, length, s.samples, paper, gradient + n * length);
            }
          });
          // Summed in the order of the samples: the same bits for any number of threads.
          *mutable_data<A>(loss) = static_cast<A>(std::accumulate(partial.begin(), partial.end(), 0.0));
        });
      }
    });
  });
}

void at_loss_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& q, double p,
                      const Tensor& grad_student) {
  constexpr const char* op = "at_loss_backward";
  check_contiguous(q, op, "q");
  for_float(student.scalar_type(), op, [&](auto type) {
    using S = typename decltype(type)::type;
    using A = Accumulate<S>;
    const Maps<const S> from(student, data<S>(student));
    const Maps<S> to(grad_student, mutable_data<S>(grad_student));
    const A scale = *data<A>(grad_loss) * A(p) / from.channels;
    for_power(p, [&](auto power) { at_backward<power.value>(from, to, data<A>(q), scale, A(p)); });
  });
}

}  // namespace fastkd
