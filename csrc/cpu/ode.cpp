// An MLP's dynamics with its trace and energies integrated over the whole interval in one call; see march.h for the
// steps. Bound by the rate of multiply-adds, as trace.cpp: what surrounds them stays in the cache with its block.
#include "ode.h"

#include <pybind11/stl.h>

#include "module.h"

namespace fastflow {
namespace {

struct Outputs {
  const View &values, &traces, &energies, &steps, &counts, &states;
};

template <Activation kind, class T>
struct Forward {
  const Problem<T>& p;
  const Outputs& out;

  Scratch<T> scratch() const { return Scratch<T>(p); }

  void derivative(Scratch<T>& scratch, Block<T>& block, const Controller* c, int each, double fraction, const T* state,
                  T* k) const {
    scratch.at(p, block, c, each, fraction);
    const T* in = with_probes(p, block, p.tangents, state);
    const Kept<T>* kept = nullptr;
    collect(p, block, forward_block<kind>(p.net, scratch.now, block.count, p.tangents, in, scratch.buffers, kept), k);
  }

  void begin(Block<T>& block) const {
    take_probes(p, block);
    for (int64_t b = 0; b < block.count; ++b)
      for (int64_t d = 0; d < p.features; ++d) block.y[b * p.features + d] = at<T>(p.x, block.first + b, d);
    const double none[Tableau::max_stages] = {};
    for (size_t j = 1; j < p.times.size() && p.times[j] == p.times[0]; ++j)
      for (int64_t b = 0; b < block.count; ++b) output(block, b, j - 1, 0, none);
  }

  // y + h sum_i weights_i k_i of sample b
  void output(const Block<T>& block, int64_t b, int64_t j, double h, const double* weights) const {
    const auto value = [&](int64_t i) {
      T sum = T(0);
      for (int s = 0; s < p.method.stages; ++s)
        if (weights[s] != 0) sum += T(h * weights[s]) * block.k[s][i];
      return block.y[i] + sum;
    };
    const int64_t sample = block.first + b, q = block.segments * block.segment + b;
    for (int64_t d = 0; d < p.features; ++d) at<T>(out.values, j, sample, d) = value(b * p.features + d);
    for (int64_t s = 0; s < p.tangents; ++s) at<T>(out.traces, j, s, sample) = value(q + s * block.count);
    for (int64_t e = 0; e + p.tangents < p.quadratures; ++e)
      at<T>(out.energies, j, e, sample) = value(q + (p.tangents + e) * block.count);
  }

  void accepted(Scratch<T>&, Block<T>& block, const Controller* c, int each) const {
    const int64_t room = out.states.size[0];
    for (size_t j = 1; j < p.times.size(); ++j)
      for (int64_t b = 0; b < block.count; ++b) {
        const Controller& step = c[b * each];
        if (!step.moved || !inside(p.direction, step.t, step.end, p.times[j])) {
          if (each) continue;
          break;
        }
        double weights[Tableau::max_stages];
        for (int i = 0; i < p.method.stages; ++i) weights[i] = p.method.dense(i, fraction(step.t, step.h, p.times[j]));
        output(block, b, int64_t(j) - 1, step.h, weights);
      }
    for (int64_t b = 0; b < block.count; ++b) {
      const Controller& step = c[b * each];
      const int64_t sample = block.first + b;
      if (!step.moved) continue;
      if (each || sample == 0) {
        at<double>(out.steps, step.accepted, sample * each, 0) = step.t;
        at<double>(out.steps, step.accepted, sample * each, 1) = step.h;
      }
      if (room == 0) continue;
      for (int64_t spacing = step.before; spacing < step.spacing; spacing *= 2)
        for (int64_t j = 1; 2 * j < room; ++j)
          for (int64_t d = 0; d < p.features; ++d)
            at<T>(out.states, j, sample, d) = at<T>(out.states, 2 * j, sample, d);
      if (const int64_t to = slot(step.accepted, step.spacing); to >= 0)
        for (int64_t d = 0; d < p.features; ++d) at<T>(out.states, to, sample, d) = block.y[b * p.features + d];
    }
  }
};

template <Activation kind, class T>
void solve(const Problem<T>& p, const Outputs& out, int64_t max_steps) {
  Forward<kind, T> system{p, out};
  std::vector<Block<T>> blocks;
  for (int64_t k = 0; k < p.blocks(); ++k) {
    blocks.emplace_back(k * p.block, p.count(k), p.features, 1, p.quadratures, p.tangents, p.method);
    system.begin(blocks.back());
  }
  using Walk = March<T, Forward<kind, T>>;
  march(
      p.method, p.control, p.blocks(),
      [&](int64_t begin, int64_t end) {
        return Walk{p.method,           p.control, p.times, p.tangents, max_steps,
                    out.states.size[0], system,    blocks,  begin,      end};
      },
      [&](const Walk& walk) {
        if (!p.control.per_sample && walk.begin > 0) return;
        for (size_t r = 0; r < walk.controllers.size(); ++r) {
          const Controller& c = walk.controllers[r];
          const int64_t row = p.control.per_sample ? blocks[walk.begin].first + int64_t(r) : 0;
          const int64_t counts[4] = {c.evaluations, c.accepted, c.rejected, c.spacing};
          for (int64_t i = 0; i < 4; ++i) at<int64_t>(out.counts, row, i) = counts[i];
        }
      });
}

// --- what Python sees: the contract is in fastflow/ops/ode.py
// ---------------------------------------------------------

void mlp_ode_fwd(const View& x, const View& times, const View& probes, const std::vector<View>& raw,
                 const std::vector<double>& method, int layer, int activation, const std::vector<double>& control,
                 int64_t max_steps, const View& values, const View& traces, const View& energies, const View& steps,
                 const View& counts, const View& states) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(x, times, probes, raw, method, layer, control, false);
    with_activation(activation, [&](auto a) {
      solve<a()>(p, Outputs{values, traces, energies, steps, counts, states}, max_steps);
    });
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(ode) {
  using namespace fastflow;
  m.def("mlp_ode_fwd", &mlp_ode_fwd, pybind11::call_guard<pybind11::gil_scoped_release>());
}
