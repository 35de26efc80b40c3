// The solve of dx/dt = f(x, t) for networks of any width, whose products are those of a library: what surrounds them.
// A turn evaluates stages, adds up what decides (ode_norms), decides (ode_decide), and takes the step or leaves it
// (ode_apply); when all is done a turn changes nothing. The state, its slopes and what a step ends in are flat:
// x [B, D], then traces [S, B], then energies [2, B]. fastflow/ops/ode_stages.py has the turns, the arguments are
// packed by fastflow/ops/cuda/ode_stages.py.
#include "ode_control.cuh"

namespace fastflow {

// out[b, d] = base[b, d] + sum_j weights[j] slopes[j, b, d]
struct Combine {
  char *base, *slopes, *weights;
  Matrix out;
  int64_t samples, width, count, stride;  // stride: from a slope to the next
};

template <class T>
FF_D void ode_combine(const Combine& a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.samples * a.width) return;
  const T *slopes = reinterpret_cast<const T*>(a.slopes) + i, *weights = reinterpret_cast<const T*>(a.weights);
  T sum = T(0);
  for (int64_t j = 0; j < a.count; ++j)
    if (weights[j] != T(0)) sum += weights[j] * slopes[j * a.stride];
  const int64_t b = quotient(i, a.width);
  a.out.at<T>(b, i - b * a.width) = reinterpret_cast<const T*>(a.base)[i] + sum;
}

struct Stages {
  int64_t samples, features, tangents, energies, size;  // size: of the flat state
  int64_t count, checkpoints, max_steps, blocks;        // count: of times to reach; blocks: of ode_norms
  char* tolerances;                                     // rtol, atol, and the weight of a probe in the norm
  char *method, *times, *grid;     // as Method.pack() has it; [1 + count]; of fixed steps: where they begin
  char *y, *ends, *slopes;         // [size], [size], [stages, size]
  char *nodes, *weights;           // [stages], [stages + 1, stages]: h a and h b, for the stages to come
  char *control, *verdict;         // struct Control, struct Verdict
  char *partial, *errors;          // [blocks, kNorms], [B]: the norm of every sample's own error
  char *values, *traces, *energy;  // [T, B, D], [T, S, B], [T, 2, B]
  char *steps, *counts, *states;   // [max_steps, 2], [4], [checkpoints, B, D]
};

template <class T>
struct State {
  const Stages& a;
  Tableau method;
  T *y, *ends, *slopes, *weights;

  FF_D explicit State(const Stages& given) : a(given), method(reinterpret_cast<const double*>(given.method)) {
    y = reinterpret_cast<T*>(a.y), ends = reinterpret_cast<T*>(a.ends);
    slopes = reinterpret_cast<T*>(a.slopes), weights = reinterpret_cast<T*>(a.weights);
  }
  FF_D T& slope(int stage, int64_t i) const { return slopes[stage * a.size + i]; }
};

// --- what decides -------------------------------------------------------------------------------------------

struct Quantities {
  double of_end, of_slope, from, to;  // what the norm is of, and the state that it is measured by
};

// At a place of the state, of which the end of the step is written too.
template <class T>
FF_D Quantities quantities(const State<T>& o, const Control& c, int64_t i) {
  const T y = o.y[i];
  const int s = o.method.stages;
  if (c.phase == kSlope) return {double(y), double(o.slope(0, i)), double(y), double(y)};
  if (c.phase == kGuess) return {double(o.slope(1, i) - o.slope(0, i)), 0, double(y), double(y)};
  T sum = T(0);
  for (int j = 0; j < s; ++j)
    if (o.weights[s * s + j] != T(0)) sum += o.weights[s * s + j] * o.slope(j, i);
  const T end = y + sum;
  o.ends[i] = end;
  double error = double(end - end);  // 0, or not a number
  if (!o.a.grid)                     // these nearly cancel
    for (int j = 0; j < s; ++j)
      if (o.method.error[j] != 0) error += c.h * o.method.error[j] * double(o.slope(j, i));
  return {error, 0, double(y), double(end)};
}

// Sums of squares of a block's samples, a warp for each sample.
template <class T>
FF_D void ode_norms(const Stages& a) {
  const Control& c = *reinterpret_cast<const Control*>(a.control);
  if (c.phase >= kDone) return;
  FF_SHARED(double, shared);
  const State<T> o(a);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t B = a.samples, b = int64_t(blockIdx.x) * (kThreads / 32) + warp;
  const bool valid = b < B;
  const double* const tolerances = reinterpret_cast<const double*>(a.tolerances);
  const double rtol = tolerances[0], atol = tolerances[1], w = tolerances[2];
  const auto scale = [&](double u, double v) { return atol + rtol * most(u < 0 ? -u : u, v < 0 ? -v : v); };
  double sums[kNorms] = {}, strange = 0;
  const auto add = [&](int which, const Quantities& q) {
    const double size = scale(q.from, q.to), first = over(q.of_end, size), second = over(q.of_slope, size);
    sums[which] += first * first, sums[kNorms / 2 + which] += second * second;
    strange += q.of_slope - q.of_slope;
  };
  Quantities trace = {0, 0, 0, 0};
  if (valid) {
    for (int64_t d = lane; d < a.features; d += 32) add(0, quantities(o, c, b * a.features + d));
    for (int64_t s = lane; s < a.tangents; s += 32) {
      const Quantities q = quantities(o, c, (a.features + s) * B + b);
      trace.of_end += q.of_end, trace.of_slope += q.of_slope, trace.from += q.from, trace.to += q.to;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (lane == 0 && e < a.energies) add(2 + e, quantities(o, c, (a.features + a.tangents + e) * B + b));
  }
  trace = {warp_sum(trace.of_end), warp_sum(trace.of_slope), warp_sum(trace.from), warp_sum(trace.to)};
  if (a.tangents && lane == 0) {
    add(1, {w * trace.of_end, w * trace.of_slope, double(T(w * trace.from)), double(T(w * trace.to))});
  }
#pragma unroll
  for (int k = 0; k < kNorms; ++k) sums[k] = warp_sum(sums[k]);
  strange = warp_sum(strange);
  if (strange != 0) sums[0] = strange;  // not a number: a slope is not finite
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kNorms; ++k) shared[warp * kNorms + k] = valid ? sums[k] : 0;
    if (valid) reinterpret_cast<double*>(a.errors)[b] = norm(sums, 1, int(a.features));
  }
  __syncthreads();
  if (threadIdx.x < kNorms) {
    double sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += shared[w * kNorms + threadIdx.x];
    reinterpret_cast<double*>(a.partial)[int64_t(blockIdx.x) * kNorms + threadIdx.x] = sum;
  }
}

// --- the decision, by one block -----------------------------------------------------------------------------

template <class T>
FF_D void ode_decide(const Stages& a) {
  FF_SHARED(double, shared);
  Control& kept = *reinterpret_cast<Control*>(a.control);
  const Tableau method(reinterpret_cast<const double*>(a.method));
  const double *times = reinterpret_cast<const double*>(a.times), *partial = reinterpret_cast<const double*>(a.partial);
  double total[kNorms] = {};
  const bool begins = kept.phase == kBegin;
  __syncthreads();  // all have read what a thread is going to write
  if (!begins)
#pragma unroll
    for (int k = 0; k < kNorms; ++k) {
      double sum = 0;
      for (int64_t i = threadIdx.x; i < a.blocks; i += kThreads) sum += partial[i * kNorms + k];
      total[k] = team_sum(sum, kThreads, shared);
    }
  if (threadIdx.x == 0) {
    Control c = kept;
    Verdict& verdict = *reinterpret_cast<Verdict*>(a.verdict);
    verdict = {0, 0, 0, 1, 1, -1, 0};
    if (c.phase < kDone) {
      const double sign = times[a.count] < times[0] ? -1 : 1;
      const Rules rules = {method,      times,           reinterpret_cast<const double*>(a.grid),
                           a.count,     a.checkpoints,   a.max_steps,
                           1,           int(a.features), sign,
                           epsilon<T>()};
      decide(rules, c, verdict, total, a.samples, reinterpret_cast<double*>(a.steps));
      int64_t* const counts = reinterpret_cast<int64_t*>(a.counts);
      counts[0] = c.evaluations, counts[1] = c.accepted, counts[2] = c.rejected, counts[3] = c.spacing;
    }
    kept = c;
  }
  __syncthreads();
  // the stages of the next turn; the guess is a step of Euler's method, to the second stage
  const double t = kept.t, h = kept.h;
  const bool guess = kept.phase == kGuess;
  const int s = method.stages, i = int(threadIdx.x);
  if (i < s) reinterpret_cast<T*>(a.nodes)[i] = T(t + (guess ? double(i > 0) : method.c[i]) * h);
  if (i < s * (s + 1)) reinterpret_cast<T*>(a.weights)[i] = T(h * (guess ? double(i == s) : method.a[i]));
}

// --- the step -----------------------------------------------------------------------------------------------

// The times that were reached, the state that is kept, and the new state.
template <class T>
FF_D void ode_apply(const Stages& a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, x = a.samples * a.features;
  if (i >= a.size) return;
  const Verdict& v = *reinterpret_cast<const Verdict*>(a.verdict);
  const State<T> o(a);
  const T y = o.y[i], end = v.accepted ? o.ends[i] : y;
  const int64_t to_energies = x + a.samples * a.tangents;
  for (int64_t time = v.first; time < v.last; ++time) {
    T value = end;
    const double theta = v.accepted ? (reinterpret_cast<const double*>(a.times)[time] - v.t) / v.h : 1;
    if (theta < 1) {
      T sum = T(0);
      for (int j = 0; j < o.method.stages; ++j) sum += T(v.h * o.method.dense(j, theta)) * o.slope(j, i);
      value = y + sum;
    }
    if (i < x)
      reinterpret_cast<T*>(a.values)[(time - 1) * x + i] = value;
    else if (i < to_energies)
      reinterpret_cast<T*>(a.traces)[(time - 1) * (to_energies - x) + i - x] = value;
    else
      reinterpret_cast<T*>(a.energy)[(time - 1) * (a.size - to_energies) + i - to_energies] = value;
  }
  if (v.accepted) {
    o.y[i] = end;
    if (o.method.fsal) o.slope(0, i) = o.slope(o.method.stages - 1, i);
  }
  if (i >= x) return;
  T* const kept = reinterpret_cast<T*>(a.states) + i;
  if (v.thinned)
    for (int64_t k = 1; 2 * k < a.checkpoints; ++k) kept[k * x] = kept[2 * k * x];
  if (v.slot >= 0) kept[v.slot * x] = end;
}

}  // namespace fastflow
