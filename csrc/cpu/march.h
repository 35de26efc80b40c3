// Runge-Kutta steps on blocks of samples, with the control of fastflow/ops/ode_reference.py: the whole batch in the
// same steps, which are decided on between two sweeps over the blocks; or every sample in its own, or all in fixed
// ones, where a block goes through all of its steps without waiting for others.
//
// A block's state y and its derivatives k are one row of numbers each: one or two segments [count, D] (x; of the
// adjoint x and a), padded, then quadratures [count] each (a trace for every probe, two energies), padded.
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ode.h"
#include "dynamics.h"

namespace fastflow {

constexpr int kNorms = 4;  // parts of a state with a norm of their own: two segments at most, trace, two energies

struct Control {
  double rtol, atol, step_size;
  bool per_sample, exact, regularize;

  explicit Control(const std::vector<double>& v)
      : rtol(v.at(0)),
        atol(v.at(1)),
        step_size(v.at(2)),
        per_sample(v.at(3) != 0),
        exact(v.at(4) != 0),
        regularize(v.at(5) != 0) {}
  bool fixed(const Tableau& method) const { return step_size > 0 || !method.adaptive; }
};

// What chooses the steps of a batch or of one sample.
struct Controller {
  double t = 0, h = 0, end = 0, ratio = 0;  // of the step at hand: h = 0 when there is none, its end, its error's norm
  double next = 0;                          // size of the step after it
  bool moved = false;                       // it was accepted
  int64_t evaluations = 0, accepted = 0, rejected = 0, spacing = 1, before = 1;  // spacing before this step
};

// The failure of a solve; the first of several is the one that is told.
struct Failure {
  std::string what;
  double t, h;
  int64_t step, sample;
  static constexpr const char* not_finite = "the state or its derivative is not finite";
  static std::string too_many(int64_t steps) { return "more than " + std::to_string(steps) + " steps"; }

  bool operator<(const Failure& o) const { return step != o.step ? step < o.step : sample < o.sample; }
  [[noreturn]] void raise() const {
    char text[256];
    std::snprintf(text, sizeof(text), "%s at t = %.6g, step %lld, h = %.3g, first in sample %lld", what.c_str(), t,
                  static_cast<long long>(step), h, static_cast<long long>(sample));
    throw std::runtime_error(text);
  }
};

template <class T>
struct Block {
  int64_t first, count, width, segments, quadratures;  // width D
  int64_t segment, size;                               // of one segment; of all
  Memory<T> memory;
  T *y, *after, *error, *sizes, *k[Tableau::max_stages];  // sizes: h of every number
  T* probes;                                              // [count, 1 + S, D], with room for x
  std::vector<double> squares[2];                         // [count, kNorms]: mean squares, for the norms

  Block(int64_t at, int64_t n, int64_t dim, int64_t segment_count, int64_t quadrature_count, int64_t tangents,
        const Tableau& method)
      : first(at),
        count(n),
        width(dim),
        segments(segment_count),
        quadratures(quadrature_count),
        segment(padded(n * dim)),
        size(segments * segment + padded(quadratures * n)) {
    const int64_t rows = padded(count * (1 + tangents) * width);
    memory = allocate<T>((4 + method.stages) * size + rows);
    std::fill_n(memory.get(), (4 + method.stages) * size, T(0));
    T* p = memory.get();
    y = p, after = p += size, error = p += size, sizes = p += size;
    for (int i = 0; i < method.stages; ++i) k[i] = p += size;
    probes = p += size;
    for (auto& s : squares) s.resize(count * kNorms);
  }
  // h of every sample at its numbers
  void spread(const Controller* c) {
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t b = 0; b < count; ++b) std::fill_n(sizes + s * segment + b * width, width, T(c[b].h));
    for (int64_t q = 0; q < quadratures; ++q)
      for (int64_t b = 0; b < count; ++b) sizes[segments * segment + q * count + b] = T(c[b].h);
  }
};

// out = y (or nothing) + h sum_i weight(i) k_i over the stages before `stages`; of one h, or of sizes [n]
template <class T, class F>
void combine(const T* y, T* const* k, int stages, const F& weight, double h, const T* sizes, int64_t n, T* out) {
  constexpr int64_t piece = 256;
  for (int64_t first = 0; first < n; first += piece) {
    const int64_t m = std::min(piece, n - first);
    T sum[piece] = {};
    for (int i = 0; i < stages; ++i) {
      const double w = weight(i);
      if (w == 0) continue;
      const T by = sizes ? T(w) : T(h * w);
      const T* from = k[i] + first;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) sum[j] += by * from[j];
    }
    T* to = out + first;
    if (sizes)
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) sum[j] *= sizes[first + j];
    if (y)
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) to[j] = y[first + j] + sum[j];
    else
      std::copy_n(sum, m, to);
  }
}

// --- norms --------------------------------------------------------------------------------------------------------

// Mean squares of e / (atol + rtol max(|y|, |z|)) for every sample and part of the state: [count, kNorms]
template <class T>
void mean_squares(const Block<T>& block, const Control& control, int64_t probes, const T* e, const T* y, const T* z,
                  std::vector<double>& out) {
  const double atol = control.atol, rtol = control.rtol;
  const auto square = [=](double error, double before, double after) {
    const double scale = atol + rtol * std::max(std::abs(before), std::abs(after));
    const double r = error == 0 ? 0 : error / scale;
    return r * r;
  };
  std::fill(out.begin(), out.end(), 0.0);
  for (int64_t s = 0; s < block.segments; ++s)
    for (int64_t b = 0; b < block.count; ++b) {
      const int64_t at = s * block.segment + b * block.width;
      double sum = 0;
      for (int64_t d = at; d < at + block.width; ++d) sum += square(e[d], y[d], z[d]);
      out[b * kNorms + s] = sum / block.width;
    }
  const int64_t at = block.segments * block.segment, n = block.count;
  if (probes)
    for (int64_t b = 0; b < n; ++b) {
      double of[3] = {};
      for (int64_t q = at + b; q < at + probes * n; q += n) of[0] += e[q], of[1] += y[q], of[2] += z[q];
      if (!control.exact)
        for (double& v : of) v /= probes;
      out[b * kNorms + block.segments] = square(of[0], of[1], of[2]);
    }
  for (int64_t q = probes; q < block.quadratures; ++q)
    for (int64_t b = 0; b < n; ++b) {
      const int64_t i = at + q * n + b;
      out[b * kNorms + block.segments + (probes > 0) + q - probes] = square(e[i], y[i], z[i]);
    }
}

// The norm of a sample, and of all: the largest of the parts' root mean squares; infinite where it is not a number
inline double norm(const double* squares, double samples = 1) {
  double most = 0;
  for (int i = 0; i < kNorms; ++i)
    most = squares[i] <= std::numeric_limits<double>::max() ? std::max(most, squares[i])
                                                            : std::numeric_limits<double>::infinity();
  return std::sqrt(most / samples);
}

template <class T>
bool all_finite(const T* values, int64_t n, int64_t step = 1) {
  bool good = true;
  for (int64_t i = 0; i < n; ++i) good &= values[i * step] - values[i * step] == T(0);
  return good;
}

// sample b of a state, all of its numbers
template <class T>
bool sample_finite(const Block<T>& block, const T* y, int64_t b) {
  bool good = true;
  for (int64_t s = 0; s < block.segments; ++s) good &= all_finite(y + s * block.segment + b * block.width, block.width);
  return good && all_finite(y + block.segments * block.segment + b, block.quadratures, block.count);
}

// --- the walk -------------------------------------------------------------------------------------------------------

// The times of fixed steps, as ode_reference.grid()
inline std::vector<double> grid(const std::vector<double>& times, double step_size) {
  std::vector<double> points;
  const double start = times.front(), end = times.back();
  if (step_size <= 0 || start == end) {
    for (double t : times)
      if (points.empty() || t != points.back()) points.push_back(t);
    return points;
  }
  const double size = end > start ? step_size : -step_size;
  const int64_t count = int64_t(std::ceil((end - start) / size + 1));
  for (int64_t i = 0; i + 1 < count; ++i) points.push_back(start + double(i) * size);
  points.push_back(end);
  return points;
}

// The steps of some blocks from the first to the last of `times`. A System gives
//   scratch()                                                           what a thread needs
//   derivative(scratch, block, controllers, each, fraction, state, k)   at t + fraction h of the step at hand
//   accepted(scratch, block, controllers, each)                         a step was made by those that moved
// A sample's controller is controllers[b * each], each 0 or 1.
template <class T, class System>
struct March {
  const Tableau& method;
  const Control& control;
  const std::vector<double>& times;
  int64_t probes, max_steps, room;  // estimates of the trace in the state; attempts; states that are kept
  System& system;
  std::vector<Block<T>>& blocks;
  int64_t begin, end;  // blocks of this walk

  std::vector<Controller> controllers{};
  double direction = times.back() >= times.front() ? 1 : -1;

  bool own() const { return control.per_sample; }  // controllers
  bool active(const Controller& c) const { return direction * (times.back() - c.t) > 0; }

  void run() {
    controllers.assign(own() ? blocks[begin].count : 1, Controller());
    for (Controller& c : controllers) c.t = c.end = times.front();
    if (!active(controllers[0])) return;
    control.fixed(method) ? fixed() : adaptive();
  }

  template <class F>
  void sweep(const F& f) {
    if (end - begin == 1) {  // perhaps beside others
      auto scratch = system.scratch();
      return f(scratch, blocks[begin]);
    }
    const Groups groups(end - begin);
    parallel_for(groups.count, true, [&](int64_t from, int64_t to) {
      auto scratch = system.scratch();
      for (int64_t k = begin + from * groups.size; k < std::min(end, begin + to * groups.size); ++k)
        f(scratch, blocks[k]);
    });
  }

  void fixed() {
    const double size = control.step_size, length = std::abs(times.back() - times.front());
    // before there is a grid of them; the division may overflow
    if (size > 0 && !(length / size < double(max_steps) + 1))
      throw Failure{Failure::too_many(max_steps), times.front(), direction * size, 1, 0};
    const std::vector<double> points = grid(times, size);
    const int64_t count = int64_t(points.size()) - 1;
    Controller& c = controllers[0];
    if (count > max_steps) throw Failure{Failure::too_many(max_steps), points[0], points[1] - points[0], 1, 0};
    c.moved = true, c.evaluations = method.fsal + count * (method.stages - method.fsal);
    for (int64_t i = 0; i < count; ++i) {
      c.t = points[i], c.h = points[i + 1] - points[i];
      c.end = i + 1 < count ? points[i + 1] : direction * std::numeric_limits<double>::infinity();
      space(c);
      sweep([&](auto& scratch, Block<T>& block) {
        if (i == 0 || !method.fsal) system.derivative(scratch, block, &c, 0, 0, block.y, block.k[0]);
        stages(scratch, block);
        system.accepted(scratch, block, &c, 0);
        advance(block);
      });
      ++c.accepted;
      finite(c.t + c.h, c.h, i + 1);
    }
  }

  void adaptive() {
    first_steps();
    while (std::any_of(controllers.begin(), controllers.end(), [&](const Controller& c) { return active(c); })) {
      for (Controller& c : controllers) c.h = active(c) ? c.next : 0, c.end = c.t + c.h;
      check();
      sweep([&](auto& scratch, Block<T>& block) {
        stages(scratch, block);
        combine<T>(
            nullptr, block.k, method.stages, [&](int j) { return method.error[j]; }, controllers[0].h,
            own() ? block.sizes : nullptr, block.size, block.error);
        mean_squares(block, control, probes, block.error, block.y, block.after, block.squares[0]);
        if (all_finite(block.after, block.size)) return;
        for (int64_t b = 0; b < block.count; ++b)
          if (!sample_finite(block, block.after, b))
            block.squares[0][b * kNorms] = std::numeric_limits<double>::infinity();
      });
      const std::vector<double> ratios = norms(0);
      bool any = false;
      for (size_t r = 0; r < controllers.size(); ++r) {
        Controller& c = controllers[r];
        if (!active(c)) {
          c.moved = false;
          continue;
        }
        c.ratio = ratios[r], c.moved = c.ratio <= 1, c.evaluations += method.stages - 1;
        c.next = c.h * growth(c.ratio, method.order);
        c.moved ? space(c) : void(++c.rejected);
        any |= c.moved;
      }
      if (!any) continue;
      sweep([&](auto& scratch, Block<T>& block) {
        system.accepted(scratch, block, controllers.data(), own());
        advance(block);
      });
      for (Controller& c : controllers)
        if (c.moved) c.t = c.end, ++c.accepted;
    }
  }

  // stages 1 ... of the step at hand, and the state after it
  template <class Scratch>
  void stages(Scratch& scratch, Block<T>& block) {
    const Controller* c = controllers.data();
    if (own()) block.spread(c);
    const T* sizes = own() ? block.sizes : nullptr;
    for (int i = 1; i < method.stages; ++i) {
      const auto weight = [&](int j) { return method.weight(i, j); };
      combine(block.y, block.k, i, weight, c->h, sizes, block.segments * block.segment, block.after);
      system.derivative(scratch, block, c, own(), method.c[i], block.after, block.k[i]);
    }
    const auto weight = [&](int j) { return method.b[j]; };
    combine(block.y, block.k, method.stages, weight, c->h, sizes, block.size, block.after);
  }

  // on to the next step, for those that moved
  void advance(Block<T>& block) {
    T*& last = block.k[method.stages - 1];
    if (!own()) {
      std::swap(block.y, block.after);
      std::swap(block.k[0], last);
      return;
    }
    const auto copy = [&](int64_t at, int64_t n, int64_t step) {
      for (int64_t i = at; i < at + n * step; i += step) block.y[i] = block.after[i], block.k[0][i] = last[i];
    };
    for (int64_t b = 0; b < block.count; ++b) {
      if (!controllers[b].moved) continue;
      for (int64_t s = 0; s < block.segments; ++s) copy(s * block.segment + b * block.width, block.width, 1);
      copy(block.segments * block.segment + b, block.quadratures, block.count);
    }
  }

  void first_steps() {
    sweep([&](auto& scratch, Block<T>& block) {
      system.derivative(scratch, block, controllers.data(), own(), 0, block.y, block.k[0]);
      mean_squares(block, control, probes, block.y, block.y, block.y, block.squares[0]);
      mean_squares(block, control, probes, block.k[0], block.y, block.y, block.squares[1]);
    });
    finite(controllers[0].t, 0, 1);
    const std::vector<double> state = norms(0), slope = norms(1);
    for (size_t r = 0; r < controllers.size(); ++r) controllers[r].h = direction * trial_step(state[r], slope[r]);
    sweep([&](auto& scratch, Block<T>& block) {
      if (own()) block.spread(controllers.data());
      T* k[2] = {block.k[0], block.error};
      combine(
          block.y, k, 1, [](int) { return 1.0; }, controllers[0].h, own() ? block.sizes : nullptr, block.size,
          block.after);
      system.derivative(scratch, block, controllers.data(), own(), 1, block.after, block.error);
      for (int64_t i = 0; i < block.size; ++i) block.error[i] -= block.k[0][i];
      mean_squares(block, control, probes, block.error, block.y, block.y, block.squares[0]);
    });
    const std::vector<double> bend = norms(0);
    for (size_t r = 0; r < controllers.size(); ++r) {
      Controller& c = controllers[r];
      const double trial = std::abs(c.h);
      c.next = direction * first_step(trial, slope[r], bend[r] / trial, method.order);
      c.evaluations = 2;
    }
    for (int64_t k = begin; k < end; ++k) std::fill(blocks[k].squares[0].begin(), blocks[k].squares[0].end(), 0.0);
  }

  // the norm of every controller, in double and in the order of the samples
  std::vector<double> norms(int which) const {
    std::vector<double> found;
    double sums[kNorms] = {};
    int64_t samples = 0;
    for (int64_t k = begin; k < end; ++k)
      for (int64_t b = 0; b < blocks[k].count; ++b, ++samples) {
        const double* of = blocks[k].squares[which].data() + b * kNorms;
        if (own()) found.push_back(norm(of));
        for (int i = 0; i < kNorms; ++i) sums[i] += of[i];
      }
    if (!own()) found.push_back(norm(sums, double(samples)));
    return found;
  }

  // the spacing of the states that are kept, with one more
  void space(Controller& c) const {
    c.before = c.spacing;
    while (room > 0 && full(c.accepted, c.spacing, room)) c.spacing *= 2;
  }

  // can the step at hand be tried?
  void check() const {
    // near an overflow the steps could shrink without end: below the rounding of the state it is given up
    const double finest = std::numeric_limits<T>::epsilon() * std::abs(times.back() - times.front());
    const Controller* bad = nullptr;
    std::string what;
    for (const Controller& c : controllers)
      if (!bad && active(c) && (c.t + c.h == c.t || (!finite_norm(c.ratio) && std::abs(c.h) < finest)))
        bad = &c, what = "the step underflows";
    for (const Controller& c : controllers)
      if (!bad && active(c) && c.accepted + c.rejected >= max_steps) bad = &c, what = Failure::too_many(max_steps);
    if (!bad) return;
    if (!finite_norm(bad->ratio)) what = Failure::not_finite;
    int64_t sample = blocks[begin].first + (bad - controllers.data());
    double worst = 0;
    for (int64_t k = begin; k < end && !own(); ++k)
      for (int64_t b = 0; b < blocks[k].count; ++b) {
        const double error = norm(blocks[k].squares[0].data() + b * kNorms);
        if (error > worst) worst = error, sample = blocks[k].first + b;
      }
    throw Failure{what, bad->t, bad->h, bad->accepted + bad->rejected + 1, sample};
  }
  static bool finite_norm(double x) { return fastflow::finite(x); }

  // are the state and the derivative at its step's start?
  void finite(double t, double h, int64_t step) const {
    for (int64_t k = begin; k < end; ++k) {
      const Block<T>& block = blocks[k];
      if (all_finite(block.y, block.size) && all_finite(block.k[0], block.size)) continue;
      for (int64_t b = 0; b < block.count; ++b)
        if (!sample_finite(block, block.y, b) || !sample_finite(block, block.k[0], b))
          throw Failure{Failure::not_finite, t, h, step, block.first + b};
    }
  }
};

// A walk over all blocks together where the batch shares its steps and chooses them; else one for every block, side by
// side. done(walk) after each.
template <class Make, class Done>
void march(const Tableau& method, const Control& control, int64_t blocks, const Make& make, const Done& done) {
  if (blocks == 1 || !(control.per_sample || control.fixed(method))) {
    auto walk = make(int64_t(0), blocks);
    try {
      walk.run();
    } catch (const Failure& failure) {
      failure.raise();
    }
    return done(walk);
  }
  std::vector<std::unique_ptr<Failure>> failed(blocks);
  const Groups groups(blocks);
  parallel_for(groups.count, true, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * groups.size; k < std::min(blocks, end * groups.size); ++k) {
      auto walk = make(k, k + 1);
      try {  // an exception must not leave a thread
        walk.run();
        done(walk);
      } catch (const Failure& failure) {
        failed[k] = std::make_unique<Failure>(failure);
      }
    }
  });
  const Failure* first = nullptr;
  for (const auto& failure : failed)
    if (failure && (!first || *failure < *first)) first = failure.get();
  if (first) first->raise();
}

}  // namespace fastflow
