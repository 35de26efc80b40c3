// Steps of the dynamics of GRU-ODE-Bayes for some rows: of given sizes, or as the tolerances want them.
#pragma once

#include <string>
#include <vector>

#include "../ode.h"
#include "gru_ode.h"

namespace fastflow {
namespace gru {

// out = base + step (sum over i of weights[i] k[i]), base may be nothing; a row has its own step, and its own weights
// where `each`
template <bool each, class T>
void combine(int64_t n, int64_t row, const T* base, const T* step, const T* weights, int64_t count, const T* k,
             int64_t k_stage, T* out) {
  constexpr int64_t W = kPad;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t l = j * row; l < (j + 1) * row; l += W) {
      T sum[W] = {};
      for (int64_t i = 0; i < count; ++i) {
        const T w = weights[each ? j * count + i : i];
        if (w == T(0)) continue;
        const T* from = k + i * k_stage + l;
#pragma omp simd
        for (int64_t c = 0; c < W; ++c) sum[c] += w * from[c];
      }
      const T h = step[j];
#pragma omp simd
      for (int64_t c = 0; c < W; ++c) out[l + c] = (base ? base[l + c] : T(0)) + h * sum[c];
    }
}

// A method with its weights in T.
template <class T>
struct Method {
  Tableau tableau;
  std::vector<T> a, b;
  double rtol, atol;
  int64_t max_steps;

  Method(const std::vector<double>& flat, double r, double at, int64_t most)
      : tableau(flat.data()), rtol(r), atol(at), max_steps(most) {
    const int64_t s = tableau.stages;
    a.assign(tableau.a, tableau.a + s * s);
    b.assign(tableau.b, tableau.b + s);
  }
  int64_t stages() const { return tableau.stages; }
  const T* row(int64_t i) const { return a.data() + i * stages(); }
};

struct Fault {
  int64_t row = -1;  // none
  std::string what;
};

inline std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", x);
  return text;
}

template <class T>
class Steps {
 public:
  Steps(const Network<T>& network, const Method<T>& m, int64_t rows)
      : net(network),
        method(m),
        capacity(rows),
        row(network.h_row()),
        memory(rows * network.evaluation_size()),
        slopes(m.stages() * rows * row) {}

  // h after one step of size step[i] each
  void fixed(int64_t n, const T* step, T* h) {
    Evaluation<T> e = net.evaluation(memory.data(), capacity, 0);
    T* point = e.y;
    for (int64_t i = 0; i < method.stages(); ++i) {
      e.y = stage_point(n, i, step, h, point);
      net.evaluate(n, e, slope(i));
    }
    combine<false>(n, row, h, step, method.b.data(), method.stages(), slopes.data(), capacity * row, h);
  }

  // the evaluations of the first stages of such a step, kept: where(i) says where
  template <class Where>
  void kept(int64_t n, int64_t stages, const T* step, const T* h, const Where& where) {
    for (int64_t i = 0; i < stages; ++i) {
      const Evaluation<T> e = where(i);
      if (stage_point(n, i, step, h, e.y) == h) std::copy_n(h, n * row, e.y);
      net.evaluate(n, e, slope(i));
    }
  }
  // h + step b k of the last evaluations
  void finish(int64_t n, const T* step, T* h) const {
    combine<false>(n, row, h, step, method.b.data(), method.stages(), slopes.data(), capacity * row, h);
  }

  // h after gap[i] each, in steps of its own; a step may end beyond, the state is then interpolated.
  // accepted(i, state before, size, theta): theta is how much of the step was needed.
  template <class Accepted>
  Fault adaptive(int64_t n, const double* gap, T* h, int64_t* const* counts, const Accepted& accepted) {
    const int64_t s = method.stages(), H = net.H;
    const Tableau& m = method.tableau;
    std::vector<int64_t> who;
    for (int64_t i = 0; i < n; ++i)
      if (gap[i] > 0) who.push_back(i);
    if (who.empty()) return {};
    T* y = state.get(capacity * row);
    T* fresh = next.get(capacity * row);
    for (size_t j = 0; j < who.size(); ++j) std::copy_n(h + who[j] * row, row, y + j * row);
    std::vector<double> t(who.size(), 0.0), step(who.size());
    std::vector<T> size(who.size()), weights;
    Evaluation<T> e = net.evaluation(memory.data(), capacity, 0);
    T* point = e.y;
    const auto at = [&](int64_t i, const T* from) {
      e.y = const_cast<T*>(from);
      net.evaluate(int64_t(who.size()), e, slope(i));
    };
    // the first step
    at(0, y);
    std::vector<double> bend(who.size());
    for (size_t j = 0; j < who.size(); ++j) {
      const T *yj = y + j * row, *kj = slope(0) + j * row;
      const double d0 = norm(H, [&](int64_t i) { return yj[i] / scale(yj[i]); });
      const double d1 = norm(H, [&](int64_t i) { return kj[i] / scale(yj[i]); });
      if (!(finite(d0) && finite(d1))) return {who[j], "not finite at 0 of " + number(gap[who[j]])};
      step[j] = trial_step(d0, d1), bend[j] = d1, size[j] = T(step[j]);
      counts[who[j]][0] += 2;
    }
    const T one = T(1);
    combine<false>(int64_t(who.size()), row, y, size.data(), &one, 1, slope(0), 0, point);
    at(1, point);
    for (size_t j = 0; j < who.size(); ++j) {
      const T *yj = y + j * row, *k0 = slope(0) + j * row, *k1 = slope(1) + j * row;
      const double d2 = norm(H, [&](int64_t i) { return double(k1[i] - k0[i]) / scale(yj[i]); }) / step[j];
      step[j] = first_step(step[j], bend[j], d2, m.order);
    }
    for (int64_t tried = 0; !who.empty(); ++tried) {
      for (size_t j = 0; j < who.size(); ++j) {
        const std::string place = " at " + number(t[j]) + " of " + number(gap[who[j]]);
        if (!(t[j] + step[j] > t[j])) return {who[j], "the step underflows" + place};
        if (tried == method.max_steps) return {who[j], "still" + place + " after " + std::to_string(tried) + " steps"};
        size[j] = T(step[j]);
      }
      const int64_t rows = int64_t(who.size());
      for (int64_t i = 1; i < s; ++i) at(i, stage_point(rows, i, size.data(), y, point));
      combine<false>(rows, row, y, size.data(), method.b.data(), s, slopes.data(), capacity * row, fresh);
      size_t left = 0;
      for (size_t j = 0; j < who.size(); ++j) {
        const T *yj = y + j * row, *nj = fresh + j * row;
        const double ratio = norm(H, [&](int64_t i) {
          T sum = T(0);
          for (int64_t c = 0; c < s; ++c) sum += T(m.error[c]) * slope(c)[j * row + i];
          const T a = abs(yj[i]), b = abs(nj[i]);
          return double(size[j] * sum) / (method.atol + method.rtol * double(a > b ? a : b));
        });
        const int64_t i = who[j];
        const bool good = ratio <= 1, done = good && t[j] + step[j] >= gap[i];
        counts[i][0] += s - 1, ++counts[i][good ? 1 : 2];
        if (good) accepted(i, yj, size[j], done ? (gap[i] - t[j]) / step[j] : 1.0);
        if (done) {
          dense((gap[i] - t[j]) / step[j], weights);
          combine<false>(1, row, yj, &size[j], weights.data(), s, slopes.data() + j * row, capacity * row, h + i * row);
          continue;
        }
        if (good) t[j] += step[j];
        // rows that go on close up
        std::copy_n(good ? nj : yj, row, y + left * row);
        std::copy_n(slope(good ? s - 1 : 0) + j * row, row, slope(0) + left * row);
        who[left] = i, t[left] = t[j], step[left] = step[j] * growth(ratio, m.order);
        ++left;
      }
      for (auto* v : {&t, &step}) v->resize(left);
      who.resize(left);
    }
    return {};
  }
  // b_i(theta)
  void dense(double theta, std::vector<T>& weights) const {
    weights.resize(method.stages());
    for (int64_t i = 0; i < method.stages(); ++i) weights[i] = T(method.tableau.dense(int(i), theta));
  }

  T* slope(int64_t i) { return slopes.data() + i * capacity * row; }

  const Network<T>& net;
  const Method<T>& method;
  const int64_t capacity, row;

 private:
  // h + step a k; h itself for the first stage
  T* stage_point(int64_t n, int64_t i, const T* step, const T* h, T* to) {
    if (i == 0) return const_cast<T*>(h);
    combine<false>(n, row, h, step, method.row(i), i, slopes.data(), capacity * row, to);
    return to;
  }
  double scale(T y) const { return method.atol + method.rtol * double(abs(y)); }
  template <class F>
  static double norm(int64_t n, const F& f) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = double(f(i));
      sum += x * x;
    }
    return std::sqrt(sum / double(n));
  }

  Buffer<T> memory, slopes, state, next;
};

}  // namespace gru
}  // namespace fastflow
