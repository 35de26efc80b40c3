// The exact gradient of a solve through the steps it made. Every block of samples goes back through its steps alone:
// states between the kept ones are computed again (values only), then the stages of a step, with tangents and with
// what their reverse needs. With g the gradients of what a step ends in and of the integrals, w_i = h b_i:
//
//   g_ki = w_i g + h sum_{j > i} a_ji g_Yj,   g_Yi = g_ki . df/dy (Y_i),   g_y = g + sum_i g_Yi
//
// and an output at t + theta h inside the step adds h b_i(theta) g_out to g_ki and g_out to g_y.
#include <pybind11/stl.h>

#include "dynamics_backward.h"
#include "module.h"
#include "ode.h"

namespace fastflow {
namespace {

struct Steps {
  const View &steps, &counts, &states;
};

// What a thread needs for a block: activations and moments of every stage, and gradients of its k.
template <class T>
struct Tape {
  Scratch<T> scratch;
  std::vector<Moments<T>> now;
  Memory<T> memory;
  std::vector<Kept<T>> kept;
  T *g[Tableau::max_stages], *of_y, *of_stage;  // [count, D] and [quadratures, count]

  Tape(const Problem<T>& p, int64_t count) : scratch(p) {
    const int stages = p.method.stages;
    const int64_t activations = Kept<T>::size(p.net, count, p.tangents), numbers = (p.features + p.quadratures) * count;
    memory = allocate<T>(stages * activations + (stages + 2) * numbers);
    T* to = memory.get();
    for (int i = 0; i < stages; ++i, to += activations) {
      kept.emplace_back(p.net, count, p.tangents, to);
      now.push_back(scratch.now);
    }
    for (int i = 0; i < stages; ++i, to += numbers) g[i] = to;
    of_y = to, of_stage = to + numbers;
  }
};

template <Activation kind, class T>
struct Reverse {
  const Problem<T>& p;
  const Steps& path;
  const Gradients& grads;
  const Partials<T>& sums;

  int each() const { return p.control.per_sample; }

  // the step n of every controller; one that made fewer steps has h = 0
  void step(const Block<T>& block, int64_t n, std::vector<Controller>& controllers) const {
    for (size_t r = 0; r < controllers.size(); ++r) {
      Controller& c = controllers[r];
      const int64_t row = each() ? block.first + int64_t(r) : 0;
      c.moved = n < c.accepted;
      c.t = c.moved ? at<double>(path.steps, n, row, 0) : p.times[0];
      c.h = c.moved ? at<double>(path.steps, n, row, 1) : 0;
      c.end = n + 1 < c.accepted ? at<double>(path.steps, n + 1, row, 0)
                                 : p.direction * std::numeric_limits<double>::infinity();
    }
  }

  // states of the steps from the kept one at `from` to `to`, one after the other in `states` [steps, count, D]
  void replay(Tape<T>& tape, Block<T>& block, int64_t from, int64_t to, std::vector<Controller>& c, T* states) const {
    const int64_t n = block.count * p.features;
    for (int64_t b = 0; b < block.count; ++b) {
      const int64_t spacing = c[b * each()].spacing;
      for (int64_t d = 0; d < p.features; ++d)
        states[b * p.features + d] =
            at<T>(path.states, from < c[b * each()].accepted ? from / spacing : 0, block.first + b, d);
    }
    for (int64_t m = from; m < to; ++m, states += n) {
      step(block, m, c);
      const T* sizes = own(block, c);
      stages(block, c, sizes, states, last(nullptr), [&](int i, const T* at) {
        tape.scratch.at(p, block, c.data(), each(), p.method.c[i]);
        const T* rows =
            forward_block<kind, T>(p.net, tape.scratch.now, block.count, 0, at, tape.scratch.buffers, nullptr);
        for (int64_t b = 0; b < block.count; ++b)
          std::copy_n(rows + b * padded(p.features), p.features, block.k[i] + b * p.features);
      });
      combine(states, block.k, last(nullptr), [&](int j) { return p.method.b[j]; }, c[0].h, sizes, n, states + n);
    }
  }

  const T* own(Block<T>& block, const std::vector<Controller>& c) const {
    if (each()) block.spread(c.data());
    return each() ? block.sizes : nullptr;
  }

  // how many stages count: the last one or more may have no weight
  int last(const bool* dense) const {
    int n = p.method.stages;
    while (n > 1 && p.method.b[n - 1] == 0 && !(dense && *dense)) --n;
    return n;
  }

  // f(stage, its state) for the first stages of the step from y
  template <class F>
  void stages(Block<T>& block, const std::vector<Controller>& c, const T* sizes, const T* y, int count,
              const F& f) const {
    for (int i = 0; i < count; ++i) {
      combine(
          y, block.k, i, [&](int j) { return p.method.weight(i, j); }, c[0].h, sizes, block.count * p.features,
          block.after);
      f(i, block.after);
    }
  }

  // gradients of the k of the step at hand, from that of its end and from the outputs inside; the latter then join the
  // former. Are there outputs inside?
  bool seeds(Tape<T>& tape, const Block<T>& block, const std::vector<Controller>& controllers) const {
    const int64_t n = block.count * p.features;
    bool dense = false;
    for (int64_t b = 0; b < block.count; ++b) {
      const Controller& c = controllers[b * each()];
      const auto numbers = [&](const auto& f) {
        for (int64_t d = 0; d < p.features; ++d) f(b * p.features + d, d);
        for (int64_t q = 0; q < p.quadratures; ++q) f(n + q * block.count + b, p.features + q);
      };
      for (int i = 0; i < p.method.stages; ++i) {
        const T w = T(c.h * p.method.b[i]);
        numbers([&](int64_t at, int64_t) { tape.g[i][at] = w == 0 ? T(0) : w * tape.of_y[at]; });
      }
      for (size_t j = 1; c.moved && j < p.times.size(); ++j) {
        if (!inside(p.direction, c.t, c.end, p.times[j])) continue;
        const double theta = fraction(c.t, c.h, p.times[j]);
        dense |= theta < 1;
        const auto output = [&](int64_t d) {
          const int64_t sample = block.first + b, q = d - p.features;
          return q < 0 ? at<T>(grads.values, j - 1, sample, d)
                       : grads.template quadrature<T>(j - 1, q, p.tangents, sample);
        };
        for (int i = 0; i < p.method.stages; ++i) {
          const T w = T(c.h * p.method.dense(i, theta));
          if (w != 0) numbers([&](int64_t at, int64_t d) { tape.g[i][at] += w * output(d); });
        }
        numbers([&](int64_t at, int64_t d) { tape.of_y[at] += output(d); });
      }
    }
    return dense;
  }

  void back(Tape<T>& tape, Block<T>& block, const std::vector<Controller>& c, const T* y, T* sum) const {
    const int64_t n = block.count * p.features;
    const bool dense = seeds(tape, block, c);
    const int count = last(&dense);
    const T* sizes = own(block, c);
    Memory<T> states = allocate<T>(count * n);
    stages(block, c, sizes, y, count, [&](int i, const T* state) {
      std::copy_n(state, n, states.get() + i * n);
      for (int64_t b = 0; b < (each() ? block.count : 1); ++b)
        tape.now[i].set(p.net, b, T(c[b].t + p.method.c[i] * c[b].h));
      const T* in = with_probes(p, block, p.tangents, state);
      const T* row =
          forward_block<kind>(p.net, tape.now[i], block.count, p.tangents, in, tape.scratch.buffers, &tape.kept[i]);
      for (int64_t b = 0; b < block.count; ++b)
        std::copy_n(row + b * p.net.rows * padded(p.features), p.features, block.k[i] + b * p.features);
    });
    for (int i = count - 1; i >= 0; --i) {
      seed_rows(p, block, tape.g[i], tape.g[i] + n, tape.kept[i].rows.back(), tape.scratch.buffers[0]);
      const T* in = with_probes(p, block, p.tangents, states.get() + i * n);
      backward_block<kind>(p.net, tape.now[i], block.count, p.tangents, in, tape.kept[i], tape.scratch.buffers[0],
                           tape.scratch.buffers, sums, sum, tape.of_stage);
      for (int64_t d = 0; d < n; ++d) tape.of_y[d] += tape.of_stage[d];
      T* of_stage[1] = {tape.of_stage};
      for (int j = 0; j < i; ++j)
        if (p.method.weight(i, j) != 0)
          combine(tape.g[j], of_stage, 1, [&](int) { return p.method.weight(i, j); }, c[0].h, sizes, n, tape.g[j]);
    }
  }

  void run(int64_t k, T* sum, const View& gx) const {
    Block<T> block(k * p.block, p.count(k), p.features, 1, 0, p.tangents, p.method);
    Tape<T> tape(p, block.count);
    take_probes(p, block);
    const int64_t n = block.count * p.features;
    std::vector<Controller> c(each() ? block.count : 1);
    int64_t steps = 0, spacing = 1;
    for (size_t r = 0; r < c.size(); ++r) {
      const int64_t row = each() ? block.first + int64_t(r) : 0;
      c[r].accepted = at<int64_t>(path.counts, row, 1), c[r].spacing = at<int64_t>(path.counts, row, 3);
      steps = std::max(steps, c[r].accepted), spacing = std::max(spacing, c[r].spacing);
    }
    std::fill_n(tape.of_y, n + p.quadratures * block.count, T(0));
    Memory<T> states = allocate<T>(std::min(spacing, steps) * n);
    for (int64_t from = (steps - 1) / spacing * spacing; from >= 0 && steps > 0; from -= spacing) {
      const int64_t to = std::min(from + spacing, steps);
      replay(tape, block, from, to - 1, c, states.get());
      for (int64_t m = to - 1; m >= from; --m) {
        step(block, m, c);
        back(tape, block, c, states.get() + (m - from) * n, sum);
      }
    }
    for (int64_t b = 0; b < block.count; ++b)
      for (int64_t d = 0; d < p.features; ++d) {
        T total = tape.of_y[b * p.features + d];
        for (size_t j = 1; j < p.times.size() && p.times[j] == p.times[0]; ++j)
          total += at<T>(grads.values, j - 1, block.first + b, d);
        at<T>(gx, block.first + b, d) = total;
      }
  }
};

template <Activation kind, class T>
void backward(const Problem<T>& p, const Steps& path, const Gradients& grads, const View& gx,
              const std::vector<View>& graw) {
  Partials<T> sums(p.net, p.blocks());
  const Reverse<kind, T> reverse{p, path, grads, sums};
  parallel_for(sums.chunks, sums.chunks > 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t k = c * sums.blocks; k < std::min((c + 1) * sums.blocks, p.blocks()); ++k)
        reverse.run(k, sums.of(c), gx);
  });
  raw_gradients(p.net, sums, graw);
}

// --- what Python sees: the contract is in fastflow/ops/ode.py
// ---------------------------------------------------------

void mlp_ode_bwd(const View& x, const View& times, const View& probes, const std::vector<View>& raw,
                 const std::vector<double>& method, int layer, int activation, const std::vector<double>& control,
                 const View& steps, const View& counts, const View& states, const View& gvalues, const View& gtraces,
                 const View& genergies, const View& gx, const std::vector<View>& graw) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(x, times, probes, raw, method, layer, control, true);
    with_activation(activation, [&](auto a) {
      backward<a()>(p, Steps{steps, counts, states}, Gradients{gvalues, gtraces, genergies}, gx, graw);
    });
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(ode_backward) {
  using namespace fastflow;
  m.def("mlp_ode_bwd", &mlp_ode_bwd, pybind11::call_guard<pybind11::gil_scoped_release>());
}
