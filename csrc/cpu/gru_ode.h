// What the passes of GRU-ODE-Bayes share: the schedule of a block of series, the networks with their matrices packed
// once for a call, and a step of the block. Rows are [n, padded width]; what pads a state stays zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "../gru_ode.h"
#include "tile.h"
#include "view.h"

namespace fastflow {
namespace gru {

// --- memory -------------------------------------------------------------------------------------------

// On cache lines; grows without keeping what it held.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { get(n); }
  T* get(int64_t n) {
    if (n > size_) {
      memory_.reset(static_cast<T*>(::operator new[](size_t(n) * sizeof(T), std::align_val_t(64))));
      size_ = n;
    }
    return memory_.get();
  }
  T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> memory_;
  int64_t size_ = 0;
};

template <class T>
T* pointer(const View& v) {
  return reinterpret_cast<T*>(v.data);
}

// --- the schedule -------------------------------------------------------------------------------------

struct Schedule {
  const int64_t *offsets, *counts;
  const double* sizes;
  const int64_t* jumps;
  int64_t series, rows;

  Schedule(const View& o, const View& c, const View& s, const View& j)
      : offsets(pointer<int64_t>(o)),
        counts(pointer<int64_t>(c)),
        sizes(pointer<double>(s)),
        jumps(pointer<int64_t>(j)),
        series(o.size[0] - 1),
        rows(j.size[0]) {}

  // Is it as the op's contract has it? Python says what is not.
  bool sound(bool adaptive) const {
    if (offsets[0] != 0 || offsets[series] != rows) return false;
    for (int64_t b = 0; b < series; ++b)
      if (offsets[b] > offsets[b + 1]) return false;
    for (int64_t i = 0; i < rows + series; ++i)
      if (counts[i] < 0 || (adaptive && counts[i] > 1) || !(sizes[i] >= 0) || std::isinf(sizes[i])) return false;
    return true;
  }
  int64_t segments(int64_t b) const { return offsets[b + 1] - offsets[b] + 1; }
  int64_t segment(int64_t b, int64_t i) const { return i + 1 < segments(b) ? offsets[b] + i : rows + b; }
  int64_t ticks(int64_t b) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < segments(b); ++i) sum += counts[segment(b, i)];
    return sum;
  }
};

// The series of a block side by side, the longest first: at tick t the series with more than t steps are the first
// active(t) of them, and every one has made t of its steps.
struct Plan {
  struct Event {
    int64_t tick, level, slot, row;  // level: rows of the same series at the same tick come one after the other
  };
  struct Segment {
    int64_t end;  // tick
    double size;
  };
  std::vector<int64_t> series, ticks;          // of every slot
  std::vector<Event> events;                   // sorted by tick and level
  std::vector<int64_t> groups;                 // where each (tick, level) begins; and the end
  std::vector<std::vector<Segment>> segments;  // of every slot, those with steps

  Plan(const Schedule& s, std::vector<int64_t> members, const std::vector<int64_t>& total)
      : series(std::move(members)) {
    segments.resize(series.size());
    for (int64_t slot = 0; slot < size(); ++slot) {
      const int64_t b = series[slot];
      ticks.push_back(total[b]);
      int64_t tick = 0, level = 0;
      for (int64_t i = 0; i < s.segments(b); ++i) {
        const int64_t at = s.segment(b, i);
        if (s.counts[at] > 0) segments[slot].push_back({tick += s.counts[at], s.sizes[at]}), level = 0;
        if (at < s.rows) events.push_back({tick, level++, slot, at});
      }
    }
    std::stable_sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
      return a.tick != b.tick ? a.tick < b.tick : a.level < b.level;
    });
    for (size_t i = 0; i < events.size(); ++i)
      if (i == 0 || events[i].tick != events[i - 1].tick || events[i].level != events[i - 1].level)
        groups.push_back(int64_t(i));
    groups.push_back(int64_t(events.size()));
  }
  int64_t size() const { return int64_t(series.size()); }
  int64_t length() const { return ticks.empty() ? 0 : ticks[0]; }
  int64_t group_count() const { return int64_t(groups.size()) - 1; }
  int64_t tick_of(int64_t group) const { return events[groups[group]].tick; }
  int64_t active(int64_t tick) const {
    return std::partition_point(ticks.begin(), ticks.end(), [&](int64_t n) { return n > tick; }) - ticks.begin();
  }
};

// All blocks, of at most `most` series: dealt out by length, so that blocks take about as long as each other. Their
// number is a multiple of `ways`, if there are as many series.
inline std::vector<Plan> plans(const Schedule& s, int64_t ways, int64_t most) {
  std::vector<int64_t> order(s.series), total(s.series);
  for (int64_t b = 0; b < s.series; ++b) total[b] = s.ticks(b);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return total[a] > total[b]; });
  const int64_t blocks = std::min(s.series, (s.series + ways * most - 1) / (ways * most) * ways);
  std::vector<Plan> made;
  for (int64_t k = 0; k < blocks; ++k) {
    std::vector<int64_t> members;
    for (int64_t i = k; i < s.series; i += blocks) members.push_back(order[i]);
    made.emplace_back(s, std::move(members), total);
  }
  return made;
}

// Step sizes, tick after tick.
class Clock {
 public:
  Clock(const Plan& plan, int64_t tick) : plan_(plan), at_(plan.size()) {
    for (int64_t slot = 0; slot < plan.size(); ++slot) {
      const auto& s = plan.segments[slot];
      at_[slot] =
          std::partition_point(s.begin(), s.end(), [&](const Plan::Segment& a) { return a.end <= tick; }) - s.begin();
    }
  }
  // of the step from `tick`, which does not decrease from call to call
  template <class To>
  void sizes(int64_t tick, int64_t active, To* to) {
    for (int64_t slot = 0; slot < active; ++slot) {
      const auto& s = plan_.segments[slot];
      while (s[at_[slot]].end <= tick) ++at_[slot];
      to[slot] = To(s[at_[slot]].size);
    }
  }

 private:
  const Plan& plan_;
  std::vector<int64_t> at_;
};

// --- the networks -------------------------------------------------------------------------------------

// y = W x + b
template <class T>
struct Linear {
  int64_t out = 0, in = 0;
  Buffer<T> forward, backward, bias;  // [in, padded out], [out, padded in], [padded out] where there is one

  Linear() = default;
  Linear(const T* w, int64_t rows, int64_t columns, const T* b, bool both) : out(rows), in(columns) {
    const int64_t m = padded(out), n = padded(in);
    T* f = forward.get(in * m);
    std::fill_n(f, in * m, T(0));
    for (int64_t i = 0; i < out; ++i)
      for (int64_t k = 0; k < in; ++k) f[k * m + i] = w[i * in + k];
    if (both) {
      T* g = backward.get(out * n);
      std::fill_n(g, out * n, T(0));
      for (int64_t i = 0; i < out; ++i) std::copy_n(w + i * in, in, g + i * n);
    }
    if (b) std::fill_n(bias.get(m), m, T(0)), std::copy_n(b, out, bias.data());
  }
  void apply(int64_t n, const T* x, T* y, bool add = false) const {
    const int64_t row = padded(out);
    if (bias.data()) {
      for (int64_t i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t j = 0; j < row; ++j) y[i * row + j] = bias.data()[j] + (add ? y[i * row + j] : T(0));
      add = true;
    }
    multiply(Product<T>{n, row, in, x, padded(in), 1, forward.data(), row, y, row, add});
  }
  // the gradient of x from that of y
  void pull(int64_t n, const T* gy, T* gx, bool add) const {
    multiply(Product<T>{n, padded(in), out, gy, padded(out), 1, backward.data(), padded(in), gx, padded(in), add});
  }
};

// The evaluations of the dynamics for n rows, [n, padded width] each.
template <class T>
struct Evaluation {
  T *y, *gate, *rest, *u, *g;    // the state, r (minimal: z), 1 - z (minimal: scratch), u, r h
  T *q = nullptr, *x = nullptr;  // imputing: hidden units of the prediction, and the prediction
  T* gq = nullptr;               // its gradient
};

template <class T>
struct Jump {
  T *h, *q, *p;           // the state before, hidden units of the prediction, the prediction
  T *x, *r, *z, *n, *hn;  // what the observation is made to, and the gates
};

template <class T>
struct Network {
  CellKind kind;
  bool imputes;
  int64_t H, P, D, Q;
  std::vector<Linear<T>> cell, input;  // r, z, u or z, u
  Linear<T> hidden, predict;
  Linear<T> ih[3], hh[3];
  const T *prep, *prep_bias;  // [D, 4, Q], [D, Q]

  // params: as fastflow/ops/gru_ode.py has them
  Network(const std::vector<View>& params, int cell_kind, bool impute, bool both)
      : kind(CellKind(cell_kind)), imputes(impute) {
    const View* v = params.data();
    const View& stacked = *v++;
    H = stacked.size[1];
    const View* in = v;
    if (imputes) v += 2;
    P = v[0].size[0], D = v[4].size[0], Q = v[5].size[1];
    for (int64_t i = 0; i < gates(); ++i) {
      cell.emplace_back(pointer<T>(stacked) + i * H * H, H, H, nullptr, both);
      if (imputes) input.emplace_back(pointer<T>(in[0]) + i * H * 2 * D, H, 2 * D, pointer<T>(in[1]) + i * H, both);
    }
    hidden = Linear<T>(pointer<T>(v[0]), P, H, pointer<T>(v[1]), both);
    predict = Linear<T>(pointer<T>(v[2]), 2 * D, P, pointer<T>(v[3]), both);
    prep = pointer<T>(v[4]), prep_bias = pointer<T>(v[5]);
    for (int64_t i = 0; i < 3; ++i) {
      ih[i] = Linear<T>(pointer<T>(v[6]) + i * H * D * Q, H, D * Q, pointer<T>(v[8]) + i * H, both);
      hh[i] = Linear<T>(pointer<T>(v[7]) + i * H * H, H, H, pointer<T>(v[9]) + i * H, both);
    }
  }
  int64_t gates() const { return kind == CellKind::full ? 3 : 2; }
  int64_t h_row() const { return padded(H); }
  int64_t q_row() const { return padded(P); }
  int64_t p_row() const { return padded(2 * D); }
  int64_t x_row() const { return padded(D * Q); }

  // --- prediction

  // drop: row i has its factors at drop + rows[i] * 2 P
  void observe(int64_t n, const T* h, const T* drop, const int64_t* rows, T* q, T* p) const {
    hidden.apply(n, h, q);
    const int64_t row = q_row();
#pragma omp simd
    for (int64_t i = 0; i < n * row; ++i) q[i] = q[i] < T(0) ? T(0) : q[i];  // NaN stays
    for (int64_t i = 0; drop && i < n; ++i)
      for (int64_t j = 0; j < P; ++j) q[i * row + j] *= drop[rows[i] * 2 * P + j];
    predict.apply(n, q, p);
  }
  // adds to the gradient of h; gq is made
  void observe_backward(int64_t n, const T* gp, const T* q, const T* drop, const int64_t* rows, T* gq, T* gh) const {
    const int64_t row = q_row();
    predict.pull(n, gp, gq, false);
#pragma omp simd
    for (int64_t i = 0; i < n * row; ++i) gq[i] = q[i] == T(0) ? T(0) : gq[i];
    for (int64_t i = 0; drop && i < n; ++i)
      for (int64_t j = 0; j < P; ++j) gq[i * row + j] *= drop[rows[i] * 2 * P + j];
    hidden.pull(n, gq, gh, true);
  }

  // --- dynamics

  int64_t evaluation_size() const { return 5 * h_row() + (imputes ? 2 * q_row() + p_row() : 0); }
  // the evaluations of up to `capacity` rows in memory of evaluation_size() each, from row `first` on
  Evaluation<T> evaluation(T* memory, int64_t capacity, int64_t first) const {
    const int64_t row = h_row(), all = capacity * row;
    T* m = memory + first * row;
    Evaluation<T> e = {m, m + all, m + 2 * all, m + 3 * all, m + 4 * all};
    if (imputes) {
      T* more = memory + 5 * all;
      e.q = more + first * q_row();
      e.gq = more + (capacity + first) * q_row();
      e.x = more + 2 * capacity * q_row() + first * p_row();
    }
    return e;
  }

  // k = dh/dt at e.y
  void evaluate(int64_t n, const Evaluation<T>& e, T* k) const {
    if (imputes) observe(n, e.y, nullptr, nullptr, e.q, e.x);
    const auto affine = [&](int64_t i, const T* from, T* to) {
      cell[i].apply(n, from, to);
      if (imputes) input[i].apply(n, e.x, to, true);
    };
    affine(0, e.y, e.gate);
    enter(n * h_row(), e.y, e.gate, e.g);
    if (kind == CellKind::full) affine(1, e.y, e.rest);
    affine(gates() - 1, e.g, e.u);
    if (kind == CellKind::full)
      rate(n * h_row(), e.y, e.rest, e.u, k);
    else
      rate_minimal(n * h_row(), e.y, e.gate, e.u, k);
  }
  static void enter(int64_t n, const T* h, T* gate, T* g) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T r = sigmoid(gate[i]);
      gate[i] = r, g[i] = r * h[i];
    }
  }
  static void rate(int64_t n, const T* h, T* rest, T* u, T* k) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T a, c;
      k[i] = full_rate(u[i], rest[i], h[i], a, c);
      u[i] = a, rest[i] = c;
    }
  }
  static void rate_minimal(int64_t n, const T* h, const T* gate, T* u, T* k) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T a;
      k[i] = minimal_rate(u[i], gate[i], h[i], a);
      u[i] = a;
    }
  }

  // --- the jump

  int64_t jump_size() const { return 5 * h_row() + q_row() + p_row() + x_row(); }
  Jump<T> jumps(T* m, int64_t n) const {
    Jump<T> j;
    for (T** part : {&j.h, &j.r, &j.z, &j.n, &j.hn}) *part = m, m += n * h_row();
    j.q = m, m += n * q_row();
    j.p = m, m += n * p_row();
    j.x = m;
    return j;
  }
  // from j.h and j.p to the new states; values and masks [N, D]
  void leap(int64_t n, const Jump<T>& j, const T* values, const T* masks, const int64_t* rows, T* to) const {
    for (int64_t i = 0; i < n; ++i)
      prepare(j.p + i * p_row(), values + rows[i] * D, masks + rows[i] * D, j.x + i * x_row());
    T* const gates[3] = {j.r, j.z, j.n};
    for (int g = 0; g < 3; ++g) ih[g].apply(n, j.x, gates[g]);
    for (int g = 0; g < 2; ++g) hh[g].apply(n, j.h, gates[g], true);
    hh[2].apply(n, j.h, j.hn);
    land(n * h_row(), j.h, j.r, j.z, j.n, j.hn, to);
  }
  static void land(int64_t n, const T* h, T* r, T* z, T* m, const T* hn, T* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T a = r[i], b = z[i], c = m[i];
      to[i] = jump(a, b, c, hn[i], h[i]);
      r[i] = a, z[i] = b, m[i] = c;
    }
  }
  void prepare(const T* p, const T* values, const T* masks, T* x) const {
    std::fill_n(x, x_row(), T(0));
    for (int64_t d = 0; d < D; ++d) {
      if (masks[d] == T(0)) continue;
      const Features<T> f = features(values[d], p[d], p[D + d]);
      const T *w = prep + d * 4 * Q, *b = prep_bias + d * Q;
      T* to = x + d * Q;
      for (int64_t i = 0; i < Q; ++i) {
        const T a = b[i] + f.value * w[i] + f.mean * w[Q + i] + f.logvar * w[2 * Q + i] + f.error * w[3 * Q + i];
        to[i] = a < T(0) ? T(0) : a;
      }
    }
  }
};

}  // namespace gru
}  // namespace fastflow
