// The gradient of GRU-ODE-Bayes on a GPU. A block makes the states of a window of ticks again from those at its start,
// then goes through it backwards; it has a share of the weights' gradients, and a second launch adds up the shares in
// their order.
#include "gru_ode_reverse.cuh"

namespace fastflow {

constexpr int kTicks = 16;  // of a window, as in fastflow/ops/cuda/gru_ode.py

template <class T>
FF_D void gru_ode_bwd(const FilterBackward& o) {
  FF_SHARED(double, shared);
  const Filter& a = o.filter;
  SeriesTile<T> t(a, shared);
  const int64_t H = a.H, size = H * t.n;
  const Tableau m(a.method);
  const int stages = m.stages, stage = int(H) * t.row;
  T *step = t.take(1), *h = t.take(H), *k = t.take(stages * H), *g = t.take(H), *gk = t.take(H), *gh = t.take(H);
  T *after = t.take(H), *gp = t.take(2 * a.D), *gq = t.take(a.P), *gx = t.take(a.D * a.Q);
  const JumpRows<T> j = take_jump(t);
  const EvaluationRows<T> first = take_evaluation(t);  // of the first stage; the others behind it, `apart`
  const int64_t apart = t.memory - first.y;
  t.take((stages - 1) * (5 * H + (a.impute ? a.P + 2 * a.D : 0)));
  const auto stage_rows = [&](int i) {
    const int64_t by = i * apart;
    return EvaluationRows<T>{first.y + by, first.gate + by, first.rest + by, first.u + by,
                             first.g + by, first.q + by,    first.x + by};
  };
  const T *all = t.of(a.weights), *matrices = t.of(o.matrices);
  const Weights<T> w = {all, all}, reverse = {staged(t, matrices), matrices};
  T* starts = reinterpret_cast<T*>(o.starts) + int64_t(blockIdx.x) * o.windows * size;
  T* kept = reinterpret_cast<T*>(o.kept) + int64_t(blockIdx.x) * kTicks * size;
  T* share = reinterpret_cast<T*>(o.partial) + int64_t(blockIdx.x) * o.parameters;
  for (int64_t i = threadIdx.x; i < o.parameters; i += kThreads) share[i] = T(0);
  const auto save = [&](T* to) { each(t, H, [&](int i, int b) { to[i * t.n + b] = h[i * t.row + b]; }); };
  const auto restore = [&](const T* from) { each(t, H, [&](int i, int b) { h[i * t.row + b] = from[i * t.n + b]; }); };
  const auto set_rows = [&] {
    while (next_rows(t))
      each(t, H, [&](int i, int b) {
        if (t.event[b] >= 0) h[i * t.row + b] = t.of(a.states)[t.event[b] * H + i];
      });
  };
  // the states at the start of every window, after the rows there
  load_states(t, h);
  start_clocks(t);
  int64_t ticks = 0;
  for (;; ++ticks) {
    set_rows();
    if (ticks % kTicks == 0 && ticks / kTicks < o.windows) save(starts + ticks / kTicks * size);
    if (!next_step(t, step)) break;
    whole_step(t, w, first, step, k, h);
  }
  // the series as they are at their ends: the last segment, all of its steps to be taken back
  each(t, H, [&](int i, int b) { g[i * t.row + b] = t.valid(b) ? t.of(o.gstate)[(t.first + b) * H + i] : T(0); });
  for (int64_t tick = ticks; tick >= 0; --tick) {
    const int64_t from = tick - 1;  // the step from there to here
    if (from >= 0 && (tick == ticks || tick % kTicks == 0)) {
      restore(starts + from / kTicks * size);
      set_clocks(t, from / kTicks * kTicks);
      for (int64_t u = from / kTicks * kTicks; u <= from; ++u) {
        save(kept + u % kTicks * size);
        if (u == from || !next_step(t, step)) break;
        whole_step(t, w, first, step, k, h);
        set_rows();
      }
    }
    if (from >= 0) {
      restore(kept + from % kTicks * size);
      set_clocks(t, from);
      next_step(t, step);
      for (int i = 0; i < stages; ++i) {
        advance(t, m.a + i * stages, i, step, k, h, stage_rows(i).y);
        evaluate(t, w, stage_rows(i), k + i * stage);
      }
      advance(t, m.b, stages, step, k, h, h);
    } else {
      load_states(t, h);
    }
    rows_backward_at(t, o, j, tick, h, gk, after, gp, gq, gx, gh, g, share);
    if (from < 0) break;
    // the step: k becomes the gradients from each stage
    for (int i = stages - 1; i >= 0; --i) {
      each(t, H, [&](int u, int b) {
        const int at = u * t.row + b;
        T sum = T(m.b[i]) * g[at];
        for (int later = i + 1; later < stages; ++later) sum += T(m.weight(later, i)) * k[later * stage + at];
        gk[at] = step[b] * sum;
      });
      pull(t, reverse, stage_rows(i), gk, gq, gp, gh, k + i * stage, share);
    }
    each(t, H, [&](int u, int b) {
      const int at = u * t.row + b;
      for (int i = 0; i < stages; ++i) g[at] += k[i * stage + at];
    });
  }
  each(t, H, [&](int i, int b) {
    if (t.valid(b)) reinterpret_cast<T*>(o.gh0)[(t.first + b) * H + i] = g[i * t.row + b];
  });
}

}  // namespace fastflow
