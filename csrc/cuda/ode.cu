// The solve of dx/dt = f(x, t) with the integrals of its trace and energies, f an MLP: a block takes a tile of samples
// through all stages of a step, all it knows of them in shared memory.
// The arguments are packed by fastflow/ops/cuda/ode.py.
#include "march.cuh"

namespace fastflow {

struct ForwardPlaces {  // in shared memory, bytes
  int64_t params, times, input, first, second, squares;
};

struct OdeForward {
  Ode ode;
  StepControl control;
  MarchPlaces march;
  ForwardPlaces places;
  Matrix x;
  char *values, *traces, *energies;  // [T, B, D], [T, S, B], [T, 2, B]
};

// The state is rows of D values, S traces and the energies.
template <class T>
struct Solve : March<T> {
  const OdeForward& a;
  T *input, *first, *second, *squares;

  FF_D Solve(const OdeForward& given, unsigned char* shared)
      : March<T>(
            given.ode, given.control, given.march,
            net_tile<T>(given.ode.net, int(given.ode.tile), shared + given.places.params, shared + given.places.times),
            int(given.ode.net.features + given.ode.net.tangents + given.ode.energies), shared),
        a(given) {
    input = reinterpret_cast<T*>(shared + a.places.input), squares = reinterpret_cast<T*>(shared + a.places.squares);
    first = reinterpret_cast<T*>(shared + a.places.first), second = reinterpret_cast<T*>(shared + a.places.second);
  }
};

template <class T>
FF_D void begin(const Solve<T>& o) {
  load_probes(o.ode, o.net, o.begin, o.input);
  each(o.net, o.rows, [&](int row, int s) {
    o.y[row * o.samples + s] = row < o.features ? o.a.x.template at<T>(o.global(s), row) : T(0);
  });
}

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
  if (o.ode.energies)
    each(o.net, 1, [&](int, int s) {
      T sum = T(0);
      for (int r = 1; r <= o.tangents; ++r) sum += o.squares[r * o.samples + s];
      if (o.tangents) sum *= o.ode.template weight_of_probes<T>();
      o.slope(stage, o.features + o.tangents, s) = T(o.sign) * o.squares[s];
      o.slope(stage, o.features + o.tangents + 1, s) = T(o.sign) * sum;
    });
}

template <class T>
FF_D bool squared(const Solve<T>& o, int row) {
  return row < o.features || row >= o.features + o.tangents;
}

// Of the value, the trace and the two energies.
template <class T, class O>
FF_D void add_up(const Solve<T>& o, int s, const O& other, double* sums) {
  double of_value = 0, of_trace = 0, from = 0, to = 0;
  for (int d = 0; d < o.features; ++d) of_value += o.errors[d * o.samples + s];
  for (int row = o.features; row < o.features + o.tangents; ++row) {
    of_trace += o.errors[row * o.samples + s];
    from += double(o.y[row * o.samples + s]), to += double(other(row, s));
  }
  if (o.tangents) {
    const double weight = o.ode.template weight_of_probes<double>();
    of_trace = over(weight * of_trace, o.scale(T(weight * from), T(weight * to)));
  }
  sums[0] = of_value, sums[1] = of_trace * of_trace, sums[2] = sums[3] = 0;
  for (int e = 0; e < int(o.ode.energies); ++e) sums[2 + e] = o.errors[(o.features + o.tangents + e) * o.samples + s];
}

// The times that were reached, the state that is kept, and the new state.
template <class T>
FF_D void apply(const Solve<T>& o) {
  const OdeForward& a = o.a;
  const int64_t B = a.ode.samples, D = o.features, S = o.tangents;
  each(o.net, o.rows, [&](int row, int s) {
    const Verdict& v = o.verdicts[s];
    const int64_t b = o.begin + s;
    for (int64_t i = v.first; i < v.last && o.valid(s); ++i) {
      const T value = o.at(a.ode.time(i), row, s);
      if (row < D)
        reinterpret_cast<T*>(a.values)[((i - 1) * B + b) * D + row] = value;
      else if (row < D + S)
        reinterpret_cast<T*>(a.traces)[((i - 1) * S + row - D) * B + b] = value;
      else
        reinterpret_cast<T*>(a.energies)[((i - 1) * 2 + row - D - S) * B + b] = value;
    }
    advance(o, row, s);
    if (row < D && o.valid(s)) {
      T* const kept = reinterpret_cast<T*>(a.ode.states) + b * D + row;
      if (v.thinned)
        for (int64_t i = 1; 2 * i < a.ode.checkpoints; ++i) kept[i * B * D] = kept[2 * i * B * D];
      if (v.slot >= 0) kept[v.slot * B * D] = o.y[row * o.samples + s];
    }
  });
}

template <class T>
FF_D void slopes(const Solve<T>& o, int first, int last, bool guess) {
  apply(o);
  for (int i = first; i < last; ++i)
    evaluate(o, i, o.coefficients(guess ? o.method.stages + 1 : i), guess ? 1 : o.method.c[i]);
}

template <class T>
FF_D void ode_solve(const OdeForward& a) {
  FF_SHARED(unsigned char, shared);
  march(Solve<T>(a, shared));
}

template <class T>
FF_D void ode_step(const OdeForward& a) {
  if (through(a.control)) return;
  FF_SHARED(unsigned char, shared);
  const Solve<T> o(a, shared);
  decide_together(o);
  march_step(o, blockIdx.x);
}

}  // namespace fastflow
