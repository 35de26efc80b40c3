// GRU-ODE-Bayes on a GPU: a block takes a tile of series through all their steps and jumps, what it knows of them in
// shared memory as rows [unit][series], the cell's matrices beside them where there is room. Every series is on its own
// clock; one that has nothing to do makes steps of size zero. Backward makes the states of a window of ticks again from
// those at its start, then goes through it backwards; a block has a share of the weights' gradients, and a second
// launch adds up the shares in their order. The arguments are packed by fastflow/ops/cuda/gru_ode.py.
#include "../gru_ode.h"
#include "launch.cuh"

namespace fastflow {

constexpr int kTicks = 16;  // of a window, as in fastflow/ops/cuda/gru_ode.py

// weights: all parameters one after the other, every matrix transposed; method: b [stages], a [stages, stages]
struct Filter {
  char *h0, *values, *masks, *dropout, *weights, *pre, *post, *state, *states;
  int64_t *offsets, *counts, *ends;  // ends: of every segment, in steps of its series
  double* sizes;
  int64_t *jumps, *steps;
  double* method;
  int64_t series, rows, tile, H, P, D, Q, gates, impute, stages, staged;
};

// matrices: the parameters as they are; starts [blocks, windows, H, tile], kept [blocks, kTicks, H, tile],
// partial [blocks, parameters]
struct FilterBackward {
  Filter filter;
  char *matrices, *gpre, *gpost, *gstate, *gstates, *gh0, *gvalues, *starts, *kept, *partial;
  int64_t windows, parameters;
};

// Where each parameter begins.
struct Places {
  int64_t input, input_bias, hidden, hidden_bias, predict, predict_bias, prep, prep_bias, ih, hh, ih_bias, hh_bias;

  FF_D explicit Places(const Filter& a) {
    const int64_t H = a.H, D = a.D, Q = a.Q;
    input = a.gates * H * H;
    input_bias = input + a.impute * a.gates * H * 2 * D;
    hidden = input_bias + a.impute * a.gates * H;
    hidden_bias = hidden + a.P * H;
    predict = hidden_bias + a.P;
    predict_bias = predict + 2 * D * a.P;
    prep = predict_bias + 2 * D;
    prep_bias = prep + D * 4 * Q;
    ih = prep_bias + D * Q;
    hh = ih + 3 * H * D * Q;
    ih_bias = hh + 3 * H * H;
    hh_bias = ih_bias + 3 * H;
  }
};

template <class T>
struct SeriesTile {
  const Filter& a;
  const Places at;
  const int n, row;                 // series of the tile; of a row, padded by one
  const int64_t first;              // series
  int64_t *segment, *left, *event;  // of a series: its segment, steps left in it, the row it is at or -1
  T* memory;

  FF_D SeriesTile(const Filter& f, double* shared)
      : a(f), at(f), n(int(f.tile)), row(int(f.tile) + 1), first(int64_t(blockIdx.x) * f.tile) {
    segment = reinterpret_cast<int64_t*>(shared), left = segment + n, event = left + n;
    memory = reinterpret_cast<T*>(event + n);
  }
  FF_D bool valid(int b) const { return first + b < a.series; }
  FF_D T* take(int64_t rows) {
    T* taken = memory;
    memory += rows * row;
    return taken;
  }
  FF_D bool any_event() const {
    bool any = false;
    for (int b = 0; b < n; ++b) any = any || event[b] >= 0;
    return any;
  }
  FF_D int64_t segments(int b) const { return a.offsets[first + b + 1] - a.offsets[first + b] + 1; }
  FF_D int64_t place(int b, int64_t i) const {
    return i + 1 < segments(b) ? a.offsets[first + b] + i : a.rows + first + b;
  }
  FF_D const T* of(const char* data) const { return reinterpret_cast<const T*>(data); }
};

// f(row, series) for n rows, by all threads
template <class T, class F>
FF_D void each(const SeriesTile<T>& t, int64_t rows, const F& f) {
  for (int i = threadIdx.x; i < int(rows) * t.n; i += kThreads) f(i / t.n, i % t.n);
  __syncthreads();
}

// f(series) by one thread for each
template <class T, class F>
FF_D void each_series(const SeriesTile<T>& t, const F& f) {
  __syncthreads();
  if (int(threadIdx.x) < t.n) f(int(threadIdx.x));
  __syncthreads();
}

// y = bias + W x or y += bias + W x, W [in][out]
template <class T>
FF_D void product(const SeriesTile<T>& t, const T* w, const T* bias, int64_t in, int64_t out, const T* x, T* y,
                  bool add) {
  const int columns = int(out), depth = int(in), row = t.row;
  each(t, out, [&](int m, int b) {
    T sum = bias ? bias[m] : T(0);
    for (int k = 0; k < depth; ++k) sum += w[k * columns + m] * x[k * row + b];
    y[m * row + b] = add ? y[m * row + b] + sum : sum;
  });
}

// --- the networks ---------------------------------------------------------------------------------------

template <class T>
struct Weights {
  const T *cell, *all;  // the cell's may be in shared memory
};

template <class T>
struct EvaluationRows {
  T *y, *gate, *rest, *u, *g, *q, *x;
};

template <class T>
FF_D EvaluationRows<T> take_evaluation(SeriesTile<T>& t) {
  const int64_t H = t.a.H;
  EvaluationRows<T> e = {t.take(H), t.take(H), t.take(H), t.take(H), t.take(H), nullptr, nullptr};
  if (t.a.impute) e.q = t.take(t.a.P), e.x = t.take(2 * t.a.D);
  return e;
}

// which: 0 before the jump, 1 after it; drops only where rows are given
template <class T>
FF_D void observe(const SeriesTile<T>& t, const T* w, const T* h, bool drops, int which, T* q, T* p) {
  const Filter& a = t.a;
  product(t, w + t.at.hidden, w + t.at.hidden_bias, a.H, a.P, h, q, false);
  each(t, a.P, [&](int j, int b) {
    T& v = q[j * t.row + b];
    v = v < T(0) ? T(0) : v;
    if (drops && a.dropout && t.event[b] >= 0) v *= t.of(a.dropout)[(t.event[b] * 2 + which) * a.P + j];
  });
  product(t, w + t.at.predict, w + t.at.predict_bias, a.P, 2 * a.D, q, p, false);
}

template <class T>
FF_D void evaluate(const SeriesTile<T>& t, const Weights<T>& w, const EvaluationRows<T>& e, T* k) {
  const Filter& a = t.a;
  const int64_t H = a.H, D = a.D;
  if (a.impute) observe(t, w.all, e.y, false, 0, e.q, e.x);
  const auto affine = [&](int64_t i, const T* from, T* to) {
    product(t, w.cell + i * H * H, static_cast<const T*>(nullptr), H, H, from, to, false);
    if (a.impute)
      product(t, w.all + t.at.input + i * H * 2 * D, w.all + t.at.input_bias + i * H, 2 * D, H, e.x, to, true);
  };
  affine(0, e.y, e.gate);
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    e.gate[at] = sigmoid(e.gate[at]);
    e.g[at] = e.gate[at] * e.y[at];
  });
  if (a.gates == 3) affine(1, e.y, e.rest);
  affine(a.gates - 1, e.g, e.u);
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    T u, c = T(0);
    if (a.gates == 3)
      k[at] = full_rate(e.u[at], e.rest[at], e.y[at], u, c);
    else
      k[at] = minimal_rate(e.u[at], e.gate[at], e.y[at], u);
    e.u[at] = u, e.rest[at] = c;
  });
}

// to = h + step sum over the first `count` stages of weights[i] k[i]
template <class T>
FF_D void advance(const SeriesTile<T>& t, const double* weights, int count, const T* step, const T* k, const T* h,
                  T* to) {
  const int stage = int(t.a.H) * t.row;
  each(t, t.a.H, [&](int i, int b) {
    const int at = i * t.row + b;
    T sum = T(0);
    for (int c = 0; c < count; ++c)
      if (weights[c] != 0) sum += T(weights[c]) * k[c * stage + at];
    to[at] = h[at] + step[b] * sum;
  });
}

// --- the jump -------------------------------------------------------------------------------------------

template <class T>
struct JumpRows {
  T *q, *p, *x, *r, *z, *n, *hn;
};

template <class T>
FF_D JumpRows<T> take_jump(SeriesTile<T>& t) {
  const Filter& a = t.a;
  return {t.take(a.P), t.take(2 * a.D), t.take(a.D * a.Q), t.take(a.H), t.take(a.H), t.take(a.H), t.take(a.H)};
}

// Does series b jump, and is channel d of its row observed?
template <class T>
FF_D bool jumps(const SeriesTile<T>& t, int b) {
  return t.event[b] >= 0 && t.a.jumps[t.event[b]] != 0;
}
template <class T>
FF_D bool seen(const SeriesTile<T>& t, int d, int b) {
  return jumps(t, b) && t.of(t.a.masks)[t.event[b] * t.a.D + d] != T(0);
}
template <class T>
FF_D Features<T> features_of(const SeriesTile<T>& t, const T* p, int d, int b) {
  return features(t.of(t.a.values)[t.event[b] * t.a.D + d], p[d * t.row + b], p[(t.a.D + d) * t.row + b]);
}

// from h and j.p to `to`, and the gates
template <class T>
FF_D void leap(const SeriesTile<T>& t, const T* w, const JumpRows<T>& j, const T* h, T* to) {
  const Filter& a = t.a;
  const int64_t H = a.H, X = a.D * a.Q;
  const int Q = int(a.Q);
  each(t, X, [&](int i, int b) {
    const int d = i / Q, q = i - d * Q;
    T value = T(0);
    if (seen(t, d, b)) {
      const Features<T> f = features_of(t, j.p, d, b);
      const T* v = w + t.at.prep + d * 4 * Q + q;
      value = w[t.at.prep_bias + i] + f.value * v[0] + f.mean * v[Q] + f.logvar * v[2 * Q] + f.error * v[3 * Q];
      value = value < T(0) ? T(0) : value;
    }
    j.x[i * t.row + b] = value;
  });
  for (int g = 0; g < 3; ++g) {
    T* gate = g == 0 ? j.r : g == 1 ? j.z : j.n;
    product(t, w + t.at.ih + g * H * X, w + t.at.ih_bias + g * H, X, H, j.x, gate, false);
    product(t, w + t.at.hh + g * H * H, w + t.at.hh_bias + g * H, H, H, h, g < 2 ? gate : j.hn, g < 2);
  }
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    to[at] = jump(j.r[at], j.z[at], j.n[at], j.hn[at], h[at]);
  });
}

// --- clocks ---------------------------------------------------------------------------------------------

template <class T>
FF_D void start_clocks(const SeriesTile<T>& t) {
  each_series(
      t, [&](int b) { t.segment[b] = 0, t.left[b] = t.valid(b) ? t.a.counts[t.place(b, 0)] : 0, t.event[b] = -1; });
}

// All series with `tick` steps made and the rows there behind them; those that are not as long are at their ends.
template <class T>
FF_D void set_clocks(const SeriesTile<T>& t, int64_t tick) {
  each_series(t, [&](int b) {
    int64_t i = 0, left = 0;
    if (t.valid(b)) {
      for (int64_t end = t.segments(b) - 1; i < end;) {
        const int64_t middle = (i + end) / 2;
        if (t.a.ends[t.place(b, middle)] <= tick)
          i = middle + 1;
        else
          end = middle;
      }
      left = t.a.ends[t.place(b, i)] - tick;
    }
    t.segment[b] = i, t.left[b] = left < 0 ? 0 : left, t.event[b] = -1;
  });
}

// Backwards: the last row of each series that is at `tick` and not yet behind; false where none is.
template <class T>
FF_D bool previous_rows(const SeriesTile<T>& t, int64_t tick) {
  each_series(t, [&](int b) {
    t.event[b] = -1;
    if (!t.valid(b) || t.segment[b] == 0) return;
    const int64_t row = t.place(b, t.segment[b] - 1);
    if (t.a.ends[row] == tick) t.event[b] = row, --t.segment[b];
  });
  return t.any_event();
}

// The row that each series is at now; false where none is at one.
template <class T>
FF_D bool next_rows(const SeriesTile<T>& t) {
  each_series(t, [&](int b) {
    t.event[b] = -1;
    if (!t.valid(b) || t.left[b] > 0 || t.segment[b] + 1 >= t.segments(b)) return;
    t.event[b] = t.place(b, t.segment[b]++);
    t.left[b] = t.a.counts[t.place(b, t.segment[b])];
  });
  return t.any_event();
}

// The size of every series' step, zero for those that make none; false where none does.
template <class T>
FF_D bool next_step(const SeriesTile<T>& t, T* step) {
  each_series(t, [&](int b) {
    const bool moves = t.valid(b) && t.left[b] > 0;
    step[b] = moves ? T(t.a.sizes[t.place(b, t.segment[b])]) : T(0);
    if (moves) --t.left[b];
    t.event[b] = moves ? 0 : -1;
  });
  return t.any_event();
}

// --- forward --------------------------------------------------------------------------------------------

// `cell` transposed in shared memory behind the rows, or where it is
template <class T>
FF_D const T* staged(SeriesTile<T>& t, const T* cell) {
  if (!t.a.staged) return cell;
  const int64_t n = t.a.gates * t.a.H * t.a.H;
  T* to = t.memory;
  t.memory += n;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = cell[i];
  __syncthreads();
  return to;
}

template <class T>
FF_D void load_states(const SeriesTile<T>& t, T* h) {
  each(t, t.a.H, [&](int i, int b) { h[i * t.row + b] = t.valid(b) ? t.of(t.a.h0)[(t.first + b) * t.a.H + i] : T(0); });
}

// one step of h, in place; k [stages] rows
template <class T>
FF_D void whole_step(const SeriesTile<T>& t, const Weights<T>& w, const EvaluationRows<T>& e, const T* step, T* k,
                     T* h) {
  const int stages = int(t.a.stages);
  const double *b = t.a.method, *a = b + stages;
  for (int i = 0; i < stages; ++i) {
    advance(t, a + i * stages, i, step, k, h, e.y);
    evaluate(t, w, e, k + i * int(t.a.H) * t.row);
  }
  advance(t, b, stages, step, k, h, h);
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

// --- backward -------------------------------------------------------------------------------------------

// to[m][k] += sum over the series of g[m] x[k]
template <class T>
FF_D void gather(const SeriesTile<T>& t, int64_t out, int64_t in, const T* g, const T* x, T* to) {
  for (int64_t i = threadIdx.x; i < out * in; i += kThreads) {
    const int m = int(quotient(i, in)), k = int(i - m * in);
    T sum = T(0);
    for (int b = 0; b < t.n; ++b) sum += g[m * t.row + b] * x[k * t.row + b];
    to[i] += sum;
  }
}

template <class T>
FF_D void gather_bias(const SeriesTile<T>& t, int64_t out, const T* g, T* to) {
  for (int64_t m = threadIdx.x; m < out; m += kThreads) {
    T sum = T(0);
    for (int b = 0; b < t.n; ++b) sum += g[m * t.row + b];
    to[m] += sum;
  }
}

// From the gradient gp of a prediction: adds to that of h and to the weights'; gq is made.
template <class T>
FF_D void observe_backward(const SeriesTile<T>& t, const T* matrices, const T* h, const T* q, const T* gp, bool drops,
                           int which, T* gq, T* gh, T* share) {
  const Filter& a = t.a;
  product(t, matrices + t.at.predict, static_cast<const T*>(nullptr), 2 * a.D, a.P, gp, gq, false);
  each(t, a.P, [&](int j, int b) {
    T& v = gq[j * t.row + b];
    if (q[j * t.row + b] == T(0)) v = T(0);
    if (drops && a.dropout && t.event[b] >= 0) v *= t.of(a.dropout)[(t.event[b] * 2 + which) * a.P + j];
  });
  product(t, matrices + t.at.hidden, static_cast<const T*>(nullptr), a.P, a.H, gq, gh, true);
  gather(t, 2 * a.D, a.P, gp, q, share + t.at.predict);
  gather_bias(t, 2 * a.D, gp, share + t.at.predict_bias);
  gather(t, a.P, a.H, gq, h, share + t.at.hidden);
  gather_bias(t, a.P, gq, share + t.at.hidden_bias);
  __syncthreads();  // all have read what comes next
}

// The rows that are at hand go backwards; `before` are the states before them, g becomes the gradient there.
template <class T>
FF_D void rows_backward(const SeriesTile<T>& t, const FilterBackward& o, const JumpRows<T>& j, const T* before,
                        T* after, T* gp, T* gq, T* gx, T* gh, T* g, T* share) {
  const Filter& a = t.a;
  const T *w = t.of(a.weights), *matrices = t.of(o.matrices);
  const int64_t H = a.H, D = a.D, X = a.D * a.Q;
  const int Q = int(a.Q);
  // the prediction after the jump
  each(t, H, [&](int i, int b) {
    const int64_t r = t.event[b];
    after[i * t.row + b] = r >= 0 ? t.of(a.states)[r * H + i] : T(0);
    gh[i * t.row + b] = r >= 0 ? g[i * t.row + b] + t.of(o.gstates)[r * H + i] : T(0);
  });
  observe(t, w, after, true, 1, j.q, j.p);
  each(t, 2 * D, [&](int i, int b) { gp[i * t.row + b] = jumps(t, b) ? t.of(o.gpost)[t.event[b] * 2 * D + i] : T(0); });
  observe_backward(t, matrices, after, j.q, gp, true, 1, gq, gh, share);
  // the jump
  observe(t, w, before, true, 0, j.q, j.p);
  leap(t, w, j, before, after);
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    const T later = gh[at];
    gh[at] = jump_backward(later, j.r[at], j.z[at], j.n[at], j.hn[at], before[at]);
    if (jumps(t, b)) return;
    gh[at] = later;
    j.r[at] = j.z[at] = j.n[at] = j.hn[at] = T(0);
  });
  for (int k = 0; k < 3; ++k) {
    const T *gate = k == 0 ? j.r : k == 1 ? j.z : j.n, *from_h = k < 2 ? gate : j.hn;
    product(t, matrices + t.at.hh + k * H * H, static_cast<const T*>(nullptr), H, H, from_h, gh, true);
    product(t, matrices + t.at.ih + k * H * X, static_cast<const T*>(nullptr), H, X, gate, gx, k > 0);
    gather(t, H, H, from_h, before, share + t.at.hh + k * H * H);
    gather_bias(t, H, from_h, share + t.at.hh_bias + k * H);
    gather(t, H, X, gate, j.x, share + t.at.ih + k * H * X);
    gather_bias(t, H, gate, share + t.at.ih_bias + k * H);
  }
  // what the observation was made to
  each(t, X, [&](int i, int b) {
    if (j.x[i * t.row + b] == T(0)) gx[i * t.row + b] = T(0);
  });
  for (int64_t i = threadIdx.x; i < X; i += kThreads) {
    const int d = int(i) / Q, q = int(i) - d * Q;
    T sum[4] = {}, bias = T(0);
    for (int b = 0; b < t.n; ++b) {
      if (!seen(t, d, b)) continue;
      const Features<T> f = features_of(t, j.p, d, b);
      const T v = gx[i * t.row + b];
      bias += v, sum[0] += v * f.value, sum[1] += v * f.mean, sum[2] += v * f.logvar, sum[3] += v * f.error;
    }
    share[t.at.prep_bias + i] += bias;
#pragma unroll
    for (int c = 0; c < 4; ++c) share[t.at.prep + (d * 4 + c) * Q + q] += sum[c];
  }
  each(t, D, [&](int d, int b) {
    const int64_t r = t.event[b];
    T &mean = gp[d * t.row + b], &logvar = gp[(D + d) * t.row + b];
    mean = logvar = T(0);
    if (r < 0) return;
    mean = t.of(o.gpre)[r * 2 * D + d], logvar = t.of(o.gpre)[r * 2 * D + D + d];
    T value = T(0);
    if (seen(t, d, b)) {
      const Features<T> f = features_of(t, j.p, d, b);
      const T* v = w + t.at.prep + d * 4 * Q;
      T sum[4] = {};
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] += gx[(d * Q + q) * t.row + b] * v[c * Q + q];
      const T through = sum[3] * f.inverse;
      value = sum[0] + through, mean += sum[1] - through, logvar += sum[2] - T(0.5) * sum[3] * f.error;
    } else if (!jumps(t, b)) {
      mean += t.of(o.gpost)[r * 2 * D + d], logvar += t.of(o.gpost)[r * 2 * D + D + d];
    }
    reinterpret_cast<T*>(o.gvalues)[r * D + d] = value;
  });
  observe_backward(t, matrices, before, j.q, gp, true, 0, gq, gh, share);
  each(t, H, [&](int i, int b) {
    if (t.event[b] >= 0) g[i * t.row + b] = gh[i * t.row + b];
  });
}

// gh from gk at one evaluation, whose rows become gradients
template <class T>
FF_D void pull(const SeriesTile<T>& t, const Weights<T>& w, const EvaluationRows<T>& e, const T* gk, T* gq, T* gp,
               T* scratch, T* gh, T* share) {
  const Filter& a = t.a;
  const int64_t H = a.H, D = a.D, last = a.gates - 1;
  const bool full = a.gates == 3;
  const T* none = nullptr;
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    T ga, gz, through;
    if (full)
      full_rate_backward(gk[at], e.u[at], e.rest[at], e.y[at], ga, gz, through);
    else
      minimal_rate_backward(gk[at], e.u[at], e.gate[at], e.y[at], ga, gz, through);
    e.u[at] = ga, e.rest[at] = gz, gh[at] = through;
  });
  product(t, w.cell + last * H * H, none, H, H, e.u, scratch, false);
  each(t, H, [&](int i, int b) {
    const int at = i * t.row + b;
    const T r = e.gate[at];
    gh[at] += scratch[at] * r;
    e.gate[at] = (scratch[at] * e.y[at] + (full ? T(0) : e.rest[at])) * r * (T(1) - r);
  });
  product(t, w.cell, none, H, H, e.gate, gh, true);
  if (full) product(t, w.cell + H * H, none, H, H, e.rest, gh, true);
  const auto weights = [&](int64_t i, const T* of, const T* from) {
    gather(t, H, H, of, from, share + i * H * H);
    if (!a.impute) return;
    gather(t, H, 2 * D, of, e.x, share + t.at.input + i * H * 2 * D);
    gather_bias(t, H, of, share + t.at.input_bias + i * H);
  };
  weights(0, e.gate, e.y);
  if (full) weights(1, e.rest, e.y);
  weights(last, e.u, e.g);
  __syncthreads();
  if (!a.impute) return;
  const T* input = w.all + t.at.input;
  product(t, input, none, H, 2 * D, e.gate, gp, false);
  if (full) product(t, input + H * 2 * D, none, H, 2 * D, e.rest, gp, true);
  product(t, input + last * H * 2 * D, none, H, 2 * D, e.u, gp, true);
  observe_backward(t, w.all, e.y, e.q, gp, false, 0, gq, gh, share);
}

template <class T>
FF_D void gru_ode_bwd(const FilterBackward& o) {
  FF_SHARED(double, shared);
  const Filter& a = o.filter;
  SeriesTile<T> t(a, shared);
  const int64_t H = a.H, size = H * t.n;
  const int stages = int(a.stages), stage = int(H) * t.row;
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
  const double *b_of = a.method, *a_of = b_of + stages;
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
        advance(t, a_of + i * stages, i, step, k, h, stage_rows(i).y);
        evaluate(t, w, stage_rows(i), k + i * stage);
      }
      advance(t, b_of, stages, step, k, h, h);
    } else {
      load_states(t, h);
    }
    set_clocks(t, tick);
    while (previous_rows(t, tick)) {
      // before a row that comes at once after another is the state after that; gk is scratch
      each(t, H, [&](int i, int b) {
        const int64_t r = t.event[b];
        const bool follows = r >= 0 && r > a.offsets[t.first + b] && a.counts[r] == 0;
        gk[i * t.row + b] = follows ? t.of(a.states)[(r - 1) * H + i] : h[i * t.row + b];
      });
      rows_backward(t, o, j, gk, after, gp, gq, gx, gh, g, share);
    }
    if (from < 0) break;
    // the step: k becomes the gradients from each stage
    for (int i = stages - 1; i >= 0; --i) {
      each(t, H, [&](int m, int b) {
        const int at = m * t.row + b;
        T sum = T(b_of[i]) * g[at];
        for (int later = i + 1; later < stages; ++later) sum += T(a_of[later * stages + i]) * k[later * stage + at];
        gk[at] = step[b] * sum;
      });
      pull(t, reverse, stage_rows(i), gk, gq, gp, gh, k + i * stage, share);
    }
    each(t, H, [&](int m, int b) {
      const int at = m * t.row + b;
      for (int i = 0; i < stages; ++i) g[at] += k[i * stage + at];
    });
  }
  each(t, H, [&](int i, int b) {
    if (t.valid(b)) reinterpret_cast<T*>(o.gh0)[(t.first + b) * H + i] = g[i * t.row + b];
  });
}

// The shares of the blocks, in their order.
struct FilterFinish {
  char *partial, *out;
  int64_t parameters, blocks;
};

template <class T>
FF_D void gru_ode_finish(const FilterFinish& a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.parameters) return;
  double sum = 0;
  for (int64_t k = 0; k < a.blocks; ++k) sum += double(reinterpret_cast<const T*>(a.partial)[k * a.parameters + i]);
  reinterpret_cast<T*>(a.out)[i] = T(sum);
}

}  // namespace fastflow
