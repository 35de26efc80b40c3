// GRU-ODE-Bayes on a GPU: a block takes a tile of series through all their steps and jumps, what it knows of them in
// shared memory as rows [unit][series], the cell's matrices beside them where there is room. Every series is on its own
// clock; one that has nothing to do makes steps of size zero.
// The arguments are packed by fastflow/ops/cuda/gru_ode.py.
#include "gru_ode.cuh"

namespace fastflow {

template <class T>
FF_D void gru_ode_fwd(const Filter& a) {
  FF_SHARED(double, shared);
  SeriesTile<T> t(a, shared);
  T *step = t.take(1), *h = t.take(a.H), *fresh = t.take(a.H), *k = t.take(a.stages * a.H);
  const EvaluationRows<T> e = take_evaluation(t);
  const JumpRows<T> j = take_jump(t);
  const T* all = t.of(a.weights);
  const Weights<T> w = {staged(t, all), all};
  const int64_t H = a.H, D = a.D;
  load_states(t, h);
  start_clocks(t);
  each_series(t, [&](int b) {
    if (!t.valid(b)) return;
    const int64_t total = a.ends[a.rows + t.first + b];
    int64_t* to = a.steps + (t.first + b) * 3;
    to[0] = total * a.stages, to[1] = total, to[2] = 0;
  });
  for (;;) {
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
    if (!next_step(t, step)) break;
    whole_step(t, w, e, step, k, h);
  }
  each(t, H, [&](int i, int b) {
    if (t.valid(b)) reinterpret_cast<T*>(a.state)[(t.first + b) * H + i] = h[i * t.row + b];
  });
}

}  // namespace fastflow
