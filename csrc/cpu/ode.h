// What the solve of ode.cpp and its gradients in ode_backward.cpp and ode_adjoint.cpp share: the problem as Python
// gives it, and f on a block.
#pragma once

#include "march.h"

namespace fastflow {

template <class T>
struct Problem {
  const View &x, &probes;
  std::vector<double> times, flat;
  Tableau method;
  Control control;
  Dynamics<T> net;
  int64_t samples, features, tangents, quadratures, block;
  double direction;

  Problem(const View& x, const View& time, const View& given, const std::vector<View>& raw,
          const std::vector<double>& packed, int layer, const std::vector<double>& options, bool backward)
      : x(x),
        probes(given),
        flat(packed),
        method(flat.data()),
        control(options),
        net(x.size[1], given ? given.size[0] : 0, raw, layer, backward),
        samples(x.size[0]),
        features(x.size[1]),
        tangents(net.tangents),
        quadratures(tangents + 2 * control.regularize),
        block(net.block(samples)) {
    if (method.stages > Tableau::max_stages || int(flat.size()) != Tableau::length(method.stages))
      throw std::invalid_argument("the method's numbers are not those of Method.pack()");
    for (int64_t i = 0; i < time.size[0]; ++i) times.push_back(at<double>(time, i));
    direction = times.back() >= times.front() ? 1 : -1;
  }
  int64_t blocks() const { return (samples + block - 1) / block; }
  int64_t count(int64_t k) const { return std::min(block, samples - k * block); }
  // mean or sum of |J e|^2
  T share() const { return control.exact || !tangents ? T(1) : T(1) / T(tangents); }
  // of time, for the energies: they grow either way
  T sign() const { return T(direction); }
};

// Buffers of a thread, for values with tangents of the largest block.
template <class T>
struct Scratch {
  Moments<T> now;
  Memory<T> memory;
  T* buffers[3];

  explicit Scratch(const Problem<T>& p)
      : now(p.net, p.control.per_sample ? p.block : 1), memory(allocate<T>(3 * p.block * p.net.rows * p.net.widest)) {
    for (int i = 0; i < 3; ++i) buffers[i] = memory.get() + i * p.block * p.net.rows * p.net.widest;
  }
  // gates and drifts at t + fraction h
  void at(const Problem<T>& p, const Block<T>& block, const Controller* c, int each, double fraction) {
    for (int64_t b = 0; b < (each ? block.count : 1); ++b) now.set(p.net, b, T(c[b].t + fraction * c[b].h));
  }
};

// the probes [count, 1 + S, D] of a block, beside room for x
template <class T>
void take_probes(const Problem<T>& p, Block<T>& block) {
  T* to = block.probes;
  for (int64_t b = block.first; b < block.first + block.count; ++b) {
    to += p.features;
    for (int64_t s = 0; s < p.tangents; ++s)
      for (int64_t d = 0; d < p.features; ++d) *to++ = at<T>(p.probes, s, b, d);
  }
}

// x into its place between the probes; without tangents x as it is
template <class T>
const T* with_probes(const Problem<T>& p, Block<T>& block, int64_t tangents, const T* x) {
  if (!tangents) return x;
  for (int64_t b = 0; b < block.count; ++b)
    std::copy_n(x + b * p.features, p.features, block.probes + b * p.net.rows * p.features);
  return block.probes;
}

// k = [f(x), e . J e of every probe, |f|^2, |J e|^2], from the rows of the last layer
template <class T>
void collect(const Problem<T>& p, const Block<T>& block, const T* rows, T* k) {
  const int64_t n = p.features, width = padded(n), count = block.count;
  const T* e = block.probes;
  T* traces = k + block.segments * block.segment;
  T* energies = p.control.regularize ? traces + p.tangents * count : nullptr;
  for (int64_t b = 0; b < count; ++b, rows += width, e += n) {
    T square = T(0), squares = T(0);
    for (int64_t d = 0; d < n; ++d) k[b * n + d] = rows[d], square += rows[d] * rows[d];
    for (int64_t s = 0; s < p.tangents; ++s) {
      rows += width, e += n;
      T trace = T(0);
      for (int64_t d = 0; d < n; ++d) trace += rows[d] * e[d];
      traces[s * count + b] = trace;
      if (energies)
        for (int64_t d = 0; d < n; ++d) squares += rows[d] * rows[d];
    }
    if (energies) energies[b] = p.sign() * square, energies[count + b] = p.sign() * p.share() * squares;
  }
}

// gradients of the outputs
struct Gradients {
  const View &values, &traces, &energies;

  template <class T>
  T quadrature(int64_t j, int64_t q, int64_t probes, int64_t sample) const {
    return q < probes ? at<T>(traces, j, q, sample) : at<T>(energies, j, q - probes, sample);
  }
};

// Gradients of the rows of the last layer, f and J e, from those of f [count, D] and of the quadratures.
template <class T>
void seed_rows(const Problem<T>& p, const Block<T>& block, const T* g, const T* of_quadratures, const T* last, T* to) {
  const int64_t n = p.features, width = padded(n), count = block.count;
  const T *e = block.probes, *of_energies = of_quadratures + p.tangents * count;
  const bool energies = p.control.regularize;
  std::fill_n(to, count * p.net.rows * width, T(0));
  for (int64_t b = 0; b < count; ++b, to += width, last += width, e += n) {
    const T kinetic = energies ? 2 * p.sign() * of_energies[b] : T(0);
    const T jacobian = energies ? 2 * p.sign() * p.share() * of_energies[count + b] : T(0);
    for (int64_t d = 0; d < n; ++d) to[d] = g[b * n + d] + kinetic * last[d];
    for (int64_t s = 0; s < p.tangents; ++s) {
      to += width, last += width, e += n;
      const T trace = of_quadratures[s * count + b];
      for (int64_t d = 0; d < n; ++d) to[d] = trace * e[d] + jacobian * last[d];
    }
  }
}

// which outputs lie in a step from t to end, and how far into it
inline bool inside(double direction, double t, double end, double time) {
  return direction * t < direction * time && direction * time <= direction * end;
}
inline double fraction(double t, double h, double time) { return least(1, most(0, (time - t) / h)); }

}  // namespace fastflow
