// The solve of dx/dt = f(x, t) with the integrals of its trace and energies, f an MLP: a block takes a tile of samples
// through all stages of a step, all it knows of them in shared memory. With fixed steps or control per sample it goes
// through all steps; where the whole batch decides on a step, a launch takes one, and every block adds up what all left
// of the launch before, in the same order, so that all decide alike. Nothing waits for the host.
// The arguments are packed by fastflow/ops/cuda/ode.py.
#include "ode.cuh"
#include "ode_control.cuh"

namespace fastflow {

struct ForwardPlaces {  // in shared memory, bytes
  int64_t params, times, input, first, second, y, ends, slopes, squares, table, errors, sums, controls, verdicts, phase;
};

struct OdeForward {
  Ode ode;
  ForwardPlaces places;
  double rtol, atol;
  int64_t adaptive, max_steps;
  char* grid;  // of fixed steps: where they begin and end
  Matrix x;
  char *values, *traces, *energies;  // [T, B, D], [T, S, B], [T, 2, B]
  char* status;                      // [B, 5]: phase at the end, t, attempt, h, error
  char *state, *control, *partial;   // of the whole batch: what a launch leaves to the next
  int64_t blocks, turn;              // turn: 0 or 1, a launch reads what the other has written
};

// The state is rows of D values, S traces and the energies.
template <class T>
struct Solve {
  const OdeForward& a;
  NetTile<T> net;
  Tableau method;
  T *input, *first, *second, *y, *ends, *slopes, *squares, *table;
  double *errors, *sums;
  Control* controls;
  Verdict* verdicts;
  int64_t* phase;                                 // of the tile
  int features, tangents, rows, samples, number;  // number: of sums of a sample
  int64_t begin;
  double sign;  // of time

  FF_D explicit Solve(const OdeForward& given, unsigned char* shared)
      : a(given),
        net(net_tile<T>(given.ode.net, int(given.ode.tile), shared + given.places.params, shared + given.places.times)),
        method(reinterpret_cast<const double*>(given.ode.method)) {
    const ForwardPlaces& p = a.places;
    input = reinterpret_cast<T*>(shared + p.input);
    first = reinterpret_cast<T*>(shared + p.first), second = reinterpret_cast<T*>(shared + p.second);
    y = reinterpret_cast<T*>(shared + p.y), ends = reinterpret_cast<T*>(shared + p.ends);
    slopes = reinterpret_cast<T*>(shared + p.slopes), squares = reinterpret_cast<T*>(shared + p.squares);
    table = reinterpret_cast<T*>(shared + p.table);
    errors = reinterpret_cast<double*>(shared + p.errors), sums = reinterpret_cast<double*>(shared + p.sums);
    controls = reinterpret_cast<Control*>(shared + p.controls);
    verdicts = reinterpret_cast<Verdict*>(shared + p.verdicts);
    phase = reinterpret_cast<int64_t*>(shared + p.phase);
    features = int(a.ode.net.features), tangents = int(a.ode.net.tangents), samples = int(a.ode.tile);
    rows = features + tangents + int(a.ode.energies);
    begin = int64_t(blockIdx.x) * samples;
    sign = a.ode.time(a.ode.count) < a.ode.time(0) ? -1 : 1;
    // a and b in T, and the one weight of an Euler step
    const int n = method.stages * (method.stages + 1);
    for (int i = threadIdx.x; i <= n; i += kThreads) table[i] = i < n ? T(method.a[i]) : T(1);
  }
  FF_D int64_t global(int s) const { return smaller(begin + s, a.ode.samples - 1); }
  FF_D bool valid(int s) const { return begin + s < a.ode.samples; }
  FF_D T& slope(int stage, int row, int s) const { return slopes[(stage * rows + row) * samples + s]; }
  FF_D Rules rules() const {
    const auto doubles = [](char* data) { return reinterpret_cast<const double*>(data); };
    return {method,      doubles(a.ode.times), doubles(a.grid), a.ode.count, a.ode.checkpoints,
            a.max_steps, a.ode.controls,       features,        sign,        epsilon<T>()};
  }
  // h sum_i weights[i] slope(i)
  FF_D T combine(int stages, T h, const T* weights, int row, int s) const {
    T sum = T(0);
    for (int i = 0; i < stages; ++i)
      if (weights[i] != T(0)) sum += weights[i] * slope(i, row, s);
    return h * sum;
  }
};

// --- the arithmetic of a step -----------------------------------------------------------------------------

// slope(stage) = f and what is integrated with it, at t + node h and y + h sum_j weights[j] slope(j)
template <class T>
FF_D void evaluate(const Solve<T>& o, int stage, const T* weights, double node) {
  each(o.net, o.features, [&](int d, int s) {
    const Control& c = o.controls[s];
    o.net.at(o.input, d, 0, s) = o.y[d * o.samples + s] + o.combine(stage, T(c.h), weights, d, s);
    if (d == 0) o.net.times[s] = T(c.t + node * c.h);
  });
  T* const out = net_fwd(o.net, o.tangents, o.input, o.first, o.second);
  each(o.net, 1 + o.tangents, [&](int r, int s) {
    T sum = T(0), square = T(0);
    for (int d = 0; d < o.features; ++d) {
      const T value = o.net.at(out, d, r, s);
      if (r == 0)
        o.slope(stage, d, s) = value;
      else
        sum += value * o.net.at(o.input, d, r, s);
      square += value * value;
    }
    if (r > 0) o.slope(stage, o.features + r - 1, s) = sum;
    o.squares[r * o.samples + s] = square;
  });
  if (o.a.ode.energies)
    each(o.net, 1, [&](int, int s) {
      T sum = T(0);
      for (int r = 1; r <= o.tangents; ++r) sum += o.squares[r * o.samples + s];
      if (o.tangents) sum *= o.a.ode.template weight_of_probes<T>();
      o.slope(stage, o.features + o.tangents, s) = T(o.sign) * o.squares[s];
      o.slope(stage, o.features + o.tangents + 1, s) = T(o.sign) * sum;
    });
}

// From `which` on of the sums of a sample: squares of quantity(row, s) over the tolerance for y and other(row, s)
template <class T, class Q, class O>
FF_D void norms(const Solve<T>& o, int which, const Q& quantity, const O& other) {
  const double rtol = o.a.rtol, atol = o.a.atol;
  const auto scale = [&](T u, T v) { return atol + rtol * most(double(abs(u)), double(abs(v))); };
  each(o.net, o.rows, [&](int row, int s) {
    const double e = quantity(row, s), error = over(e, scale(o.y[row * o.samples + s], other(row, s)));
    o.errors[row * o.samples + s] = row < o.features || row >= o.features + o.tangents ? error * error : e;
  });
  each(o.net, 1, [&](int, int s) {
    double* const sums = o.sums + s * kNorms + which;
    double of_value = 0, of_trace = 0, from = 0, to = 0;
    for (int d = 0; d < o.features; ++d) of_value += o.errors[d * o.samples + s];
    for (int row = o.features; row < o.features + o.tangents; ++row) {
      of_trace += o.errors[row * o.samples + s];
      from += double(o.y[row * o.samples + s]), to += double(other(row, s));
    }
    if (o.tangents) {
      const double weight = o.a.ode.template weight_of_probes<double>();
      of_trace = over(weight * of_trace, scale(T(weight * from), T(weight * to)));
    }
    sums[0] = of_value, sums[1] = of_trace * of_trace, sums[2] = sums[3] = 0;
    for (int e = 0; e < int(o.a.ode.energies); ++e)
      sums[2 + e] = o.errors[(o.features + o.tangents + e) * o.samples + s];
  });
}

// The times that were reached, the state that is kept, and the new state.
template <class T>
FF_D void apply(const Solve<T>& o) {
  const OdeForward& a = o.a;
  const int64_t B = a.ode.samples, D = o.features, S = o.tangents;
  each(o.net, o.rows, [&](int row, int s) {
    const Verdict& v = o.verdicts[s];
    T& y = o.y[row * o.samples + s];
    const T end = v.accepted ? o.ends[row * o.samples + s] : y;
    const int64_t b = o.begin + s;
    if (o.valid(s))
      for (int64_t i = v.first; i < v.last; ++i) {
        T value = end;
        const double theta = v.accepted ? (a.ode.time(i) - v.t) / v.h : 1;
        if (theta < 1) {
          value = y;
          for (int j = 0; j < o.method.stages; ++j) value += T(v.h * o.method.dense(j, theta)) * o.slope(j, row, s);
        }
        if (row < D)
          reinterpret_cast<T*>(a.values)[((i - 1) * B + b) * D + row] = value;
        else if (row < D + S)
          reinterpret_cast<T*>(a.traces)[((i - 1) * S + row - D) * B + b] = value;
        else
          reinterpret_cast<T*>(a.energies)[((i - 1) * 2 + row - D - S) * B + b] = value;
      }
    y = end;
    if (v.accepted && o.method.fsal) o.slope(0, row, s) = o.slope(o.method.stages - 1, row, s);
    if (row < D && o.valid(s)) {
      T* const kept = reinterpret_cast<T*>(a.ode.states) + b * D + row;
      if (v.thinned)
        for (int64_t i = 1; 2 * i < a.ode.checkpoints; ++i) kept[i * B * D] = kept[2 * i * B * D];
      if (v.slot >= 0) kept[v.slot * B * D] = end;
    }
  });
}

// A turn of the tile: slopes, and the sums that decide.
template <class T>
FF_D void work(const Solve<T>& o, int64_t phase) {
  const int stages = o.method.stages;
  const T *const of_end = o.table + stages * stages, *const one = of_end + stages;
  const int first = phase == kGuess || (phase == kStep && o.method.fsal);
  for (int i = first; i < (phase == kStep ? stages : first + 1); ++i)
    evaluate(o, i, phase == kGuess ? one : o.table + i * stages, phase == kGuess ? 1 : o.method.c[i]);
  if (phase == kSlope && !o.a.adaptive) return;
  const auto start = [&](int row, int s) { return o.y[row * o.samples + s]; };
  if (phase == kSlope) norms(o, kNorms / 2, [&](int row, int s) { return o.slope(0, row, s); }, start);
  each(o.net, o.rows, [&](int row, int s) {
    T& end = o.ends[row * o.samples + s];
    end = start(row, s);
    if (phase == kStep) end += o.combine(stages, T(o.controls[s].h), of_end, row, s);
  });
  const auto end = [&](int row, int s) { return o.ends[row * o.samples + s]; };
  norms(
      o, 0,
      [&](int row, int s) {
        if (phase == kSlope) return double(start(row, s));
        if (phase == kGuess) return double(o.slope(1, row, s) - o.slope(0, row, s));
        double error = double(end(row, s) - end(row, s));  // 0, or not a number
        if (o.a.adaptive)                                  // these nearly cancel
          for (int i = 0; i < stages; ++i)
            if (o.method.error[i] != 0) error += o.controls[s].h * o.method.error[i] * double(o.slope(i, row, s));
        return error;
      },
      end);
  const int s = int(threadIdx.x);
  if (phase == kSlope && s < o.samples) {  // is all finite?
    T sum = T(0);
    for (int row = 0; row < o.rows; ++row) sum += o.slope(0, row, s) - o.slope(0, row, s);
    if (!(sum == T(0))) o.sums[s * kNorms] = not_a_number<double>();
  }
}

// --- launches -----------------------------------------------------------------------------------------------

// The phase of the tile: all that are not through are in the same.
template <class T>
FF_D int64_t agree(const Solve<T>& o) {
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
FF_D void report(const Solve<T>& o, const Control& c, int64_t b) {
  double* const status = reinterpret_cast<double*>(o.a.status) + b * 5;
  status[0] = double(c.phase), status[1] = c.t, status[2] = double(c.accepted + c.rejected + 1), status[3] = c.h;
}

FF_D void count(const Ode& o, const Control& c, int64_t number) {
  int64_t* const counts = reinterpret_cast<int64_t*>(o.counts) + number * 4;
  counts[0] = c.evaluations, counts[1] = c.accepted, counts[2] = c.rejected, counts[3] = c.spacing;
}

template <class T>
FF_D void begin(const Solve<T>& o) {
  load_probes(o.a.ode, o.net, o.begin, o.input);
  each(o.net, o.rows, [&](int row, int s) {
    o.y[row * o.samples + s] = row < o.features ? o.a.x.template at<T>(o.global(s), row) : T(0);
  });
}

// Fixed steps, or control per sample: all steps.
template <class T>
FF_D void ode_solve(const OdeForward& a) {
  FF_SHARED(unsigned char, shared);
  const Solve<T> o(a, shared);
  begin(o);
  const int s = int(threadIdx.x);
  const bool mine = s < o.samples, writes = mine && o.begin + s < a.ode.controls;
  if (mine) o.controls[s].phase = kBegin;
  for (;;) {
    if (mine)
      decide(o.rules(), o.controls[s], o.verdicts[s], o.sums + s * kNorms, 1,
             writes ? a.ode.step(0, o.begin + s) : nullptr);
    __syncthreads();
    apply(o);
    const int64_t phase = agree(o);
    if (phase >= kDone) break;
    work(o, phase);
    __syncthreads();
  }
  if (writes) count(a.ode, o.controls[s], o.begin + s);
  if (mine && o.valid(s)) report(o, o.controls[s], o.begin + s);
}

// What a launch leaves to the next: f(of the tile, of all)
template <class T, class F>
FF_D void each_state(const Solve<T>& o, const F& f) {
  T* const state = reinterpret_cast<T*>(o.a.state);
  each(o.net, o.rows * (2 + o.method.stages), [&](int i, int s) {
    const int of_slopes = i - 2 * o.rows, of_ends = i - o.rows;
    T& mine = (of_slopes >= 0 ? o.slopes + of_slopes * o.samples
               : of_ends >= 0 ? o.ends + of_ends * o.samples
                              : o.y + i * o.samples)[s];
    f(mine, state[i * o.a.ode.samples + o.global(s)], s);
  });
}

// Control by the whole batch: a step.
template <class T>
FF_D void ode_step(const OdeForward& a) {
  FF_SHARED(unsigned char, shared);
  Control* const kept = reinterpret_cast<Control*>(a.control);
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  if (kept[a.turn].phase >= kDone) {  // for the launches that follow
    if (first) kept[1 - a.turn] = kept[a.turn];
    return;
  }
  const Solve<T> o(a, shared);
  begin(o);
  double total[kNorms] = {};
  if (kept[a.turn].phase != kBegin) {
    each_state(o, [](T& mine, T& state, int) { mine = state; });
    const double* partial = reinterpret_cast<const double*>(a.partial) + a.turn * a.blocks * kNorms;
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      double sum = 0;
      for (int64_t i = threadIdx.x; i < a.blocks; i += kThreads) sum += partial[i * kNorms + k];
      total[k] = team_sum(sum, kThreads, o.errors);
    }
  }
  const int s = int(threadIdx.x);
  if (s < o.samples) {  // each for itself, all the same
    o.controls[s] = kept[a.turn];
    decide(o.rules(), o.controls[s], o.verdicts[s], total, a.ode.samples, first ? a.ode.step(0, 0) : nullptr);
    if (first) kept[1 - a.turn] = o.controls[s];
  }
  __syncthreads();
  apply(o);
  const int64_t phase = agree(o);
  if (phase >= kDone) {
    if (first) count(a.ode, o.controls[s], 0);
    if (s < o.samples && o.valid(s)) report(o, o.controls[s], o.begin + s);
    return;
  }
  work(o, phase);
  __syncthreads();
  each_state(o, [&](T& mine, T& state, int of) {
    if (o.valid(of)) state = mine;
  });
  if (s < o.samples && o.valid(s))  // whose error is the largest?
    reinterpret_cast<double*>(a.status)[(o.begin + s) * 5 + 4] = norm(o.sums + s * kNorms, 1, o.features);
  if (s < kNorms) {
    double sum = 0;
    for (int i = 0; i < o.samples; ++i)
      if (o.valid(i)) sum += o.sums[i * kNorms + s];
    reinterpret_cast<double*>(a.partial)[((1 - a.turn) * a.blocks + blockIdx.x) * kNorms + s] = sum;
  }
}

}  // namespace fastflow
