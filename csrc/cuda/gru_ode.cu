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

}  // namespace fastflow
