// The maths of one row of logit_loss: statistics of its blocks, the numbers that follow from them, and its gradient.
// fastkd/ops/logits/terms.py has the formulas.
//
// The target class y is left out of every sum and added as a scalar. With e = exp((z - m) / T), m the largest of the
// *other* logits, the probabilities of the others are e times a number of the row, at any distance of the target; so are
// those of their softmax among themselves. The gradients of KL, DKD, NKD and cross-entropy are then e and f (the same of
// the teacher) times two numbers of the row.
#pragma once

#include "log_math.h"

#include <algorithm>
#include <limits>

namespace fastkd::logits {

// The order of the fields of Terms in terms.py.
enum Term { kCe, kKl, kReverseKl, kJsd, kTvd, kDkdTarget, kDkdRest, kNkdTarget, kNkdRest, kTemperature, kBeta, kSmoothing };

template <class A>
struct Settings {
  A term[12];
  A cold;  // 1 / T
  bool teacher, hot, centred, reverse;

  Settings(const std::vector<double>& terms, bool has_teacher) : teacher(has_teacher) {
    for (int i = 0; i < 12; ++i) term[i] = A(terms[i]);
    cold = has_teacher ? A(1 / terms[kTemperature]) : A(1);
    hot = cold != 1 && (terms[kCe] != 0 || terms[kNkdTarget] != 0);  // needs e at T = 1 as well
    reverse = has_teacher && terms[kReverseKl] != 0;
    centred = has_teacher && (terms[kReverseKl] != 0 || terms[kJsd] != 0 || terms[kTvd] != 0);
  }
};

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// p x with 0 * inf = 0. Here and below `!= 0`, not `> 0`: NaN must stay.
template <class A>
inline A weighted(A p, A x) {
  return p != 0 ? p * x : A(0);
}
template <class A>
inline A over(A x, A sum) {
  return sum != 0 ? x / sum : A(0);
}

// A probability and the rest from the log-odds, both without cancellation; -inf: nothing and all.
template <class A>
struct Odds {
  A p, rest, log_p, log_rest;

  explicit Odds(A x) {
    const A size = std::fabs(x), small = std::exp(-size), both = std::log1p(small), big = 1 / (1 + small);
    const bool leads = x > 0;
    p = leads ? big : small * big;
    rest = leads ? small * big : big;
    log_p = leads ? -both : -size - both;
    log_rest = leads ? -size - both : -both;
  }
};

// Sums over the classes of one block, or row, except the target. `base` is subtracted from logits before exp.
template <class A>
struct Sums {
  A student_base = kNothing<A>, teacher_base = kNothing<A>;
  A e = 0, f = 0;                  // e = exp(a), a = (z - base) / T; f = exp(b)
  A f_gap = 0, f_a = 0, e_gap = 0; // sum f (b - a), sum f a, sum e (a - b)
  A e_hot = 0, f_hot = 0;          // e and f at T = 1
  A t = 0, t_z = 0;                // ce: sum of the target's weights, and of t (z - base)

  static A shift(A base, A common) { return base == common ? A(0) : base - common; }

  // Both sums, to the larger base.
  void add(const Sums& o, A cold) {
    const A student = std::max(student_base, o.student_base), teacher = std::max(teacher_base, o.teacher_base);
    Sums mine = *this, other = o;
    for (Sums* s : {&mine, &other}) s->rebase(student, teacher, cold);
    *this = mine;
    e += other.e, f += other.f, f_gap += other.f_gap, f_a += other.f_a, e_gap += other.e_gap;
    e_hot += other.e_hot, f_hot += other.f_hot, t += other.t, t_z += other.t_z;
  }

  void rebase(A student, A teacher, A cold) {
    const A dz = shift(student_base, student), dv = shift(teacher_base, teacher), da = dz * cold, db = dv * cold;
    const A se = std::exp(da), sf = std::exp(db);
    f_gap = f != 0 ? (f_gap + f * (db - da)) * sf : A(0);
    f_a = f != 0 ? (f_a + f * da) * sf : A(0);
    e_gap = e != 0 ? (e_gap + e * (da - db)) * se : A(0);
    e *= se, f *= sf, e_hot *= std::exp(dz), f_hot *= std::exp(dv);
    if (t != 0) t_z += t * dz;
    student_base = student, teacher_base = teacher;
  }
};

// One class of the terms whose gradient is q (G - mean of G): their losses, and G.
template <class A, class V>
struct Centred {
  V jsd, tvd, slope;

  Centred(const A* term, V q, V p) {
    const A beta = term[kBeta], rest = 1 - beta;
    const V zero{}, difference = q - p;
    slope = zero, jsd = zero, tvd = zero;
    if (term[kTvd] != 0) {
      // By comparison: of a difference the compiler may make a fused multiply-add, which is not 0 at equality.
      const V half = zero + A(0.5) * term[kTvd];
      tvd = q > p ? q - p : p - q;
      slope = q > p ? half : q < p ? -half : zero;
    }
    if (term[kJsd] != 0) {
      const V mixture = beta * p + rest * q, floor = zero + std::numeric_limits<A>::min();
      const V share = difference * reciprocal(mixture < floor ? floor : mixture);
      const V log_p = log1p(-rest * share), log_q = log1p(beta * share);  // log p / m, log q / m
      jsd = (p != 0 ? beta * p * log_p : zero) + (q != 0 ? rest * q * log_q : zero);
      slope += (term[kJsd] * rest) * log_q;
    }
  }
};

// What the sums of a row say: its loss, and the numbers of its gradient.
template <class A>
struct Row {
  A log_e, log_f;              // logarithms of the sums
  Odds<A> q, p, q_hot;
  A q_of_e, p_of_f, q_of_hot;  // probabilities over e, f, and e at T = 1
  A confidence = 0;            // of the teacher in the target, for nkd
  A target_t;

  // z, v: the target's logits, t: its weight in ce; -inf and 0 where the row has no target.
  Row(const Sums<A>& s, const Settings<A>& o, A z, A v, A t)
      : log_e(std::log(s.e)), log_f(o.teacher ? std::log(s.f) : A(0)), q((z - at(s.student_base)) * o.cold - log_e),
        p(o.teacher ? (v - at(s.teacher_base)) * o.cold - log_f : kNothing<A>),
        q_hot(o.hot ? Odds<A>(z - at(s.student_base) - std::log(s.e_hot)) : q), target_t(t) {
    q_of_e = over(q.rest, s.e);
    p_of_f = over(p.rest, s.f);
    q_of_hot = over(q_hot.rest, o.hot ? s.e_hot : s.e);
    if (o.term[kNkdTarget] != 0) confidence = o.hot ? Odds<A>(v - at(s.teacher_base) - std::log(s.f_hot)).p : p.p;
  }

  static A at(A base) { return base == kNothing<A> ? A(0) : base; }

  A cross_entropy(const Sums<A>& s, const Settings<A>& o) const {
    const A loss = weighted(target_t, -q_hot.log_p);
    if (s.t == 0) return loss;
    const A log_sum = (o.hot ? std::log(s.e_hot) : log_e) - q_hot.log_rest;  // of all classes, over the base
    return loss + s.t * log_sum - s.t_z;
  }

  // Without the losses of Centred.
  A distillation(const Sums<A>& s, const Settings<A>& o) const {
    const A* term = o.term;
    A loss = 0;
    if (term[kNkdTarget] != 0) loss += term[kNkdTarget] * weighted(confidence, -q_hot.log_p);
    if (s.f != 0) {
      const A rest = s.f_gap / s.f - log_f + log_e;
      const A target = weighted(p.p, p.log_p - q.log_p) + weighted(p.rest, p.log_rest - q.log_rest);
      if (term[kKl] != 0) loss += term[kKl] * (target + weighted(p.rest, rest));
      if (term[kDkdTarget] != 0) loss += term[kDkdTarget] * target;
      if (term[kDkdRest] != 0) loss += term[kDkdRest] * rest;
      if (term[kNkdRest] != 0) loss += term[kNkdRest] * (log_e - s.f_a / s.f);
    }
    if (term[kReverseKl] != 0) {
      const A gap = s.e != 0 ? s.e_gap / s.e - log_e + log_f : A(0);
      loss += term[kReverseKl] * (weighted(q.rest, gap + q.log_rest - p.log_rest) + weighted(q.p, q.log_p - p.log_p));
    }
    return loss;
  }
};

// The gradient of class i is of_e e + of_f f + of_hot e_hot + of_slope e G - of_t t; that of the target a number.
template <class A>
struct Gradient {
  A of_e = 0, of_f = 0, of_hot = 0, of_slope = 0, of_t = 0, target = 0;

  // scale, ce_scale: of the row's terms; slope: sum e G / sum e; target_slope: G of the target.
  Gradient(const Sums<A>& s, const Settings<A>& o, const Row<A>& r, A scale, A ce_scale, A slope, A target_slope) {
    const A* term = o.term;
    const A ce = term[kCe] * ce_scale, nkd = term[kNkdTarget] * scale * r.confidence, cold = scale * o.cold;
    // The target's share of ce from the rest's probability: where it is nearly 1, 1 - p has no digits left.
    target = ce * (s.t * r.q_hot.p - r.target_t * r.q_hot.rest) - nkd * r.q_hot.rest;
    (o.hot ? of_hot : of_e) = (ce * (s.t + r.target_t) + nkd) * r.q_of_hot;
    of_t = ce;
    if (!o.teacher) return;
    const A excess = r.q.p + r.p.p > 1 ? r.p.rest - r.q.rest : r.q.p - r.p.p;  // of the target's probability
    const A among = cold * (term[kDkdRest] + term[kNkdRest]), kl = cold * term[kKl];
    const A dkd = cold * term[kDkdTarget] * excess;
    of_e += kl * r.q_of_e + over(among - dkd, s.e);
    of_f = -kl * r.p_of_f - over(among, s.f);
    target += kl * excess + dkd;
    if (o.centred) {
      const A lead = r.q.p != 0 ? target_slope - slope : A(0);
      of_slope = cold * r.q_of_e;
      of_e -= of_slope * (slope + r.q.p * lead);
      target += cold * r.q.p * r.q.rest * lead;
    }
  }
};

}  // namespace fastkd::logits
