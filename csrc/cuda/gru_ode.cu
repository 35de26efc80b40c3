// GRU-ODE-Bayes on a GPU: a block takes a tile of series through all their steps and jumps, what it knows of them in
// shared memory as rows [unit][series], the cell's matrices beside them where there is room. Every series is on its own
// clock; one that has nothing to do makes steps of size zero.
// The arguments are packed by fastflow/ops/cuda/gru_ode.py.
#include "gru_ode_adaptive.cuh"

namespace fastflow {

// All rows that come now: predictions and jumps.
template <class T>
FF_D void rows_forward(const SeriesTile<T>& t, const T* all, const JumpRows<T>& j, T* h, T* fresh) {
  const Filter& a = t.a;
  const int64_t H = a.H, D = a.D;
  while (next_rows(t)) {
    observe(t, all, h, true, 0, j.q, j.p);
    each(t, 2 * D, [&](int i, int b) {
      if (t.event[b] < 0) return;
      reinterpret_cast<T*>(a.pre)[t.event[b] * 2 * D + i] = j.p[i * t.row + b];
      if (!jumps(t, b)) reinterpret_cast<T*>(a.post)[t.event[b] * 2 * D + i] = j.p[i * t.row + b];
    });
    leap(t, all, j, h, fresh);
    each(t, H, [&](int i, int b) {
      T& state = h[i * t.row + b];
      if (jumps(t, b)) state = fresh[i * t.row + b];
      if (t.event[b] >= 0) reinterpret_cast<T*>(a.states)[t.event[b] * H + i] = state;
    });
    observe(t, all, h, true, 1, j.q, j.p);
    each(t, 2 * D, [&](int i, int b) {
      if (jumps(t, b)) reinterpret_cast<T*>(a.post)[t.event[b] * 2 * D + i] = j.p[i * t.row + b];
    });
  }
}

template <class T>
FF_D void store_states(const SeriesTile<T>& t, const T* h) {
  each(t, t.a.H, [&](int i, int b) {
    if (t.valid(b)) reinterpret_cast<T*>(t.a.state)[(t.first + b) * t.a.H + i] = h[i * t.row + b];
  });
}

template <class T>
FF_D void gru_ode_fwd(const Filter& a) {
  FF_SHARED(double, shared);
  SeriesTile<T> t(a, shared);
  T *step = t.take(1), *h = t.take(a.H), *fresh = t.take(a.H), *k = t.take(a.stages * a.H);
  const EvaluationRows<T> e = take_evaluation(t);
  const JumpRows<T> j = take_jump(t);
  const T* all = t.of(a.weights);
  const Weights<T> w = {staged(t, all), all};
  load_states(t, h);
  start_clocks(t);
  each_series(t, [&](int b) {
    if (!t.valid(b)) return;
    const int64_t total = a.ends[a.rows + t.first + b];
    int64_t* to = a.steps + (t.first + b) * 3;
    to[0] = total * a.stages, to[1] = total, to[2] = 0;
  });
  for (;;) {
    rows_forward(t, all, j, h, fresh);
    if (!next_step(t, step)) break;
    whole_step(t, w, e, step, k, h);
  }
  store_states(t, h);
}

// faults [series, 4]: which, in which interval, where, of what; of a series the first
struct AdaptiveFilter {
  Filter filter;
  Tolerances control;
  double* faults;
};

template <class T>
FF_D void gru_ode_adaptive_fwd(const AdaptiveFilter& o) {
  FF_SHARED(double, shared);
  const Filter& a = o.filter;
  SeriesTile<T> t(a, shared);
  Control* const controls = take_controls(t);
  T *step = t.take(1), *h = t.take(a.H), *fresh = t.take(a.H);
  SeriesTile<T> over = t;  // the rows of jumps lie where those of the steps do
  const JumpRows<T> j = take_jump(over);
  T* k = t.take(a.stages * a.H);
  const EvaluationRows<T> e = take_evaluation(t);
  t.memory = t.memory < over.memory ? over.memory : t.memory;
  const T* all = t.of(a.weights);
  const Weights<T> w = {staged(t, all), all};
  load_states(t, h);
  start_clocks(t);
  each_series(t, [&](int b) {
    for (int i = 0; i < 3 && t.valid(b); ++i) a.steps[(t.first + b) * 3 + i] = 0;
    for (int i = 0; i < 4 && t.valid(b); ++i) o.faults[(t.first + b) * 4 + i] = 0;
  });
  for (int64_t tick = 0;; ++tick) {
    rows_forward(t, all, j, h, fresh);
    if (!next_interval(t, controls)) break;
    const auto noted = [&](int b, int64_t turn, Fault fault) {
      const Control& c = controls[b];
      int64_t* to = a.steps + (t.first + b) * 3;
      to[0] += turn >= 0 ? a.stages - 1 : 1;
      if (turn >= 0) ++to[c.verdict == kRejected ? 2 : 1];
      double* what = o.faults + (t.first + b) * 4;
      if (fault && what[0] == 0) what[0] = fault, what[1] = double(tick), what[2] = c.t, what[3] = c.gap;
    };
    interval(t, o.control, w, e, controls, step, k, h, fresh, noted, [](int, int, int) {});
  }
  store_states(t, h);
}

}  // namespace fastflow
