// The gradient of a solve by the continuous adjoint a = dL/dx, from one output to the one before it: another solve,
//
//   dx/dt = f,   da/dt = -(a, g) . d(f, rates of the integrals)/dx,   dL/dparams = integral of (a, g) . df/dparams dt
//
// with the gradients g of the integrals, which do not change in between. The parameters have no part in the control:
// their integral is taken over a step once it is accepted, for which the network goes through its stages once more. It
// is added up per block, launch after launch, and at the end a launch adds up the blocks in their order. The arguments
// are packed by fastflow/ops/cuda/ode_adjoint.py.
#include "march.cuh"

namespace fastflow {

struct AdjointPlaces {  // in shared memory, bytes
  int64_t params, times, input, kept, g, other, of_units, integrals, weights;
};

struct OdeAdjoint {
  Ode ode;  // its times: of the two outputs
  StepControl control;
  MarchPlaces march;
  AdjointPlaces places;
  Matrix x, a;      // x at the output; a there, and in the end at the one before
  char* integrals;  // [S + energies, B]: g
  char* partial;    // [blocks, parameters] of double
};

// The state is rows of x and of a.
template <class T>
struct Adjoint : March<T> {
  const OdeAdjoint& given;
  T *input, *kept, *g, *other, *of_units, *integrals, *weights;

  FF_D Adjoint(const OdeAdjoint& arguments, unsigned char* shared)
      : March<T>(arguments.ode, arguments.control, arguments.march,
                 net_tile<T>(arguments.ode.net, int(arguments.ode.tile), shared + arguments.places.params,
                             shared + arguments.places.times),
                 2 * int(arguments.ode.net.features), shared),
        given(arguments) {
    const AdjointPlaces& p = given.places;
    input = reinterpret_cast<T*>(shared + p.input), kept = reinterpret_cast<T*>(shared + p.kept);
    g = reinterpret_cast<T*>(shared + p.g), other = reinterpret_cast<T*>(shared + p.other);
    of_units = reinterpret_cast<T*>(shared + p.of_units), weights = reinterpret_cast<T*>(shared + p.weights);
    integrals = reinterpret_cast<T*>(shared + p.integrals);
  }
};

template <class T>
FF_D void begin(const Adjoint<T>& o) {
  load_probes(o.ode, o.net, o.begin, o.input);
  each(o.net, o.tangents + int(o.ode.energies), [&](int i, int s) {
    o.integrals[i * o.samples + s] = reinterpret_cast<const T*>(o.given.integrals)[i * o.ode.samples + o.global(s)];
  });
  each(o.net, o.rows, [&](int row, int s) {
    const Matrix& from = row < o.features ? o.given.x : o.given.a;
    o.y[row * o.samples + s] = from.at<T>(o.global(s), row % o.features);
  });
}

// x at a stage of the step from t becomes the network's input, a the gradient of its value.
template <class T>
FF_D void enter(const Adjoint<T>& o, int row, int s, int stage, const T* weights, double node, double t, double h) {
  T value = o.y[row * o.samples + s];
  if (h != 0)
    value += o.combine(stage, T(h), weights, row, s);  // of a step that was refused anything may be in the slopes
  if (row < o.features)
    o.net.at(o.input, row, 0, s) = value;
  else
    o.net.at(o.g, row - o.features, 0, s) = value;
  if (row == 0) o.net.times[s] = T(t + node * h);
}

// Through the network and back, for what was entered: `value` is where f is, the first row of its last layer. Returns
// where (a, g) . df/dx is, that of the samples times their weights where there are any; with it (a, g) . df/dparams is
// added to `sums` where these are given.
template <class T>
FF_D const T* pull(const Adjoint<T>& o, const T* weights, const T*& value, double* sums) {
  T* const out = net_keep(o.net, o.tangents, o.input, o.kept);
  const int D = o.features, S = o.tangents;
  const T twice = T(-2 * o.sign);  // the energies grow with |dt|, and time runs back here
  each(o.net, D * (1 + S), [&](int i, int s) {
    const int r = i / D, d = i - r * D;
    const T* const of = o.integrals + s;
    T& g = o.net.at(o.g, d, r, s);
    T sum = r == 0 ? g : of[(r - 1) * o.samples] * o.net.at(o.input, d, r, s);
    if (o.ode.energies) {
      const T weight = r == 0 ? T(1) : o.ode.template weight_of_probes<T>();
      sum += twice * weight * of[(S + (r > 0)) * o.samples] * o.net.at(out, d, r, s);
    }
    g = weights ? weights[s] * sum : sum;
  });
  value = out;
  return net_bwd(o.net, o.input, o.kept, o.g, o.other, o.of_units, sums);
}

template <class T>
FF_D void evaluate(const Adjoint<T>& o, int stage, const T* weights, double node) {
  each(o.net, o.rows, [&](int row, int s) {
    const Control& c = o.controls[s];
    enter(o, row, s, stage, weights, node, c.t, c.h);
  });
  const T* value;
  const T* const gradient = pull(o, static_cast<const T*>(nullptr), value, static_cast<double*>(nullptr));
  each(o.net, o.rows, [&](int row, int s) {
    o.slope(stage, row, s) =
        row < o.features ? value[row * o.net.stride + s] : -gradient[(row - o.features) * o.net.stride + s];
  });
}

template <class T>
FF_D bool squared(const Adjoint<T>&, int) {
  return true;
}

// x and a
template <class T, class O>
FF_D void add_up(const Adjoint<T>& o, int s, const O&, double* sums) {
  double of_x = 0, of_a = 0;
  for (int row = 0; row < o.features; ++row)
    of_x += o.errors[row * o.samples + s], of_a += o.errors[(o.features + row) * o.samples + s];
  sums[0] = of_x / double(o.features), sums[1] = of_a / double(o.features), sums[2] = sums[3] = 0;
}

// The parameters' integral over the steps that were accepted.
template <class T>
FF_D void integrate(const Adjoint<T>& o) {
  double* const sums = reinterpret_cast<double*>(o.given.partial) + int64_t(blockIdx.x) * o.ode.net.size;
  const double end = o.ode.time(1);
  each(o.net, o.method.stages, [&](int stage, int s) {
    const Verdict& v = o.verdicts[s];
    T weight = T(0);
    if (v.accepted && o.valid(s)) weight = T(-v.h * o.method.dense(stage, v.last > v.first ? o.part(s, end) : 1));
    o.weights[stage * o.samples + s] = weight;
  });
  for (int stage = 0; stage < o.method.stages; ++stage) {
    const T* const weights = o.weights + stage * o.samples;
    bool any = false;  // all threads find it alike
    for (int s = 0; s < o.samples; ++s) any |= weights[s] != T(0);
    if (!any) continue;
    each(o.net, o.rows, [&](int row, int s) {
      const Verdict& v = o.verdicts[s];
      enter(o, row, s, stage, o.coefficients(stage), o.method.c[stage], v.accepted ? v.t : o.controls[s].t,
            v.accepted ? v.h : 0);
    });
    const T* value;
    pull(o, weights, value, sums);
  }
}

template <class T>
FF_D void apply(const Adjoint<T>& o) {
  integrate(o);
  each(o.net, o.rows, [&](int row, int s) {
    const Verdict& v = o.verdicts[s];
    if (row >= o.features && v.last > v.first && o.valid(s))
      o.given.a.template at<T>(o.global(s), row - o.features) = o.at(o.ode.time(1), row, s);
    advance(o, row, s);
  });
}

template <class T>
FF_D void ode_adjoint_solve(const OdeAdjoint& a) {
  FF_SHARED(unsigned char, shared);
  Adjoint<T> o(a, shared);
  march(o);
}

template <class T>
FF_D void ode_adjoint_step(const OdeAdjoint& a) {
  if (through(a.control)) return;
  FF_SHARED(unsigned char, shared);
  Adjoint<T> o(a, shared);
  march_step(o);
}

}  // namespace fastflow
