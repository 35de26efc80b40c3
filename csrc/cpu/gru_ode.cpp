// GRU-ODE-Bayes: all series of a batch from their first state to their last, steps and jumps, in one call. Series go in
// blocks, a block's states stay in L1 and the matrices, packed once, beside them in L2. What a series gets depends
// neither on those beside it nor on the number of threads.
#include "gru_ode.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "gru_ode_steps.h"
#include "module.h"
#include "parallel.h"
#include "rows.h"

namespace fastflow {
namespace gru {
namespace {

constexpr int64_t kSeries = 32;  // of a block at most
constexpr int64_t kRows = 48;    // whose predictions after the jump are made together

template <class T>
bool observed_are_finite(int64_t n, const T* values, const T* masks) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += masks[i] == T(0) ? T(0) : values[i] - values[i];
  return sum == T(0);
}

template <class T>
struct Filter {
  const Network<T>& net;
  const Method<T>& method;
  const Schedule& schedule;
  const T *h0, *values, *masks, *dropout;
  T *pre, *post, *state, *states;
  int64_t* steps;

  Fault run(const Plan& plan) const {
    const int64_t n = plan.size(), row = net.h_row(), H = net.H;
    Steps<T> steps_of(net, method, n);
    Buffer<T> memory(n * row + n * net.jump_size() + n * row), post_memory;
    T *h = memory.data(), *fresh = h + n * row;
    const Jump<T> jump = net.jumps(fresh + n * row, n);
    std::fill_n(h, n * row, T(0));
    std::vector<int64_t*> counts(n);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(h0 + plan.series[i] * H, H, h + i * row);
      counts[i] = steps + plan.series[i] * 3;
      std::fill_n(counts[i], 3, int64_t(0));
      if (!method.tableau.adaptive) counts[i][0] = plan.ticks[i] * method.stages(), counts[i][1] = plan.ticks[i];
    }
    Clock clock(plan, 0);
    std::vector<T> size(n);
    std::vector<double> gap(n);
    int64_t group = 0;
    for (int64_t tick = 0; tick <= plan.length(); ++tick) {
      for (; group < plan.group_count() && plan.tick_of(group) == tick; ++group) events(plan, group, jump, h, fresh);
      const int64_t active = plan.active(tick);
      if (!method.tableau.adaptive) {
        clock.sizes(tick, active, size.data());
        steps_of.fixed(active, size.data(), h);
        continue;
      }
      clock.sizes(tick, active, gap.data());
      Fault fault = steps_of.adaptive(active, gap.data(), h, counts.data(), [](int64_t, const T*, T, double) {});
      if (fault.row >= 0) {
        const int64_t b = plan.series[fault.row];
        return {b, "state: series " + std::to_string(b) + ", interval " + std::to_string(tick) + ": " + fault.what};
      }
    }
    for (int64_t i = 0; i < n; ++i) std::copy_n(h + i * row, H, state + plan.series[i] * H);
    predict_again(plan);
    return {};
  }

  // the rows of a group: no series comes twice
  void events(const Plan& plan, int64_t group, const Jump<T>& jump, T* h, T* fresh) const {
    const int64_t row = net.h_row(), H = net.H, D = net.D;
    const auto* event = plan.events.data() + plan.groups[group];
    const int64_t n = plan.groups[group + 1] - plan.groups[group];
    std::vector<int64_t> rows(n), slots(n);
    for (int64_t i = 0; i < n; ++i) {
      rows[i] = event[i].row, slots[i] = event[i].slot;
      std::copy_n(h + slots[i] * row, row, jump.h + i * row);
    }
    net.observe(n, jump.h, dropout, rows.data(), jump.q, jump.p);
    int64_t m = 0;  // rows that jump close up
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(jump.p + i * net.p_row(), 2 * D, pre + rows[i] * 2 * D);
      if (!schedule.jumps[rows[i]]) {
        std::copy_n(jump.h + i * row, H, states + rows[i] * H);
        std::copy_n(jump.p + i * net.p_row(), 2 * D, post + rows[i] * 2 * D);
        continue;
      }
      if (m < i) {
        std::copy_n(jump.h + i * row, row, jump.h + m * row);
        std::copy_n(jump.p + i * net.p_row(), net.p_row(), jump.p + m * net.p_row());
      }
      rows[m] = rows[i], slots[m++] = slots[i];
    }
    net.leap(m, jump, values, masks, rows.data(), fresh);
    for (int64_t i = 0; i < m; ++i) {
      std::copy_n(fresh + i * row, row, h + slots[i] * row);
      std::copy_n(fresh + i * row, H, states + rows[i] * H);
    }
  }

  void predict_again(const Plan& plan) const {
    const int64_t row = net.h_row(), D = net.D;
    Buffer<T> memory(kRows * (row + net.q_row() + net.p_row()));
    T *h = memory.data(), *q = h + kRows * row, *p = q + kRows * net.q_row();
    std::fill_n(h, kRows * row, T(0));
    std::vector<int64_t> rows;
    const auto flush = [&] {
      const int64_t n = int64_t(rows.size());
      for (int64_t i = 0; i < n; ++i) std::copy_n(states + rows[i] * net.H, net.H, h + i * row);
      net.observe(n, h, dropout ? dropout + net.P : nullptr, rows.data(), q, p);
      for (int64_t i = 0; i < n; ++i) std::copy_n(p + i * net.p_row(), 2 * D, post + rows[i] * 2 * D);
      rows.clear();
    };
    for (const auto& event : plan.events) {
      if (!schedule.jumps[event.row]) continue;
      rows.push_back(event.row);
      if (int64_t(rows.size()) == kRows) flush();
    }
    if (!rows.empty()) flush();
  }

  // Where something is not finite: the first such series, and the first row of it.
  void check() const {
    const auto finite_row = [](const T* p, int64_t n) {
      T sum = T(0);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += p[i] - p[i];
      return sum == T(0);
    };
    for (int64_t b = 0; b < schedule.series; ++b) {
      double time = 0;
      for (int64_t i = 0; i < schedule.segments(b); ++i) {
        const int64_t at = schedule.segment(b, i);
        time += double(schedule.counts[at]) * schedule.sizes[at];
        const bool last = at >= schedule.rows;
        if (last ? finite_row(state + b * net.H, net.H)
                 : finite_row(pre + at * 2 * net.D, 2 * net.D) && finite_row(states + at * net.H, net.H))
          continue;
        throw std::runtime_error("state: not finite in series " + std::to_string(b) + " at " +
                                 (last ? "the end" : "row " + std::to_string(at)) + ", " + number(time) +
                                 " after its start");
      }
    }
  }
};

}  // namespace

// h0 [B, H]; values, masks [N, D]; dropout [N, 2, P] or nothing. Made: pre, post [N, 2D], state [B, H], states [N, H],
// steps [B, 3].
void gru_ode_fwd(const View& h0, const View& values, const View& masks, const View& dropout,
                 const std::vector<View>& params, const View& offsets, const View& counts, const View& sizes,
                 const View& jumps, int kind, bool impute, const std::vector<double>& method, double rtol, double atol,
                 int64_t max_steps, const View& pre, const View& post, const View& state, const View& states,
                 const View& steps) {
  with_accumulator(h0.dtype, [&](auto type) {
    using T = decltype(type);
    const Schedule schedule(offsets, counts, sizes, jumps);
    const Network<T> net(params, kind, impute, false);
    const Method<T> of(method, rtol, atol, max_steps);
    if (!schedule.sound(of.tableau.adaptive) ||
        !observed_are_finite(schedule.rows * net.D, pointer<T>(values), pointer<T>(masks)))
      throw std::invalid_argument("schedule, values: expected rows that rise, steps and observations that are finite");
    const std::vector<Plan> blocks = plans(schedule, openmp().found() ? openmp().max_threads() : 1, kSeries);
    const Filter<T> filter = {net,
                              of,
                              schedule,
                              pointer<T>(h0),
                              pointer<T>(values),
                              pointer<T>(masks),
                              pointer<T>(dropout),
                              pointer<T>(pre),
                              pointer<T>(post),
                              pointer<T>(state),
                              pointer<T>(states),
                              pointer<int64_t>(steps)};
    std::vector<Fault> faults(blocks.size());
    parallel_for(int64_t(blocks.size()), true, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) faults[k] = filter.run(blocks[k]);
    });
    // the first series that cannot go on, whatever the blocks: each by itself
    if (std::any_of(faults.begin(), faults.end(), [](const Fault& f) { return f.row >= 0; }))
      for (const Plan& alone : plans(schedule, schedule.series, 1)) faults.push_back(filter.run(alone));
    const Fault* first = nullptr;
    for (const Fault& f : faults)
      if (f.row >= 0 && (!first || f.row < first->row)) first = &f;
    if (first) throw std::runtime_error(first->what);
    filter.check();
  });
}

}  // namespace gru
}  // namespace fastflow

FASTFLOW_BIND(gru_ode) {
  namespace py = pybind11;
  m.def("gru_ode_fwd", &fastflow::gru::gru_ode_fwd, py::call_guard<py::gil_scoped_release>());
}
