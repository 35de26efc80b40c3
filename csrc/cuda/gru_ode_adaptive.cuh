// Adaptive steps of GRU-ODE-Bayes on a GPU: a tile's series go through an interval side by side, each with steps of its
// own, as csrc/cpu/gru_ode_steps.h has them. Times, sizes and norms are double.
#pragma once

#include "gru_ode.cuh"

namespace fastflow {

constexpr int kLanes = 16;  // threads that add up the norm of a series, whatever the tile is: all decide alike
enum Fault : int { kNone, kNotFinite, kUnderflow, kTooMany };  // as in fastflow/ops/cuda/gru_ode.py
enum Verdict : int { kRejected, kAccepted, kLast, kFailed };
enum Turn : int { kSlope = -2, kTrial = -1 };  // the first slope, a step of Euler's method, then steps from 0 on

struct Tolerances {
  double rtol, atol;
  int64_t max_steps;
};

// How far a series is in its interval; of ten 8-byte fields, as in fastflow/ops/cuda/gru_ode.py
struct Control {
  double gap, t, size;       // of the interval, behind, and the step to try
  double slope, theta;       // norm of the first slope; how much is needed of the step that was made
  int64_t pending, verdict;  // is it on its way? and of the turn
  int64_t accepted, limit;   // steps; after so many it stops
  int64_t total;             // of all the interval, for backward
};

template <class T>
FF_D Control* take_controls(SeriesTile<T>& t) {
  Control* taken = reinterpret_cast<Control*>(t.memory);
  t.memory = reinterpret_cast<T*>(taken + t.n);
  return taken;
}

// The intervals that begin now; false where none does.
template <class T>
FF_D bool next_interval(const SeriesTile<T>& t, Control* controls) {
  each_series(t, [&](int b) {
    const bool moves = t.valid(b) && t.left[b] > 0;
    Control& c = controls[b];
    c.gap = moves ? t.a.sizes[t.place(b, t.segment[b])] : 0;
    c.pending = c.gap > 0, c.t = c.size = 0, c.accepted = 0, c.limit = int64_t(1) << 62;
    if (moves) --t.left[b];
    t.event[b] = moves ? 0 : -1;
  });
  return t.any_event();
}

// Root of the mean over the units of the squares of f(place), of the series whose thread this is. All threads call it.
template <class T, class F>
FF_D double norm(const SeriesTile<T>& t, const F& f) {
  const int b = int(threadIdx.x) / kLanes;
  double sum = 0;
  if (b < t.n)
    for (int i = int(threadIdx.x) % kLanes; i < int(t.a.H); i += kLanes) {
      const double x = f(i * t.row + b);
      sum += x * x;
    }
  return ::sqrt(warp_sum(sum, kLanes) / double(t.a.H));
}

// What follows of a turn that found these norms: the next size, and what becomes of the step. What is wrong, or
// nothing.
FF_D Fault decide(Control& c, int64_t turn, double state, double found, const Tolerances& to, int order) {
  c.verdict = kRejected;
  Fault fault = kNone;
  if (turn == kSlope) {
    c.slope = found, c.size = trial_step(state, found);
    if (!(finite(state) && finite(found))) fault = kNotFinite;
  } else if (turn == kTrial) {
    c.size = first_step(c.size, c.slope, found / c.size, order);
  } else {
    if (found <= 1) {
      const bool last = c.t + c.size >= c.gap;
      c.verdict = last ? kLast : kAccepted, c.theta = last ? (c.gap - c.t) / c.size : 1;
      c.t += c.size, ++c.accepted;
      c.pending = !last && c.accepted < c.limit;
    }
    c.size *= growth(found, order);
  }
  if (c.pending && turn != kSlope)
    fault = !(c.t + c.size > c.t) ? kUnderflow : turn + 1 == to.max_steps ? kTooMany : kNone;
  if (fault) c.pending = 0, c.verdict = kFailed;
  return fault;
}

// h after the intervals of all series, NaN where it cannot go on. noted(series, turn, fault) is told of every turn by a
// thread of the series, accepted(unit, series, place) of every step: h is the state before it, `step` its size.
template <class T, class Noted, class Accepted>
FF_D void interval(const SeriesTile<T>& t, const Tolerances& to, const Weights<T>& w, const EvaluationRows<T>& e,
                   Control* controls, T* step, T* k, T* h, T* next, const Noted& noted, const Accepted& accepted) {
  const Tableau m(t.a.method);
  const double one = 1;
  const int stages = m.stages, stage = int(t.a.H) * t.row, mine = int(threadIdx.x) / kLanes;
  const bool leads = threadIdx.x % kLanes == 0 && mine < t.n;
  const auto scale = [&](T a, T b) { return to.atol + to.rtol * most(double(abs(a)), double(abs(b))); };
  for (int64_t turn = kSlope;; ++turn) {
    if (leads) step[mine] = controls[mine].pending ? T(controls[mine].size) : T(0);
    __syncthreads();
    bool any = false;
    for (int b = 0; b < t.n; ++b) any = any || controls[b].pending;
    if (!any) break;
    const int first = turn == kSlope ? 0 : 1, last = turn < 0 ? first + 1 : stages;
    for (int i = first; i < last; ++i) {
      advance(t, turn < 0 ? &one : m.a + i * stages, i, step, k, h, e.y);
      evaluate(t, w, e, k + i * stage);
    }
    double state = 0, found;
    if (turn == kSlope) {
      state = norm(t, [&](int at) { return double(h[at]) / scale(h[at], h[at]); });
      found = norm(t, [&](int at) { return double(k[at]) / scale(h[at], h[at]); });
    } else if (turn == kTrial) {
      found = norm(t, [&](int at) { return double(k[stage + at] - k[at]) / scale(h[at], h[at]); });
    } else {
      advance(t, m.b, stages, step, k, h, next);
      found = norm(t, [&](int at) {
        T sum = T(0);
        for (int i = 0; i < stages; ++i) sum += T(m.error[i]) * k[i * stage + at];
        return double(step[mine] * sum) / scale(h[at], next[at]);
      });
    }
    if (leads && controls[mine].pending) {
      const Fault fault = decide(controls[mine], turn, state, found, to, m.order);
      noted(mine, turn, fault);
    } else if (leads) {
      controls[mine].verdict = kRejected;
    }
    __syncthreads();
    each(t, t.a.H, [&](int i, int b) {
      const int at = i * t.row + b;
      const Control& c = controls[b];
      if (c.verdict == kFailed) h[at] = not_a_number<T>();
      if (c.verdict != kAccepted && c.verdict != kLast) return;
      accepted(i, b, at);
      T sum = T(0);
      if (c.theta < 1)
        for (int s = 0; s < stages; ++s) sum += T(m.dense(s, c.theta)) * k[s * stage + at];
      h[at] = c.theta < 1 ? h[at] + step[b] * sum : next[at];
      k[at] = k[(stages - 1) * stage + at];
    });
  }
}

}  // namespace fastflow
