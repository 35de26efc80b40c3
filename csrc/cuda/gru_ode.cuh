// What both passes of GRU-ODE-Bayes on a GPU share: a tile of series with their clocks, the networks, a step.
#pragma once

#include "../gru_ode.h"
#include "../ode.h"
#include "launch.cuh"

namespace fastflow {

// weights: all parameters one after the other, every matrix transposed; method: as Method.pack() lists it
struct Filter {
  char *h0, *values, *masks, *dropout, *weights, *pre, *post, *state, *states;
  int64_t *offsets, *counts, *ends;  // ends: of every segment, in steps of its series
  double* sizes;
  int64_t *jumps, *steps;
  double* method;
  int64_t series, rows, tile, H, P, D, Q, gates, impute, stages, staged;
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
  const int n, row;                 // series of the tile; of a row, padded to an odd number
  const int64_t first;              // series
  int64_t *segment, *left, *event;  // of a series: its segment, steps left in it, the row it is at or -1
  T* memory;

  FF_D SeriesTile(const Filter& f, double* shared)
      : a(f), at(f), n(int(f.tile)), row(int(f.tile) | 1), first(int64_t(blockIdx.x) * f.tile) {
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

// --- steps ----------------------------------------------------------------------------------------------

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
  const Tableau m(t.a.method);
  for (int i = 0; i < m.stages; ++i) {
    advance(t, m.a + i * m.stages, i, step, k, h, e.y);
    evaluate(t, w, e, k + i * int(t.a.H) * t.row);
  }
  advance(t, m.b, m.stages, step, k, h, h);
}

}  // namespace fastflow
