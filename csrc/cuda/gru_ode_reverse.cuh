// The parts of the gradient of GRU-ODE-Bayes on a GPU: rows and evaluations backwards.
#pragma once

#include "gru_ode.cuh"

namespace fastflow {

// matrices: the parameters as they are; partial [blocks, parameters]; starts [blocks, windows, H, tile], nothing with
// adaptive steps; kept [blocks, kTicks or `room`, H, tile]
struct FilterBackward {
  Filter filter;
  char *matrices, *gpre, *gpost, *gstate, *gstates, *gh0, *gvalues, *starts, *kept, *partial;
  int64_t windows, parameters;
};

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

// The rows of the tile at `tick`, the last first; h are the states before the first of those of a series, and `before`,
// `after` and gh are scratch.
template <class T>
FF_D void rows_backward_at(const SeriesTile<T>& t, const FilterBackward& o, const JumpRows<T>& j, int64_t tick,
                           const T* h, T* before, T* after, T* gp, T* gq, T* gx, T* gh, T* g, T* share) {
  const Filter& a = t.a;
  set_clocks(t, tick);
  while (previous_rows(t, tick)) {
    // before a row that comes at once after another is the state after that
    each(t, a.H, [&](int i, int b) {
      const int64_t r = t.event[b];
      const bool follows = r >= 0 && r > a.offsets[t.first + b] && a.counts[r] == 0;
      before[i * t.row + b] = follows ? t.of(a.states)[(r - 1) * a.H + i] : h[i * t.row + b];
    });
    rows_backward(t, o, j, before, after, gp, gq, gx, gh, g, share);
  }
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

}  // namespace fastflow
