// The gradient of a solve by the continuous adjoint a = dL/dx: another solve, from the last output to the first, of
//
//   dx/dt = f,   da/dt = -(a, g) . d(f, rates of the integrals)/dx,   dL/dparams = integral of (a, g) . df/dparams dt
//
// with the gradients g of the integrals, constant between two outputs. The parameters have no part in the control:
// their integral is taken over a step once it is accepted.
#include <pybind11/stl.h>

#include "dynamics_backward.h"
#include "module.h"
#include "ode.h"

namespace fastflow {
namespace {

template <class T>
struct Work {
  Scratch<T> scratch;
  Memory<T> memory;
  Kept<T> kept;
  T *g, *of_quadratures, *gx;  // [count, D], [quadratures, count], [count, D]

  explicit Work(const Problem<T>& p) : scratch(p) {
    const int64_t activations = Kept<T>::size(p.net, p.block, p.tangents), n = p.block * p.features;
    memory = allocate<T>(activations + 2 * n + p.block * p.quadratures);
    g = memory.get() + activations, gx = g + n, of_quadratures = gx + n;
  }
};

template <Activation kind, class T>
struct Adjoint {
  const Problem<T>& p;
  const std::vector<double>& times;  // of the walk: from an output to the one before
  Partials<T>& sums;
  std::vector<Memory<T>> of_integrals, a;  // of every block: g [quadratures, count]; a at the walk's end [count, D]

  Work<T> scratch() const { return Work<T>(p); }

  // (a, g) . df/dx to work.gx, and with `sum` (a, g) . df/dparams; returns the last layer's rows
  const T* pull(Work<T>& work, Block<T>& block, const T* x, const T* a, const T* g, T* sum) const {
    work.kept = Kept<T>(p.net, block.count, p.tangents, work.memory.get());
    const T* in = with_probes(p, block, p.tangents, x);
    T* const* buffers = work.scratch.buffers;
    const T* rows =
        forward_block<kind>(p.net, work.scratch.now, block.count, p.tangents, in, buffers, &std::as_const(work.kept));
    seed_rows(p, block, a, g, rows, buffers[0]);
    backward_block<kind>(p.net, work.scratch.now, block.count, p.tangents, in, work.kept, buffers[0], buffers, sums,
                         sum, work.gx);
    return rows;
  }

  void derivative(Work<T>& work, Block<T>& block, const Controller* c, int each, double fraction, const T* state,
                  T* k) const {
    work.scratch.at(p, block, c, each, fraction);
    const T* g = of_integrals[block.first / p.block].get();
    const T* rows = pull(work, block, state, state + block.segment, g, nullptr);
    for (int64_t b = 0; b < block.count; ++b)
      std::copy_n(rows + b * p.net.rows * padded(p.features), p.features, k + b * p.features);
    for (int64_t i = 0; i < block.count * p.features; ++i) k[block.segment + i] = -work.gx[i];
  }

  void accepted(Work<T>& work, Block<T>& block, const Controller* given, int each) {
    const int64_t index = block.first / p.block, n = block.count * p.features, controllers = each ? block.count : 1;
    std::vector<Controller> c(given, given + controllers);
    std::vector<double> theta(controllers);  // the part of the step that lies before the walk's end
    const double direction = -p.direction, end = times.back();
    for (int64_t r = 0; r < controllers; ++r) {
      if (!c[r].moved) c[r].h = 0;
      const bool last = c[r].moved && inside(direction, c[r].t, c[r].end, end);
      theta[r] = last ? fraction(c[r].t, c[r].h, end) : 1;
      for (int64_t b = r; last && b < (each ? r + 1 : block.count); ++b)
        for (int64_t i = b * p.features; i < (b + 1) * p.features; ++i) {
          T sum = T(0);
          for (int s = 0; s < p.method.stages; ++s)
            if (const double w = p.method.dense(s, theta[r]); w != 0)
              sum += T(c[r].h * w) * block.k[s][block.segment + i];
          a[index][i] = block.y[block.segment + i] + sum;
        }
    }
    if (each) block.spread(c.data());
    for (int s = 0; s < p.method.stages; ++s) {
      // what (a, g) count for in the integral: nothing where no step was made
      bool any = false;
      const auto weight = [&](int64_t b) { return T(-c[b * each].h * p.method.dense(s, theta[b * each])); };
      for (int64_t b = 0; b < controllers; ++b) any |= weight(b) != 0;
      if (!any) continue;
      combine(
          block.y, block.k, s, [&](int j) { return p.method.weight(s, j); }, c[0].h, each ? block.sizes : nullptr,
          block.size, block.error);
      // of a step that was refused anything may be in k
      for (int64_t b = 0; b < controllers && each; ++b)
        for (int64_t i = b * p.features; !c[b].moved && i < (b + 1) * p.features; ++i)
          block.error[i] = block.y[i], block.error[block.segment + i] = block.y[block.segment + i];
      for (int64_t i = 0; i < n; ++i) work.g[i] = weight(i / p.features) * block.error[block.segment + i];
      for (int64_t i = 0; i < p.quadratures * block.count; ++i)
        work.of_quadratures[i] = weight(i % block.count) * of_integrals[index][i];
      work.scratch.at(p, block, c.data(), each, p.method.c[s]);
      pull(work, block, block.error, work.g, work.of_quadratures, sums.of(index / sums.blocks));
    }
  }
};

template <Activation kind, class T>
void solve(const Problem<T>& p, int64_t max_steps, const View& values, const Gradients& grads, const View& counts,
           const View& gx, const std::vector<View>& graw) {
  Partials<T> sums(p.net, p.blocks());
  std::vector<double> times;
  Adjoint<kind, T> system{p, times, sums, {}, {}};
  std::vector<Block<T>> blocks;
  for (int64_t k = 0; k < p.blocks(); ++k) {
    const int64_t count = p.count(k);
    blocks.emplace_back(k * p.block, count, p.features, 2, 0, p.tangents, p.method);
    take_probes(p, blocks.back());
    system.a.push_back(allocate<T>(count * p.features));
    system.of_integrals.push_back(allocate<T>(count * p.quadratures));
    std::fill_n(system.a[k].get(), count * p.features, T(0));
    std::fill_n(system.of_integrals[k].get(), count * p.quadratures, T(0));
  }
  using Walk = March<T, Adjoint<kind, T>>;
  for (int64_t j = int64_t(p.times.size()) - 1; j > 0; --j) {
    for (int64_t k = 0; k < p.blocks(); ++k) {
      Block<T>& block = blocks[k];
      for (int64_t b = 0; b < block.count; ++b) {
        const int64_t sample = block.first + b;
        for (int64_t d = 0, i = b * p.features; d < p.features; ++d, ++i) {
          system.a[k][i] += at<T>(grads.values, j - 1, sample, d);
          block.y[i] = at<T>(values, j - 1, sample, d), block.y[block.segment + i] = system.a[k][i];
        }
        for (int64_t q = 0; q < p.quadratures; ++q)
          system.of_integrals[k][q * block.count + b] += grads.quadrature<T>(j - 1, q, p.tangents, sample);
      }
    }
    if (p.times[j] == p.times[j - 1]) continue;
    times = {p.times[j], p.times[j - 1]};
    march(
        p.method, p.control, p.blocks(),
        [&](int64_t begin, int64_t end) {
          return Walk{p.method, p.control, times, 0, max_steps, 0, system, blocks, begin, end};
        },
        [&](const Walk& walk) {
          if (!p.control.per_sample && walk.begin > 0) return;
          for (size_t r = 0; r < walk.controllers.size(); ++r) {
            const Controller& c = walk.controllers[r];
            const int64_t row = p.control.per_sample ? blocks[walk.begin].first + int64_t(r) : 0;
            const int64_t taken[3] = {c.evaluations, c.accepted, c.rejected};
            for (int64_t i = 0; i < 3; ++i) at<int64_t>(counts, row, i) += taken[i];
          }
        });
  }
  for (int64_t k = 0; k < p.blocks(); ++k)
    for (int64_t b = 0; b < blocks[k].count; ++b)
      for (int64_t d = 0; d < p.features; ++d) at<T>(gx, blocks[k].first + b, d) = system.a[k][b * p.features + d];
  raw_gradients(p.net, sums, graw);
}

// --- what Python sees: the contract is in fastflow/ops/ode.py
// ---------------------------------------------------------

void mlp_ode_adjoint(const View& x, const View& times, const View& probes, const std::vector<View>& raw,
                     const std::vector<double>& method, int layer, int activation, const std::vector<double>& control,
                     int64_t max_steps, const View& values, const View& gvalues, const View& gtraces,
                     const View& genergies, const View& counts, const View& gx, const std::vector<View>& graw) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(x, times, probes, raw, method, layer, control, true);
    with_activation(activation, [&](auto a) {
      solve<a()>(p, max_steps, values, Gradients{gvalues, gtraces, genergies}, counts, gx, graw);
    });
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(ode_adjoint) {
  using namespace fastflow;
  m.def("mlp_ode_adjoint", &mlp_ode_adjoint, pybind11::call_guard<pybind11::gil_scoped_release>());
}
