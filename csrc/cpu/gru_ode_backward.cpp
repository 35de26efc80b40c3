// The gradient of GRU-ODE-Bayes, from the states after the rows alone. A block of series is taken through its ticks in
// windows, the last first: its steps are made again and their evaluations kept, then the window is gone through
// backwards. What no later tick waits for, the predictions and gates of the rows before and all products that make
// gradients of weights after, is done for a window as a whole.
#include <pybind11/stl.h>

#include <stdexcept>

#include "gru_ode_reverse.h"
#include "gru_ode_steps.h"
#include "module.h"
#include "parallel.h"
#include "rows.h"

namespace fastflow {
namespace gru {
namespace {

constexpr int64_t kWindow = 16;  // evaluations of a series that are kept
constexpr int64_t kSeries = 24;  // of a block at most
constexpr int64_t kChunks = 32;  // partial sums of the weights' gradients, whatever the threads

// --- a block ------------------------------------------------------------------------------------------

template <class T>
struct Reverse {
  const Network<T>& net;
  const Method<T>& method;
  const Schedule& schedule;
  const Layout& layout;
  const T *h0, *values, *masks, *dropout, *states;
  const T *gpre, *gpost, *gstate, *gstates;
  T *gh0, *gvalues;
};

// The rows of a window.
template <class T>
struct Events {
  const Reverse<T>& of;
  int64_t first = 0, n = 0;  // within the plan's
  std::vector<int64_t> rows;
  Buffer<T> memory;
  Jump<T> jump;
  T *scratch, *gs, *gp, *gq, *gx, *gn;  // [n, H]: of the state after the row, without what comes later

  explicit Events(const Reverse<T>& reverse) : of(reverse) {}

  void begin(const Plan& plan, int64_t from, int64_t to) {
    const Network<T>& net = of.net;
    first = from, n = to - from;
    rows.resize(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = plan.events[first + i].row;
    T* m = memory.get(n * (net.jump_size() + 3 * net.h_row() + net.p_row() + net.q_row() + net.x_row()));
    jump = net.jumps(m, n);
    m += n * net.jump_size();
    scratch = m, gs = m + n * net.h_row(), gn = gs + n * net.h_row();
    gp = gn + n * net.h_row();
    gq = gp + n * net.p_row();
    gx = gq + n * net.q_row();
  }

  // the groups of a tick, forwards: notes the states before, sets those after
  void replay(const Plan& plan, int64_t group, T* h) {
    const int64_t row = of.net.h_row();
    for (int64_t i = plan.groups[group]; i < plan.groups[group + 1]; ++i) {
      const auto& event = plan.events[i];
      T* at = h + event.slot * row;
      std::copy_n(at, row, jump.h + (i - first) * row);
      if (of.schedule.jumps[event.row]) std::copy_n(of.states + event.row * of.net.H, of.net.H, at);
    }
  }

  // all rows: the predictions after the jump with their gradients, the predictions before and the gates
  void prepare(T* sums) {
    if (n == 0) return;
    const Network<T>& net = of.net;
    const int64_t row = net.h_row(), H = net.H, P = net.P, D = net.D;
    T* after = scratch;
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(of.states + rows[i] * H, H, after + i * row);
      std::fill_n(after + i * row + H, row - H, T(0));
      std::copy_n(of.gstates + rows[i] * H, H, gs + i * row);
      std::fill_n(gs + i * row + H, row - H, T(0));
    }
    const T* again = of.dropout ? of.dropout + P : nullptr;
    net.observe(n, after, again, rows.data(), jump.q, gp);
    std::fill_n(gp, n * net.p_row(), T(0));
    for (int64_t i = 0; i < n; ++i)
      if (of.schedule.jumps[rows[i]]) std::copy_n(of.gpost + rows[i] * 2 * D, 2 * D, gp + i * net.p_row());
    net.observe_backward(n, gp, jump.q, again, rows.data(), gq, gs);
    gather_prediction(after, sums);
    net.observe(n, jump.h, of.dropout, rows.data(), jump.q, jump.p);
    net.leap(n, jump, of.values, of.masks, rows.data(), scratch);
  }

  void backward(const Plan& plan, int64_t group, T* g, T* sums) {
    const Network<T>& net = of.net;
    const int64_t row = net.h_row(), D = net.D, begin = plan.groups[group] - first;
    const int64_t count = plan.groups[group + 1] - plan.groups[group];
    const auto* event = plan.events.data() + plan.groups[group];
    const auto at = [&](T* base, int64_t width, int64_t i = 0) { return base + (begin + i) * width; };
    T *gh = at(scratch, row), *gates[4] = {at(jump.r, row), at(jump.z, row), at(jump.n, row), at(jump.hn, row)};
    for (int64_t i = 0; i < count; ++i) {
      T* to = at(gn, row, i);
      const T *later = g + event[i].slot * row, *own = at(gs, row, i);
#pragma omp simd
      for (int64_t c = 0; c < row; ++c) to[c] = later[c] + own[c];
    }
    land_backward(count * row, at(gn, row), at(jump.h, row), gates[0], gates[1], gates[2], gates[3], gh);
    for (int64_t i = 0; i < count; ++i) {
      if (of.schedule.jumps[event[i].row]) continue;
      for (T* gate : gates) std::fill_n(gate + i * row, row, T(0));
      std::copy_n(at(gn, row, i), row, gh + i * row);
    }
    for (int k = 0; k < 3; ++k) {
      net.hh[k].pull(count, gates[k < 2 ? k : 3], gh, true);
      net.ih[k].pull(count, gates[k], at(gx, net.x_row()), k > 0);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = event[i].row;
      T* to = at(gp, net.p_row(), i);
      std::copy_n(of.gpre + r * 2 * D, 2 * D, to);
      if (of.schedule.jumps[r]) {
        prepare_backward(net, at(jump.p, net.p_row(), i), of.values + r * D, of.masks + r * D,
                         at(jump.x, net.x_row(), i), at(gx, net.x_row(), i), to, of.gvalues + r * D,
                         sums + of.layout.prep.weight, sums + of.layout.prep.bias);
        continue;
      }
      std::fill_n(of.gvalues + r * D, D, T(0));
      for (int64_t d = 0; d < 2 * D; ++d) to[d] += of.gpost[r * 2 * D + d];
    }
    net.observe_backward(count, at(gp, net.p_row()), at(jump.q, net.q_row()), of.dropout, rows.data() + begin,
                         at(gq, net.q_row()), gh);
    for (int64_t i = 0; i < count; ++i) std::copy_n(gh + i * row, row, g + event[i].slot * row);
  }

  void finish(T* sums) {
    if (n == 0) return;
    T* const gates[4] = {jump.r, jump.z, jump.n, jump.hn};
    for (int k = 0; k < 3; ++k) {
      gather(of.net.ih[k], n, gates[k], jump.x, sums, of.layout.ih[k]);
      gather(of.net.hh[k], n, gates[k < 2 ? k : 3], jump.h, sums, of.layout.hh[k]);
    }
    gather_prediction(jump.h, sums);
  }

 private:
  void gather_prediction(const T* h, T* sums) {
    gather(of.net.predict, n, gp, jump.q, sums, of.layout.predict);
    gather(of.net.hidden, n, gq, h, sums, of.layout.hidden);
  }
};

template <class T>
class Block {
 public:
  Block(const Reverse<T>& reverse, const Plan& p, T* gradients)
      : of(reverse),
        net(reverse.net),
        plan(p),
        n(p.size()),
        row(net.h_row()),
        stages(reverse.method.stages()),
        adaptive(reverse.method.tableau.adaptive),
        window(adaptive ? 1 : std::max<int64_t>(1, kWindow / stages)),
        capacity(n * stages * window),
        sums(gradients),
        steps(net, reverse.method, n),
        events(reverse),
        states(3 * n * row),
        pulls((stages + 1) * n * row),
        kept(capacity * net.evaluation_size()),
        inputs(net.imputes ? capacity * net.p_row() : 0),
        size(n) {}

  Fault run() {
    T* g = pulls.data() + stages * n * row;
    std::fill_n(g, n * row, T(0));
    for (int64_t i = 0; i < n; ++i) std::copy_n(of.gstate + plan.series[i] * net.H, net.H, g + i * row);
    if (adaptive)
      note_rows();
    else
      note_starts();
    const int64_t windows = std::max<int64_t>(1, (plan.length() + window - 1) / window);
    int64_t end = plan.group_count();
    for (int64_t k = windows - 1; k >= 0; --k) {
      const int64_t from = k * window, to = std::min(plan.length(), from + window);
      int64_t begin = end;  // of the groups after `from`, or at the very start
      while (begin > 0 && (plan.tick_of(begin - 1) > from || k == 0)) --begin;
      const Fault fault = one(k, from, to, begin, end, g);
      if (fault.row >= 0) return fault;
      end = begin;
    }
    for (int64_t i = 0; i < n; ++i) std::copy_n(g + i * row, net.H, of.gh0 + plan.series[i] * net.H);
    return {};
  }

 private:
  struct Step {  // accepted, of an adaptive method
    int64_t slot;
    T size;
    double theta;
  };

  // steps [from, to) and the groups [begin, end) of rows
  Fault one(int64_t k, int64_t from, int64_t to, int64_t begin, int64_t end, T* g) {
    T* h = states.data();
    events.begin(plan, plan.groups[begin], plan.groups[end]);
    start(k, from, h);
    int64_t group = begin;
    const auto rows_at = [&](int64_t tick) {
      for (; group < end && plan.tick_of(group) == tick; ++group) events.replay(plan, group, h);
    };
    if (from == 0) rows_at(0);
    Clock clock(plan, from);
    std::vector<int64_t> firsts;  // kept evaluations before each step
    int64_t filled = 0;
    Fault fault;
    for (int64_t tick = from; tick < to; ++tick) {
      const int64_t active = plan.active(tick);
      if (adaptive) {
        fault = record(clock, tick, active, h);
        if (fault.row >= 0) return fault;
      } else {
        clock.sizes(tick, active, size.data());
        firsts.push_back(filled);
        steps.kept(active, stages, size.data(), h, [&](int64_t i) { return evaluation(filled + i * active); });
        steps.finish(active, size.data(), h);
        filled += stages * active;
      }
      rows_at(tick + 1);
    }
    keep_inputs(filled);
    events.prepare(sums);
    group = end;
    const auto back_at = [&](int64_t tick) {
      for (; group > begin && plan.tick_of(group - 1) == tick; --group) events.backward(plan, group - 1, g, sums);
    };
    for (int64_t tick = to - 1; tick >= from; --tick) {
      back_at(tick + 1);
      if (adaptive) {
        rounds(g);
        continue;
      }
      const int64_t active = plan.active(tick);
      Clock(plan, tick).sizes(tick, active, size.data());
      reverse(active, stages, active, firsts[tick - from], size.data(), nullptr);
    }
    if (from == 0) back_at(0);
    if (filled > 0) gather(net, filled, evaluation(0), inputs.data(), sums, of.layout);
    events.finish(sums);
    return {};
  }

  Evaluation<T> evaluation(int64_t first) { return net.evaluation(kept.data(), capacity, first); }
  void keep_inputs(int64_t rows) {
    if (net.imputes) std::copy_n(evaluation(0).x, rows * net.p_row(), inputs.data());
  }

  // A step backwards for `count` rows whose gradient is the last part of `pulls`; stage i begins `apart` rows after
  // the one before. Weights [count, stages] of the solution, or the method's.
  void reverse(int64_t count, int64_t used, int64_t apart, int64_t first, const T* step, const T* weights) {
    T *gk = states.data() + n * row, *scratch = gk + n * row, *g = pulls.data() + stages * n * row;
    std::vector<T> w(count * (stages + 1), T(0));
    for (int64_t i = used - 1; i >= 0; --i) {
      for (int64_t j = 0; j < count; ++j) {
        T* to = w.data() + j * (stages + 1);
        to[i] = T(0);
        for (int64_t later = i + 1; later < used; ++later) to[later] = of.method.row(later)[i];
        to[stages] = weights ? weights[j * stages + i] : of.method.b[i];
      }
      combine<true>(count, row, static_cast<const T*>(nullptr), step, w.data(), stages + 1, pulls.data(), n * row, gk);
      pull(net, count, evaluation(first + i * apart), gk, scratch, pulls.data() + i * n * row);
    }
    for (int64_t i = 0; i < used; ++i) {
      const T* from = pulls.data() + i * n * row;
#pragma omp simd
      for (int64_t c = 0; c < count * row; ++c) g[c] += from[c];
    }
  }

  // --- fixed steps: the states at the start of every window, after the rows there

  void note_starts() {
    const int64_t windows = (plan.length() + window - 1) / window;
    T* h = states.data();
    starts.get(windows * n * row);
    first_states(h);
    Clock clock(plan, 0);
    int64_t group = 0;
    for (int64_t tick = 0; tick < plan.length(); ++tick) {
      for (; group < plan.group_count() && plan.tick_of(group) == tick; ++group) set(group, h);
      if (tick % window == 0) std::copy_n(h, n * row, starts.data() + tick / window * n * row);
      if (tick / window + 1 == windows) break;
      const int64_t active = plan.active(tick);
      clock.sizes(tick, active, size.data());
      steps.fixed(active, size.data(), h);
    }
  }
  void set(int64_t group, T* h) const {
    for (int64_t i = plan.groups[group]; i < plan.groups[group + 1]; ++i) {
      const auto& event = plan.events[i];
      std::copy_n(of.states + event.row * net.H, net.H, h + event.slot * row);
    }
  }
  void first_states(T* h) const {
    std::fill_n(h, n * row, T(0));
    for (int64_t i = 0; i < n; ++i) std::copy_n(of.h0 + plan.series[i] * net.H, net.H, h + i * row);
  }
  void start(int64_t k, int64_t tick, T* h) const {
    first_states(h);
    if (k == 0) return;
    if (!adaptive) return (void)std::copy_n(starts.data() + k * n * row, n * row, h);
    for (int64_t i = 0; i < plan.active(tick); ++i)
      std::copy_n(of.states + before[i][tick] * net.H, net.H, h + i * row);
  }

  // --- adaptive steps: intervals begin at a row; their steps are found again, and recorded

  void note_rows() {
    before.resize(n);
    for (int64_t i = 0; i < n; ++i) before[i].assign(plan.ticks[i], -1);
    for (const auto& event : plan.events)
      if (event.tick < plan.ticks[event.slot]) before[event.slot][event.tick] = event.row;
  }

  Fault record(Clock& clock, int64_t tick, int64_t active, T* h) {
    std::vector<double> gap(n);
    std::vector<int64_t> ignored(3);
    std::vector<int64_t*> counts(n, ignored.data());
    clock.sizes(tick, active, gap.data());
    accepted.assign(n, {});
    steps_done.clear(), states_done.clear();
    Fault fault = steps.adaptive(active, gap.data(), h, counts.data(), [&](int64_t i, const T* y, T s, double theta) {
      accepted[i].push_back(int64_t(steps_done.size()));
      steps_done.push_back({i, s, theta});
      states_done.insert(states_done.end(), y, y + row);
    });
    if (fault.row >= 0)
      fault = {plan.series[fault.row], "state: series " + std::to_string(plan.series[fault.row]) + ", interval " +
                                           std::to_string(tick) + ": " + fault.what};
    return fault;
  }

  // the last step of every series, then the one before it, ...
  void rounds(T* g) {
    Buffer<T> memory(2 * n * row);
    T *y = memory.data(), *all = y + n * row;
    std::vector<T> weights(n * stages), dense;
    std::vector<int64_t> who;
    std::copy_n(g, n * row, all);
    for (size_t round = 0;; ++round) {
      who.clear();
      bool whole = true;
      for (int64_t i = 0; i < n; ++i) {
        if (accepted[i].size() <= round) continue;
        const int64_t at = accepted[i][accepted[i].size() - 1 - round], j = int64_t(who.size());
        std::copy_n(states_done.data() + at * row, row, y + j * row);
        std::copy_n(all + i * row, row, g + j * row);
        size[j] = steps_done[at].size;
        steps.dense(steps_done[at].theta, dense);
        std::copy_n(dense.data(), stages, weights.data() + j * stages);
        whole = whole && dense[stages - 1] == T(0);
        who.push_back(i);
      }
      const int64_t m = int64_t(who.size()), used = whole ? stages - 1 : stages;
      if (m == 0) break;
      steps.kept(m, used, size.data(), y, [&](int64_t i) { return evaluation(i * m); });
      keep_inputs(used * m);
      reverse(m, used, m, 0, size.data(), weights.data());
      gather(net, used * m, evaluation(0), inputs.data(), sums, of.layout);
      for (int64_t j = 0; j < m; ++j) std::copy_n(g + j * row, row, all + who[j] * row);
    }
    std::copy_n(all, n * row, g);
  }

  const Reverse<T>& of;
  const Network<T>& net;
  const Plan& plan;
  const int64_t n, row, stages;
  const bool adaptive;
  const int64_t window, capacity;
  T* sums;
  Steps<T> steps;
  Events<T> events;
  Buffer<T> states, pulls, kept, inputs, starts;  // pulls: gradients from each stage, then that of the states
  std::vector<T> size;
  std::vector<std::vector<int64_t>> before, accepted;
  std::vector<Step> steps_done;
  std::vector<T> states_done;
};

// the chunks summed into the parameters' gradients, in the order of Network's parameters
template <class T>
void unpack(const Network<T>& net, const Layout& at, const T* sums, int64_t chunks, const std::vector<View>& to) {
  const auto total = [&](int64_t i) {
    T sum = T(0);
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c * at.size + i];
    return sum;
  };
  const auto dense = [&](int64_t from, int64_t rows, int64_t columns, int64_t row, T* out) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < columns; ++k) out[i * columns + k] = total(from + i * row + k);
  };
  const auto linear = [&](const Linear<T>& l, const Layout::Part& part, T* weight, T* bias) {
    dense(part.weight, l.out, l.in, padded(l.in), weight);
    if (bias) dense(part.bias, 1, l.out, 0, bias);
  };
  const View* v = to.data();
  const int64_t H = net.H, D = net.D, Q = net.Q;
  const View& stacked = *v++;
  const View* in = v;
  if (net.imputes) v += 2;
  for (int64_t i = 0; i < net.gates(); ++i) {
    linear(net.cell[i], at.cell[i], pointer<T>(stacked) + i * H * H, nullptr);
    if (net.imputes) linear(net.input[i], at.input[i], pointer<T>(in[0]) + i * H * 2 * D, pointer<T>(in[1]) + i * H);
  }
  linear(net.hidden, at.hidden, pointer<T>(v[0]), pointer<T>(v[1]));
  linear(net.predict, at.predict, pointer<T>(v[2]), pointer<T>(v[3]));
  dense(at.prep.weight, 1, D * 4 * Q, 0, pointer<T>(v[4]));
  dense(at.prep.bias, 1, D * Q, 0, pointer<T>(v[5]));
  for (int64_t i = 0; i < 3; ++i) {
    linear(net.ih[i], at.ih[i], pointer<T>(v[6]) + i * H * D * Q, pointer<T>(v[8]) + i * H);
    linear(net.hh[i], at.hh[i], pointer<T>(v[7]) + i * H * H, pointer<T>(v[9]) + i * H);
  }
}

}  // namespace

// As gru_ode_fwd; states [N, H] and the gradients of its outputs. Made: gh0, gvalues and those of the parameters.
void gru_ode_bwd(const View& h0, const View& values, const View& masks, const View& dropout,
                 const std::vector<View>& params, const View& offsets, const View& counts, const View& sizes,
                 const View& jumps, int kind, bool impute, const std::vector<double>& method, double rtol, double atol,
                 int64_t max_steps, const View& states, const View& gpre, const View& gpost, const View& gstate,
                 const View& gstates, const View& gh0, const View& gvalues, const std::vector<View>& gparams) {
  with_accumulator(h0.dtype, [&](auto type) {
    using T = decltype(type);
    const Schedule schedule(offsets, counts, sizes, jumps);
    const Network<T> net(params, kind, impute, true);
    const Method<T> steps(method, rtol, atol, max_steps);
    const Layout layout(net);
    const std::vector<Plan> blocks = plans(schedule, 2, kSeries);  // whatever the threads: sums depend on it
    const Reverse<T> reverse = {net,
                                steps,
                                schedule,
                                layout,
                                pointer<T>(h0),
                                pointer<T>(values),
                                pointer<T>(masks),
                                pointer<T>(dropout),
                                pointer<T>(states),
                                pointer<T>(gpre),
                                pointer<T>(gpost),
                                pointer<T>(gstate),
                                pointer<T>(gstates),
                                pointer<T>(gh0),
                                pointer<T>(gvalues)};
    const int64_t count = int64_t(blocks.size()), each = (count + kChunks - 1) / kChunks;
    const int64_t chunks = each ? (count + each - 1) / each : 0;
    Buffer<T> sums(chunks * layout.size);
    std::vector<Fault> faults(count);
    parallel_for(chunks, true, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        T* own = sums.data() + c * layout.size;
        std::fill_n(own, layout.size, T(0));
        for (int64_t k = c * each; k < std::min(count, (c + 1) * each); ++k)
          faults[k] = Block<T>(reverse, blocks[k], own).run();
      }
    });
    for (const Fault& f : faults)
      if (f.row >= 0) throw std::runtime_error(f.what);
    unpack(net, layout, sums.data(), chunks, gparams);
  });
}

}  // namespace gru
}  // namespace fastflow

FASTFLOW_BIND(gru_ode_backward) {
  namespace py = pybind11;
  m.def("gru_ode_bwd", &fastflow::gru::gru_ode_bwd, py::call_guard<py::gil_scoped_release>());
}
