// Attention per (image, head) with everything in cache: one task holds q, k, v and the whole score matrix of a head
// (197 x 197 floats are 155 KB), so nothing but q, k, v and the result touches memory.
#include "attention_amx.h"

namespace fastkd {
namespace {

// One head of a [B, T, heads * d] view: d contiguous channels a row.
template <class T>
struct Head : HeadView<T> {
  using HeadView<T>::base, HeadView<T>::row, HeadView<T>::dim;

  Head(const Tensor& t, int64_t image, int64_t head, int64_t dim, int64_t offset = 0)
      : HeadView<T>{const_cast<T*>(data<T>(t)) + image * t.stride(0) + offset + head * dim, t.stride(1), dim} {}

  template <class A>
  void load(int64_t rows, A* out, int64_t ld, A scale = 1) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < dim; ++j) out[i * ld + j] = static_cast<A>(base[i * row + j]) * scale;
      for (int64_t j = dim; j < ld; ++j) out[i * ld + j] = 0;
    }
  }
  template <class A>
  void load_transposed(int64_t rows, A* out, int64_t ld) const {
    for (int64_t j = 0; j < dim; ++j) {
      for (int64_t i = 0; i < rows; ++i) out[j * ld + i] = static_cast<A>(base[i * row + j]);
      for (int64_t i = rows; i < ld; ++i) out[j * ld + i] = 0;
    }
  }
  template <class A>
  void store(int64_t rows, const A* in, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < dim; ++j) base[i * row + j] = static_cast<T>(in[i * ld + j]);
  }
};

// Row of scores -> exp(scores - max), columns >= n set to 0; returns the sum, and the max through `top`.
template <class A>
A exponentials(A* row, int64_t n, int64_t padded, A& top) {
  using S = Simd<A>;
  for (int64_t j = n; j < padded; ++j) row[j] = -INFINITY;
  typename S::type best = S::load(row);
  for (int64_t j = S::lanes; j < padded; j += S::lanes) {
    const auto x = S::load(row + j);
    best = x > best ? x : best;
  }
  top = best[0];
  for (int64_t i = 1; i < S::lanes; ++i) top = std::max(top, best[i]);
  typename S::type total{};
  for (int64_t j = 0; j < padded; j += S::lanes) {
    const auto e = exp(S::load(row + j) - top);
    S::store(row + j, e);
    total += e;
  }
  A sum = 0;
  for (int64_t i = 0; i < S::lanes; ++i) sum += total[i];
  return sum;
}

struct Shape : AttentionShape {
  int64_t batch, heads;

  Shape(const Tensor& query, const Tensor& key_value, int64_t heads)
      : AttentionShape{query.size(1), key_value.size(1), query.size(2) / heads}, batch(query.size(0)), heads(heads) {}
  int64_t width() const { return heads * dim; }
};

template <class T>
void forward_head(const Shape& s, const Head<T>& q, const Head<T>& k, const Head<T>& v, const Head<T>& out,
                  Accumulate<T>* lse, std::vector<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (amx::available()) return amx::forward(s, q, k, v, out, lse);
  const int64_t kp = round_up(s.keys, Simd<A>::lanes), dp = round_up(s.dim, Simd<A>::lanes);
  scratch.resize(s.queries * (2 * dp + kp + 1) + s.dim * kp + s.keys * dp);
  A *Q = scratch.data(), *KT = Q + s.queries * dp, *V = KT + s.dim * kp, *P = V + s.keys * dp, *O = P + s.queries * kp;
  A* inverse = O + s.queries * dp;
  q.load(s.queries, Q, dp, A(1) / std::sqrt(A(s.dim)));
  k.load_transposed(s.keys, KT, kp);
  v.load(s.keys, V, dp);
  small_gemm(s.queries, kp, s.dim, Q, dp, 1, KT, kp, P, kp);
  for (int64_t i = 0; i < s.queries; ++i) {
    A top;
    const A sum = exponentials(P + i * kp, s.keys, kp, top);
    lse[i] = top + std::log(sum);
    inverse[i] = A(1) / sum;
  }
  small_gemm(s.queries, dp, s.keys, P, kp, 1, V, dp, O, dp);
  for (int64_t i = 0; i < s.queries; ++i)
    for (int64_t j = 0; j < dp; ++j) O[i * dp + j] *= inverse[i];
  out.store(s.queries, O, dp);
}

template <class T>
void backward_head(const Shape& s, const Head<T>& g, const Head<T>& q, const Head<T>& k, const Head<T>& v,
                   const Accumulate<T>* lse, const Head<T>& grad_q, const Head<T>& grad_k, const Head<T>& grad_v,
                   std::vector<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  using S = Simd<A>;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (amx::available()) return amx::backward(s, g, q, k, v, lse, grad_q, grad_k, grad_v);
  const int64_t kp = round_up(s.keys, S::lanes), dp = round_up(s.dim, S::lanes);
  const int64_t rows = std::max(s.queries, s.keys);
  scratch.resize(2 * s.queries * (dp + kp) + 2 * s.dim * kp + s.keys * dp + rows * dp);
  A *Q = scratch.data(), *G = Q + s.queries * dp, *KT = G + s.queries * dp, *VT = KT + s.dim * kp;
  A *K = VT + s.dim * kp, *P = K + s.keys * dp, *D = P + s.queries * kp, *result = D + s.queries * kp;
  const A scale = A(1) / std::sqrt(A(s.dim));
  q.load(s.queries, Q, dp, scale);
  g.load(s.queries, G, dp);
  k.load(s.keys, K, dp);
  k.load_transposed(s.keys, KT, kp);
  v.load_transposed(s.keys, VT, kp);
  small_gemm(s.queries, kp, s.dim, Q, dp, 1, KT, kp, P, kp);
  small_gemm(s.queries, kp, s.dim, G, dp, 1, VT, kp, D, kp);
  for (int64_t i = 0; i < s.queries; ++i) {
    A *p = P + i * kp, *d = D + i * kp;
    for (int64_t j = s.keys; j < kp; ++j) p[j] = -INFINITY;
    // delta = sum_j P_ij dP_ij / sum_j P_ij from the very terms that it is taken from: exact where they cancel, blind to
    // the rounding of lse and, unlike grad . out, to that of out.
    typename S::type sum{}, total{};
    for (int64_t j = 0; j < kp; j += S::lanes) {
      const auto e = exp(S::load(p + j) - lse[i]);
      S::store(p + j, e);
      sum += e * S::load(d + j);
      total += e;
    }
    A delta = 0, weight = 0;
    for (int64_t j = 0; j < S::lanes; ++j) {
      delta += sum[j];
      weight += total[j];
    }
    delta /= weight;
    for (int64_t j = 0; j < kp; j += S::lanes) S::store(d + j, S::load(p + j) * (S::load(d + j) - delta));
  }
  small_gemm(s.keys, dp, s.queries, P, 1, kp, G, dp, result, dp);
  grad_v.store(s.keys, result, dp);
  small_gemm(s.keys, dp, s.queries, D, 1, kp, Q, dp, result, dp);  // Q carries the scale
  grad_k.store(s.keys, result, dp);
  small_gemm(s.queries, dp, s.keys, D, kp, 1, K, dp, result, dp);
  for (int64_t i = 0; i < s.queries * dp; ++i) result[i] *= scale;
  grad_q.store(s.queries, result, dp);
}

}  // namespace

void attention(const Tensor& query, const Tensor& key_value, int64_t heads, const Tensor& out, const Tensor& lse) {
  const Shape s(query, key_value, heads);
  for_float(query.scalar_type(), "attention", [&](auto type) {
    using T = typename decltype(type)::type;
    auto* log_sum = mutable_data<Accumulate<T>>(lse);
    parallel(s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<Accumulate<T>> scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / s.heads, h = task % s.heads;
        forward_head<T>(s, {query, b, h, s.dim}, {key_value, b, h, s.dim}, {key_value, b, h, s.dim, s.width()},
                        {out, b, h, s.dim}, log_sum + task * s.queries, scratch);
      }
    });
  });
}

void attention_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key_value, const Tensor& lse,
                        int64_t heads, const Tensor& grad_query, const Tensor& grad_key_value) {
  const Shape s(query, key_value, heads);
  for_float(query.scalar_type(), "attention_backward", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* log_sum = data<Accumulate<T>>(lse);
    parallel(s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<Accumulate<T>> scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / s.heads, h = task % s.heads;
        backward_head<T>(s, {grad_out, b, h, s.dim}, {query, b, h, s.dim}, {key_value, b, h, s.dim},
                         {key_value, b, h, s.dim, s.width()}, log_sum + task * s.queries,
                         {grad_query, b, h, s.dim}, {grad_key_value, b, h, s.dim},
                         {grad_key_value, b, h, s.dim, s.width()}, scratch);
      }
    });
  });
}

}  // namespace fastkd
