// Steps in time of a tile of samples, whatever their state is made of: control, norms, and the two kinds of launches.
// With fixed steps or control per sample a block goes through all steps of its tiles; where the whole batch decides on
// a step, a launch takes one, and every block adds up what all left of the launch before, in the same order, so that
// all decide alike. Nothing waits for the host.
//
// A system derives from March<T> and has, as functions that take it,
//
//   begin(o)                       the state at the first time; a barrier follows
//   slopes(o, first, last, guess)  what follows of the verdicts, with advance() of all rows; then slope(i) for
//                                  i = first .. last - 1, of a step's stages or of an Euler step; a barrier follows
//   squared(o, row)                is the error of this row one by itself?
//   add_up(o, s, other, sums)      a sample's sums of squares as norm() of ode_control.cuh takes them
#pragma once

#include "ode.cuh"
#include "ode_control.cuh"

namespace fastflow {

struct MarchPlaces {  // in shared memory, bytes
  int64_t y, ends, slopes, table, errors, sums, controls, verdicts, phase;
};

struct StepControl {
  double rtol, atol;
  int64_t max_steps;
  char* grid;                       // of fixed steps: where they begin and end; none: adaptive
  char* status;                     // [B, 5]: phase at the end, t, attempt, h, error
  char *state, *control, *partial;  // of the whole batch: what a launch leaves to the next
  int64_t tiles, turn;              // turn: 0 or 1, a launch reads what the other has written
};

// The state is `rows` numbers of every sample.
template <class T>
struct March {
  using Number = T;
  const Ode& ode;
  const StepControl& how;
  NetTile<T> net;
  Tableau method;
  T *y, *ends, *slopes, *table;
  double *errors, *sums;
  Control* controls;
  Verdict* verdicts;
  int64_t* phase;  // of the tile
  int features, tangents, rows, samples;
  int64_t begin;  // first sample of the tile
  double sign;    // of time

  FF_D March(const Ode& ode_, const StepControl& how_, const MarchPlaces& p, const NetTile<T>& net_, int rows_,
             unsigned char* shared)
      : ode(ode_), how(how_), net(net_), method(reinterpret_cast<const double*>(ode_.method)) {
    y = reinterpret_cast<T*>(shared + p.y), ends = reinterpret_cast<T*>(shared + p.ends);
    slopes = reinterpret_cast<T*>(shared + p.slopes), table = reinterpret_cast<T*>(shared + p.table);
    errors = reinterpret_cast<double*>(shared + p.errors), sums = reinterpret_cast<double*>(shared + p.sums);
    controls = reinterpret_cast<Control*>(shared + p.controls);
    verdicts = reinterpret_cast<Verdict*>(shared + p.verdicts);
    phase = reinterpret_cast<int64_t*>(shared + p.phase);
    features = int(ode.net.features), tangents = int(ode.net.tangents), samples = int(ode.tile);
    rows = rows_;
    begin = int64_t(blockIdx.x) * samples;
    sign = ode.time(ode.count) < ode.time(0) ? -1 : 1;
    // a and b in T, and the one weight of an Euler step
    const int n = method.stages * (method.stages + 1);
    for (int i = threadIdx.x; i <= n; i += kThreads) table[i] = i < n ? T(method.a[i]) : T(1);
  }
  FF_D int64_t global(int s) const { return smaller(begin + s, ode.samples - 1); }
  FF_D bool valid(int s) const { return begin + s < ode.samples; }
  FF_D T& slope(int stage, int row, int s) const { return slopes[(stage * rows + row) * samples + s]; }
  FF_D Rules rules() const {
    const auto doubles = [](char* data) { return reinterpret_cast<const double*>(data); };
    return {method,        doubles(ode.times), doubles(how.grid), ode.count, ode.checkpoints,
            how.max_steps, ode.controls,       features,          sign,      epsilon<T>()};
  }
  // of a stage; behind those of all stages the end's, and that of an Euler step
  FF_D const T* coefficients(int stage) const { return table + stage * method.stages; }
  // h sum_i weights[i] slope(i)
  FF_D T combine(int stages, T h, const T* weights, int row, int s) const {
    T sum = T(0);
    for (int i = 0; i < stages; ++i)
      if (weights[i] != T(0)) sum += weights[i] * slope(i, row, s);
    return h * sum;
  }
  // the part of the step that was accepted which lies before `time`
  FF_D double part(int s, double time) const { return (time - verdicts[s].t) / verdicts[s].h; }
  // the state at `time`, which the step that was accepted has reached, or at the beginning of all
  FF_D T at(double time, int row, int s) const {
    const Verdict& v = verdicts[s];
    T value = y[row * samples + s];
    if (!v.accepted) return value;
    const double theta = part(s, time);
    if (!(theta < 1)) return ends[row * samples + s];
    for (int j = 0; j < method.stages; ++j) value += T(v.h * method.dense(j, theta)) * slope(j, row, s);
    return value;
  }
  FF_D double scale(T u, T v) const { return how.atol + how.rtol * most(double(abs(u)), double(abs(v))); }
};

// Behind the step where it was accepted.
template <class T>
FF_D void advance(const March<T>& o, int row, int s) {
  if (!o.verdicts[s].accepted) return;
  o.y[row * o.samples + s] = o.ends[row * o.samples + s];
  if (o.method.fsal) o.slope(0, row, s) = o.slope(o.method.stages - 1, row, s);
}

// --- norms --------------------------------------------------------------------------------------------------

// From `which` on of the sums of a sample: squares of quantity(row, s) over the tolerance for y and other(row, s)
template <class S, class Q, class O>
FF_D void norms(const S& o, int which, const Q& quantity, const O& other) {
  each(o.net, o.rows, [&](int row, int s) {
    const double e = quantity(row, s), error = over(e, o.scale(o.y[row * o.samples + s], other(row, s)));
    o.errors[row * o.samples + s] = squared(o, row) ? error * error : e;
  });
  each(o.net, 1, [&](int, int s) { add_up(o, s, other, o.sums + s * kNorms + which); });
}

// A turn of the tile: what was decided, slopes, and the sums that decide.
template <class S>
FF_D void work(const S& o, int64_t phase) {
  using T = typename S::Number;
  const int stages = o.method.stages;
  const int first = phase == kGuess || (phase == kStep && o.method.fsal);
  slopes(o, first, phase >= kDone ? 0 : phase == kStep ? stages : first + 1, phase == kGuess);
  if (phase >= kDone || (phase == kSlope && o.how.grid)) return;
  const auto start = [&](int row, int s) { return o.y[row * o.samples + s]; };
  if (phase == kSlope) norms(o, kNorms / 2, [&](int row, int s) { return o.slope(0, row, s); }, start);
  each(o.net, o.rows, [&](int row, int s) {
    T& end = o.ends[row * o.samples + s];
    end = start(row, s);
    if (phase == kStep) end += o.combine(stages, T(o.controls[s].h), o.coefficients(stages), row, s);
  });
  const auto end = [&](int row, int s) { return o.ends[row * o.samples + s]; };
  norms(
      o, 0,
      [&](int row, int s) {
        if (phase == kSlope) return double(start(row, s));
        if (phase == kGuess) return double(o.slope(1, row, s) - o.slope(0, row, s));
        double error = double(end(row, s) - end(row, s));  // 0, or not a number
        if (!o.how.grid)                                   // these nearly cancel
          for (int i = 0; i < stages; ++i)
            if (o.method.error[i] != 0) error += o.controls[s].h * o.method.error[i] * double(o.slope(i, row, s));
        return error;
      },
      end);
  const int s = int(threadIdx.x);
  if (phase == kSlope && s < o.samples) {  // is all finite?
    T sum = T(0);
    for (int row = 0; row < o.rows; ++row) {
      const T value = start(row, s), slope = o.slope(0, row, s);
      sum += (value - value) + (slope - slope);
    }
    if (!(sum == T(0))) o.sums[s * kNorms] = not_a_number<double>();
  }
}

// --- launches -----------------------------------------------------------------------------------------------

// The phase of the tile: all that are not through are in the same.
template <class T>
FF_D int64_t agree(const March<T>& o) {
  if (threadIdx.x == 0) {
    int64_t phase = kDone;
    for (int s = 0; s < o.samples; ++s)
      if (o.valid(s)) phase = smaller(phase, o.controls[s].phase);
    *o.phase = phase;
  }
  __syncthreads();
  return *o.phase;
}

// How a sample ended.
template <class T>
FF_D void report(const March<T>& o, const Control& c, int64_t b) {
  double* const status = reinterpret_cast<double*>(o.how.status) + b * 5;
  status[0] = double(c.phase), status[1] = c.t, status[2] = double(c.accepted + c.rejected + 1), status[3] = c.h;
}

FF_D void count(const Ode& o, const Control& c, int64_t number) {
  int64_t* const counts = reinterpret_cast<int64_t*>(o.counts) + number * 4;
  counts[0] = c.evaluations, counts[1] = c.accepted, counts[2] = c.rejected, counts[3] = c.spacing;
}

// Fixed steps, or control per sample: all steps of a tile.
template <class S>
FF_D void march(const S& o) {
  begin(o);
  const int s = int(threadIdx.x);
  const bool mine = s < o.samples, own = mine && o.begin + s < o.ode.controls;  // a controller of its own
  if (mine) o.controls[s].phase = kBegin;
  for (;;) {
    if (mine)
      decide(o.rules(), o.controls[s], o.verdicts[s], o.sums + s * kNorms, 1,
             own && o.ode.steps ? o.ode.step(0, o.begin + s) : nullptr);
    __syncthreads();
    const int64_t phase = agree(o);
    work(o, phase);
    if (phase >= kDone) break;
    __syncthreads();
  }
  if (own) count(o.ode, o.controls[s], o.begin + s);
  if (mine && o.valid(s)) report(o, o.controls[s], o.begin + s);
}

// What a launch leaves to the next: f(of the tile, of all)
template <class T, class F>
FF_D void each_state(const March<T>& o, const F& f) {
  T* const state = reinterpret_cast<T*>(o.how.state);
  each(o.net, o.rows * (2 + o.method.stages), [&](int i, int s) {
    const int of_slopes = i - 2 * o.rows, of_ends = i - o.rows;
    T& mine = (of_slopes >= 0 ? o.slopes + of_slopes * o.samples
               : of_ends >= 0 ? o.ends + of_ends * o.samples
                              : o.y + i * o.samples)[s];
    f(mine, state[i * o.ode.samples + o.global(s)], s);
  });
}

// Control by the whole batch, how far it was at the launch.
FF_D Control& kept(const StepControl& how, int64_t turn) { return reinterpret_cast<Control*>(how.control)[turn]; }

// Is all done? What follows is then left to the next launch.
FF_D bool through(const StepControl& how) {
  if (kept(how, how.turn).phase < kDone) return false;
  if (blockIdx.x == 0 && threadIdx.x == 0) kept(how, 1 - how.turn) = kept(how, how.turn);
  return true;
}

// Control by the whole batch: adds up all tiles and decides, every thread for a sample of the block's tiles, all alike.
template <class T>
FF_D void decide_together(const March<T>& o) {
  const StepControl& a = o.how;
  const double* const partial = reinterpret_cast<const double*>(a.partial) + a.turn * a.tiles * kNorms;
  const bool begins = kept(a, a.turn).phase == kBegin;  // there is nothing yet
  double total[kNorms];
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    double sum = 0;
    for (int64_t i = threadIdx.x; !begins && i < a.tiles; i += kThreads) sum += partial[i * kNorms + k];
    total[k] = team_sum(sum, kThreads, o.errors);
  }
  const int s = int(threadIdx.x);
  const bool first = blockIdx.x == 0 && s == 0;
  if (s < o.samples) {
    o.controls[s] = kept(a, a.turn);
    decide(o.rules(), o.controls[s], o.verdicts[s], total, o.ode.samples,
           first && o.ode.steps ? o.ode.step(0, 0) : nullptr);
  }
  if (first) kept(a, 1 - a.turn) = o.controls[s];
  if (first && o.controls[s].phase >= kDone) count(o.ode, o.controls[s], 0);
  __syncthreads();
}

// Control by the whole batch: a step of a tile.
template <class S>
FF_D void march_step(const S& o, int64_t tile) {
  const StepControl& a = o.how;
  const int s = int(threadIdx.x);
  begin(o);
  if (kept(a, a.turn).phase != kBegin) each_state(o, [](auto& mine, auto& state, int) { mine = state; });
  const int64_t phase = o.controls[0].phase;
  work(o, phase);
  if (phase >= kDone) {
    if (s < o.samples && o.valid(s)) report(o, o.controls[s], o.begin + s);
    return;
  }
  __syncthreads();
  each_state(o, [&](auto& mine, auto& state, int of) {
    if (o.valid(of)) state = mine;
  });
  if (s < o.samples && o.valid(s))  // whose error is the largest?
    reinterpret_cast<double*>(a.status)[(o.begin + s) * 5 + 4] = norm(o.sums + s * kNorms, 1, o.features);
  if (s < kNorms) {
    double sum = 0;
    for (int i = 0; i < o.samples; ++i)
      if (o.valid(i)) sum += o.sums[i * kNorms + s];
    reinterpret_cast<double*>(a.partial)[((1 - a.turn) * a.tiles + tile) * kNorms + s] = sum;
  }
}

}  // namespace fastflow
