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
  int64_t blocks;
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

template <class T>
FF_D bool squared(const Adjoint<T>&, int) {
  return true;
}

// Of x and of a, the second over its number as no other part has more than one.
template <class T, class O>
FF_D void add_up(const Adjoint<T>& o, int s, const O&, double* sums) {
  double of_x = 0, of_a = 0;
  for (int row = 0; row < o.features; ++row)
    of_x += o.errors[row * o.samples + s], of_a += o.errors[(o.features + row) * o.samples + s];
  sums[0] = of_x, sums[1] = of_a / double(o.features), sums[2] = sums[3] = 0;
}

// What (a, g) at the stages of the step count for in the parameters' integral: nothing where it was not accepted.
template <class T>
FF_D void weigh(const Adjoint<T>& o) {
  each(o.net, o.method.stages, [&](int stage, int s) {
    const Verdict& v = o.verdicts[s];
    const double theta = v.last > v.first ? o.part(s, o.ode.time(1)) : 1;
    o.weights[stage * o.samples + s] = v.accepted && o.valid(s) ? T(-v.h * o.method.dense(stage, theta)) : T(0);
  });
}

// Does the stage count for anything in the tile?
template <class T>
FF_D bool counts(const Adjoint<T>& o, int stage) {
  bool any = false;
  for (int s = 0; s < o.samples; ++s) any |= o.weights[stage * o.samples + s] != T(0);
  return any;
}

// a where the other output was reached, and the new state.
template <class T>
FF_D void apply(const Adjoint<T>& o) {
  each(o.net, o.rows, [&](int row, int s) {
    const Verdict& v = o.verdicts[s];
    if (row >= o.features && v.last > v.first && o.valid(s))
      o.given.a.template at<T>(o.global(s), row - o.features) = o.at(o.ode.time(1), row, s);
    advance(o, row, s);
  });
}

// x at a stage of the step h from t becomes the network's input, a the gradient of its value.
template <class T>
FF_D void enter(const Adjoint<T>& o, int row, int s, int stage, const T* weights, double t, double h) {
  T value = o.y[row * o.samples + s];
  if (h != 0) value += o.combine(stage, T(h), weights, row, s);
  if (row < o.features)
    o.net.at(o.input, row, 0, s) = value;
  else
    o.net.at(o.g, row - o.features, 0, s) = value;
  if (row == 0) o.net.times[s] = T(t);
}

// The gradient (a, g) of the last layer's rows `out`, times the samples' weights where there are any.
template <class T>
FF_D void seed(const Adjoint<T>& o, const T* weights, T* out) {
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
}

// Through the stages of the step that was accepted, for the parameters, and then through those of the next one.
template <class T>
FF_D void slopes(const Adjoint<T>& o, int first, int last, bool guess) {
  const int stages = o.method.stages;
  weigh(o);
  for (int i = -stages; i <= last; ++i) {
    if (i == 0) apply(o);
    const bool integrates = i < 0;
    const int stage = integrates ? i + stages : i;
    if (integrates ? !counts(o, stage) : i == last || i < first) continue;
    each(o.net, o.rows, [&](int row, int s) {
      const Control& c = o.controls[s];
      const Verdict& v = o.verdicts[s];
      const bool moved = integrates && v.accepted;  // else anything may be in the slopes
      const bool trial = guess && !integrates;
      const double t = moved ? v.t : c.t, h = moved ? v.h : integrates ? 0 : c.h;
      enter(o, row, s, stage, o.coefficients(trial ? stages + 1 : stage), t + (trial ? 1 : o.method.c[stage]) * h, h);
    });
    T* const out = net_keep(o.net, o.tangents, o.input, o.kept);
    seed(o, integrates ? o.weights + stage * o.samples : nullptr, out);
    double* const shares = reinterpret_cast<double*>(o.given.partial) + int64_t(blockIdx.x) * o.ode.net.size;
    const T* const found = net_bwd(o.net, o.input, o.kept, o.g, o.other, o.of_units, integrates ? shares : nullptr);
    if (integrates) continue;
    each(o.net, o.rows, [&](int row, int s) {
      o.slope(stage, row, s) =
          row < o.features ? out[row * o.net.stride + s] : -found[(row - o.features) * o.net.stride + s];
    });
  }
}

template <class T>
FF_D void ode_adjoint_solve(const OdeAdjoint& a) {
  FF_SHARED(unsigned char, shared);
  Adjoint<T> o(a, shared);
  for (int64_t tile = blockIdx.x; tile < a.control.tiles; tile += a.blocks) {
    o.begin = tile * o.samples;
    march(o);
  }
}

template <class T>
FF_D void ode_adjoint_step(const OdeAdjoint& a) {
  if (through(a.control)) return;
  FF_SHARED(unsigned char, shared);
  Adjoint<T> o(a, shared);
  decide_together(o);
  for (int64_t tile = blockIdx.x; tile < a.control.tiles; tile += a.blocks) {
    o.begin = tile * o.samples;
    march_step(o, tile);
  }
}

}  // namespace fastflow
