// Adaptive steps of GRU-ODE-Bayes on a GPU: a tile's series go through an interval side by side, each with steps of its
// own, as csrc/cpu/gru_ode_steps.h has them. Times, sizes and norms are double.
// The arguments are packed by fastflow/ops/cuda/gru_ode.py.
#include "gru_ode_reverse.cuh"

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
  const double* const one = m.c + m.stages - 1;  // the last of these stages is at the end of the step
  const int stages = m.stages, stage = int(t.a.H) * t.row, mine = int(threadIdx.x) / kLanes;
  const bool leads = threadIdx.x % kLanes == 0 && mine < t.n;
  for (int64_t turn = kSlope;; ++turn) {
    if (leads) step[mine] = controls[mine].pending ? T(controls[mine].size) : T(0);
    __syncthreads();
    bool any = false;
    for (int b = 0; b < t.n; ++b) any = any || controls[b].pending;
    if (!any) break;
    const int first = turn == kSlope ? 0 : 1, last = turn < 0 ? first + 1 : stages;
    for (int i = first; i < last; ++i) {
      advance(t, turn < 0 ? one : m.a + i * stages, i, step, k, h, e.y);
      evaluate(t, w, e, k + i * stage);
    }
    if (turn >= 0) advance(t, m.b, stages, step, k, h, next);
    double state = 0, found = 0;
    for (int of_state = turn == kSlope; of_state >= 0; --of_state) {
      state = found;
      found = norm(t, [&](int at) {
        T error = T(0), other = h[at];
        if (turn >= 0) {
          for (int i = 0; i < stages; ++i) error += T(m.error[i]) * k[i * stage + at];
          error *= step[mine], other = next[at];
        } else {
          error = of_state ? other : turn == kSlope ? k[at] : k[stage + at] - k[at];
        }
        return double(error) / (to.atol + to.rtol * most(double(abs(h[at])), double(abs(other))));
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

// --- forward -------------------------------------------------------------------------------------------

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

// --- backward ------------------------------------------------------------------------------------------

// sizes [blocks, room, tile, 2]: of the steps that are kept, and how much of each was needed
struct AdaptiveBackward {
  FilterBackward fixed;
  Tolerances control;
  double* sizes;
  int64_t room;  // steps of a series that are kept
};

// An interval begins at h0 or behind a row. Its steps are made again, the last `room` of every series kept, and taken
// back, the last of every series first; where there were more they are made again up to those.
template <class T>
FF_D void gru_ode_adaptive_bwd(const AdaptiveBackward& all) {
  FF_SHARED(double, shared);
  const FilterBackward& o = all.fixed;
  const Filter& a = o.filter;
  SeriesTile<T> t(a, shared);
  Control* const controls = take_controls(t);
  const Tableau m(a.method);
  const int64_t H = a.H, size = H * t.n, room = all.room;
  const int stages = m.stages, stage = int(H) * t.row;
  T *step = t.take(1), *weights = t.take(stages), *h = t.take(H), *g = t.take(H), *gk = t.take(H), *gh = t.take(H);
  T *after = t.take(H), *gp = t.take(2 * a.D), *gq = t.take(a.P), *gx = t.take(a.D * a.Q);
  SeriesTile<T> over = t;  // the rows of jumps lie where those of the steps do
  const JumpRows<T> j = take_jump(over);
  T* k = t.take(stages * H);
  const EvaluationRows<T> e = take_evaluation(t);
  t.memory = t.memory < over.memory ? over.memory : t.memory;
  const T *forward = t.of(a.weights), *matrices = t.of(o.matrices);
  const Weights<T> w = {staged(t, forward), forward}, reverse = {matrices, matrices};
  T* kept = reinterpret_cast<T*>(o.kept) + int64_t(blockIdx.x) * room * size;
  double* sizes = all.sizes + int64_t(blockIdx.x) * room * t.n * 2;
  T* share = reinterpret_cast<T*>(o.partial) + int64_t(blockIdx.x) * o.parameters;
  for (int64_t i = threadIdx.x; i < o.parameters; i += kThreads) share[i] = T(0);
  // h after the interval that begins at `tick`; of series that made more steps than those `back` only these
  const auto make_again = [&](int64_t tick, int64_t back) {
    set_clocks(t, tick);
    each(t, H, [&](int i, int b) {
      const int64_t begun = t.valid(b) ? t.segment[b] : 0, row = begun ? t.place(b, begun - 1) : 0;
      const T* from = begun ? t.of(a.states) + row * H : t.of(a.h0) + (t.first + b) * H;
      h[i * t.row + b] = t.valid(b) ? from[i] : T(0);
    });
    next_interval(t, controls);
    if (back)
      each_series(t, [&](int b) {
        Control& c = controls[b];
        c.limit = c.total - back, c.pending = c.pending && c.limit > 0;
      });
    const auto keep = [&](int i, int b, int at) {
      const int64_t slot = (controls[b].accepted - 1) % room;
      kept[slot * size + i * t.n + b] = h[at];
      if (i > 0) return;
      sizes[(slot * t.n + b) * 2] = double(step[b]), sizes[(slot * t.n + b) * 2 + 1] = controls[b].theta;
    };
    interval(t, all.control, w, e, controls, step, k, h, after, [](int, int64_t, Fault) {}, keep);
    if (!back) each_series(t, [&](int b) { controls[b].total = controls[b].accepted; });
  };
  each(t, H, [&](int i, int b) { g[i * t.row + b] = t.valid(b) ? t.of(o.gstate)[(t.first + b) * H + i] : T(0); });
  int64_t ticks = 0;
  for (int b = 0; b < t.n; ++b)
    if (t.valid(b) && ticks < a.ends[a.rows + t.first + b]) ticks = a.ends[a.rows + t.first + b];
  for (int64_t tick = ticks; tick >= 0; --tick) {
    const int64_t from = tick - 1;  // the interval from there to here
    if (from >= 0)
      make_again(from, 0);
    else
      load_states(t, h);
    rows_backward_at(t, o, j, tick, h, gk, after, gp, gq, gx, gh, g, share);
    if (from < 0) break;
    for (int64_t back = 0;; ++back) {
      if (back > 0 && back % room == 0) make_again(from, back);
      each_series(t, [&](int b) {
        const int64_t number = controls[b].total - 1 - back, slot = number % room;
        t.event[b] = number < 0 ? -1 : slot;
        step[b] = number < 0 ? T(0) : T(sizes[(slot * t.n + b) * 2]);
        for (int i = 0; i < stages; ++i)
          weights[i * t.row + b] = number < 0 ? T(0) : T(m.dense(i, sizes[(slot * t.n + b) * 2 + 1]));
      });
      if (!t.any_event()) break;
      int used = stages - 1;  // whole steps do not use the last
      for (int b = 0; b < t.n; ++b)
        if (weights[(stages - 1) * t.row + b] != T(0)) used = stages;
      each(t, H,
           [&](int i, int b) { h[i * t.row + b] = t.event[b] < 0 ? T(0) : kept[t.event[b] * size + i * t.n + b]; });
      // all slopes but the last, then every stage once more from there to the first: k becomes gradients
      for (int turn = 1 - used; turn < used; ++turn) {
        const bool forwards = turn < 0;
        const int i = used - 1 - (forwards ? -turn : turn);
        advance(t, m.a + i * stages, i, step, k, h, e.y);
        evaluate(t, w, e, forwards ? k + i * stage : gh);
        if (forwards) continue;
        each(t, H, [&](int u, int b) {
          const int at = u * t.row + b;
          T sum = weights[i * t.row + b] * g[at];
          for (int later = i + 1; later < used; ++later) sum += T(m.weight(later, i)) * k[later * stage + at];
          gk[at] = step[b] * sum;
        });
        pull(t, reverse, e, gk, gq, gp, gh, k + i * stage, share);
      }
      each(t, H, [&](int u, int b) {
        const int at = u * t.row + b;
        for (int i = 0; i < used; ++i) g[at] += k[i * stage + at];
      });
    }
  }
  each(t, H, [&](int i, int b) {
    if (t.valid(b)) reinterpret_cast<T*>(o.gh0)[(t.first + b) * H + i] = g[i * t.row + b];
  });
}

}  // namespace fastflow
