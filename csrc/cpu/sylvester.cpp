// Sylvester flows on the CPU: K steps z' = z + Q R1 tanh(R2 Q^T z + b) of one sample after the other, its state and
// what a step leaves for its gradient in L1. R1 and R2 are read where they lie: two triangles of one matrix. Saved for
// backward: the inputs (of the inverse its output); the steps are computed again from there. Bound by reading the
// matrices and writing their gradients where M is large, by latency and Bjorck's iterations where it is small.
#include "../sylvester.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "module.h"
#include "sylvester_basis.h"

namespace fastflow {
namespace {

constexpr int64_t kParallelWork = 16 * 1024;  // elements of parameters below which a second thread costs more
constexpr int64_t kHeld = 1024 * 1024;        // bytes of parameters of a sample's steps that stay in the cache

// The tensors, or their gradients
struct Tensors {
  View full, diag1, diag2, bias, basis;  // [B, K, M M], [B, K, M] three times, [B, K, R D] or none
};

struct Problem {
  Tensors in;
  Basis kind;
  int64_t iterations, samples, d, steps, m, vectors;

  Problem(const View& z, const Tensors& t, int variant, int64_t n)
      : in(t),
        kind(Basis(variant)),
        iterations(n),
        samples(z.size[0]),
        d(z.size[1]),
        steps(t.bias.size[1]),
        m(t.bias.size[2]),
        vectors(t.basis && d > 0 ? t.basis.size[2] / d : 0) {
    const auto is = [&](const View& v, int64_t size) {
      return v && v.size[0] == samples && v.size[1] == steps && v.size[2] == size;
    };
    const bool triangular = kind == Basis::triangular;
    const bool basis_fits =
        triangular ? !in.basis : is(in.basis, vectors * d) && (kind != Basis::orthogonal || vectors == m);
    const bool columns_fit = kind == Basis::orthogonal ? m <= d : m == d;
    if (!is(in.full, m * m) || !is(in.diag1, m) || !is(in.diag2, m) || !is(in.bias, m) || !basis_fits || !columns_fit)
      throw std::invalid_argument("the parameters of a Sylvester flow do not go together");
  }
  bool worth_it() const { return samples * steps * (m * m + vectors * d) >= kParallelWork; }
  // are the parameters those of every sample?
  bool shared() const {
    for (const View* v : {&in.full, &in.diag1, &in.diag2, &in.bias, &in.basis})
      if (*v && v->stride[0] != 0) return false;
    return true;
  }
  // for how many steps the parameters stay ready on the way back
  int64_t held() const {
    const int64_t each = 8 * (kind == Basis::orthogonal ? 32 * m * m + 8 * m * d : m * m + 4 * vectors * d);
    return std::max<int64_t>(1, std::min(steps, kHeld / std::max<int64_t>(1, each)));
  }
};

// What the gradient of a step needs: its state before, y = Q^T z, h = tanh(a), 1 - h^2, u = R1 h.
template <class T>
class Record {
 public:
  Record(int64_t steps, int64_t d, int64_t m) : d_(padded(d)), m_(padded(m)), memory_(steps * (d_ + 4 * m_)) {}
  T* z(int64_t k) { return memory_.data() + k * (d_ + 4 * m_); }
  T* y(int64_t k) { return z(k) + d_; }
  T* h(int64_t k) { return y(k) + m_; }
  T* slope(int64_t k) { return h(k) + m_; }
  T* u(int64_t k) { return slope(k) + m_; }

 private:
  int64_t d_, m_;
  std::vector<T> memory_;
};

// --- loops over the hidden units: not to be inlined, within an outer loop gcc leaves them scalar -------------

#define FF_LOOP      \
  template <class T> \
  __attribute__((noinline)) void

FF_LOOP one_diagonal(const T* raw, T* r, T* gap, T* turn, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Diagonal<T> made = diagonal(raw[i]);
    r[i] = made.r, gap[i] = made.gap, turn[i] = made.d;
  }
}

// gap2 becomes 1 + r1 r2
FF_LOOP both_diagonals(const T* r1, const T* gap1, const T* r2, T* gap2, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    gap2[i] = diagonal_slope(Diagonal<T>{r1[i], gap1[i], 0}, Diagonal<T>{r2[i], gap2[i], 0});
}

FF_LOOP activate(const T* a, const T* slope, T* h, T* d, T* logs, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Tanh<T> t = tanh_slope(a[i]);
    h[i] = t.h, d[i] = t.d;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) logs[i] = log_derivative(slope[i], Tanh<T>{h[i], d[i]});
}

// the gradient of a from that of h = tanh(a)
FF_LOOP through_tanh(const T* r1, const T* r2, const T* slope, const T* h, const T* d, const T* gh, T glogdet, T* ga,
                     int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    ga[i] = d[i] * gh[i] + glogdet * log_derivative_slope(r1[i], r2[i], slope[i], Tanh<T>{h[i], d[i]});
}

// one of them: r is the other diagonal, turn = dr/draw; gr = left right + what comes of the log-determinant
FF_LOOP of_diagonal(const T* r, const T* turn, const T* slope, const T* h, const T* d, const T* left, const T* right,
                    T glogdet, T* g, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    g[i] = turn[i] * (left[i] * right[i] + glogdet * d[i] * r[i] / derivative(slope[i], Tanh<T>{h[i], d[i]}));
}

// out = factor x
FF_LOOP scale(const T* factor, const T* x, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor[i] * x[i];
}

// --- the parameters and the steps -------------------------------------------------------------------

// The parameters of one step, ready for use. Vectors are padded to whole registers, with zeros.
template <class T>
struct Parameters {
  int64_t m, row, step = -1;
  const T* full = nullptr;  // [M, row]
  std::vector<T> r1, r2, slope, turn1, turn2, bias, copy;
  Columns<T> columns;
  bool wrong = false;  // columns that have not become orthonormal

  explicit Parameters(const Problem& p)
      : m(p.m),
        row(m % Lanes<T>::n ? padded(m) : m),
        copy(m * row),
        columns(p.kind, p.d, p.m, p.vectors, p.iterations) {
    for (auto* v : {&r1, &r2, &slope, &turn1, &turn2, &bias}) v->resize(padded(m));
  }

  void load(const Tensors& in, int64_t b, int64_t k) {
    step = k;
    full = block<T>(in.full, b, k, m, m).read(copy.data(), row);
    const T* raw1 = block<T>(in.diag1, b, k, 1, m).read(r1.data(), m);
    const T* raw2 = block<T>(in.diag2, b, k, 1, m).read(r2.data(), m);
    one_diagonal(raw1, r1.data(), bias.data(), turn1.data(), m);
    one_diagonal(raw2, r2.data(), slope.data(), turn2.data(), m);
    both_diagonals(r1.data(), bias.data(), r2.data(), slope.data(), m);
    const T* shift = block<T>(in.bias, b, k, 1, m).read(bias.data(), m);
    if (shift != bias.data()) std::copy_n(shift, m, bias.data());
    wrong = !(columns.load(in.basis, b, k) <= std::sqrt(std::numeric_limits<T>::epsilon()));
  }
};

// Everything of one thread. Vectors are padded to whole registers, with zeros.
template <class T>
class Flow {
 public:
  using Step = Parameters<T>;

  Flow(const Problem& p, int64_t recorded, int64_t held)
      : p_(p), m_(p.m), record_(recorded, p.d, p.m), held_(held, Step(p)), gfull_(m_ * held_[0].row) {
    for (auto* v : {&z_, &g_, &gqu_}) v->resize(padded(p.d));
    for (auto* v : {&a_, &gy_, &gu_, &ga_, &work_}) v->resize(padded(m_));
  }

  // z' and the log-determinant of the direction, NaN where columns have not become orthonormal
  double run(const View& x, int64_t b, bool inverse, const View& out) {
    start(x, b);
    double logdet = 0;
    for (int64_t i = 0; i < p_.steps; ++i) {
      Step& s = parameters(b, inverse ? p_.steps - 1 - i : i);
      logdet += inverse ? -back(s) : forth(s, 0);
      if (s.wrong) logdet = std::numeric_limits<double>::quiet_NaN();
    }
    finish(out, b, z_);
    return logdet;
  }

  // From the gradients of a direction's results; x is what the steps start from, of the inverse its output.
  void backward(const View& x, const View& gout, T glogdet, int64_t b, bool inverse, const View& gx,
                const Tensors& to) {
    start(x, b);
    read(gout, b, g_);
    for (int64_t k = 0; k < p_.steps; ++k) {
      Step& s = parameters(b, k);
      forth(s, inverse ? 0 : k);
      if (inverse) gradient(s, b, 0, -glogdet, true, to);
    }
    for (int64_t k = p_.steps - 1; k >= 0 && !inverse; --k) gradient(parameters(b, k), b, k, glogdet, false, to);
    finish(gx, b, g_);
  }

 private:
  static void read(const View& v, int64_t b, std::vector<T>& to) {
    const T* from = block<T>(v, b).read(to.data(), v.size[1]);
    if (from != to.data()) std::copy_n(from, v.size[1], to.data());
  }
  static void finish(const View& v, int64_t b, std::vector<T>& from) {
    const Block<T> to = block<T>(v, b);
    if (to.direct(v.size[1])) std::copy_n(from.data(), v.size[1], to.where());
    to.commit(from.data(), v.size[1]);
  }

  void start(const View& x, int64_t b) {
    read(x, b, z_);
    if (!p_.shared())
      for (Step& s : held_) s.step = -1;
  }
  Step& parameters(int64_t b, int64_t k) {
    Step& s = held_[k % held_.size()];
    if (s.step != k) s.load(p_.in, b, k);
    return s;
  }

  // z -> z', what its gradient needs into the record; log|dz'/dz|
  double forth(Step& s, int64_t at) {
    T *y = record_.y(at), *h = record_.h(at), *u = record_.u(at), *a = a_.data();
    std::copy_n(z_.data(), p_.d, record_.z(at));
    s.columns.project(z_.data(), y);
    scale(s.r2.data(), y, a, m_);
    add_lower_transposed(s.full, s.row, m_, y, a);
    for (int64_t i = 0; i < m_; ++i) a[i] += s.bias[i];
    activate(a, s.slope.data(), h, record_.slope(at), work_.data(), m_);
    const double logdet = ordered_sum(work_.data(), m_);
    scale(s.r1.data(), h, u, m_);
    add_upper(s.full, s.row, m_, h, u);
    s.columns.add(u, T(1), z_.data());
    return logdet;
  }

  // z' -> z by one scalar equation after the other, the last row first; log|dz'/dz|
  double back(Step& s) {
    T *y = record_.y(0), *h = record_.h(0), *u = record_.u(0), *a = a_.data();
    s.columns.project(z_.data(), y);
    std::fill_n(h, m_, T(0));
    std::copy_n(s.bias.data(), m_, a);
    for (int64_t i = m_ - 1; i >= 0; --i) {
      const T* F = s.full + i * s.row;
      const T after = tail_dot(F, i, m_, h), rest = y[i] - after;
      const Tanh<T> t = tanh_slope(tanh_root(s.r2[i] * rest + a[i], s.slope[i]));
      const T own = s.r1[i] * t.h, value = rest - own;
      h[i] = t.h, u[i] = own + after, work_[i] = log_derivative(s.slope[i], t);
#pragma omp simd
      for (int64_t j = 0; j < i; ++j) a[j] += F[j] * value;
    }
    s.columns.add(u, T(-1), z_.data());
    return ordered_sum(work_.data(), m_);
  }

  // The gradients of a step from g, that of its result, and glogdet, that of log|dz'/dz|; g becomes that of its state
  // before. `inverse`: g is that of z instead, and becomes that of z'.
  void gradient(Step& s, int64_t b, int64_t at, T glogdet, bool inverse, const Tensors& to) {
    const T *y = record_.y(at), *h = record_.h(at), *d = record_.slope(at), *u = record_.u(at);
    T *gu = gu_.data(), *ga = ga_.data(), *gy = gy_.data();
    s.columns.project(g_.data(), gu);
    if (inverse) {
      solve(s, h, d, glogdet, gu, ga, gy);
    } else {
      scale(s.r1.data(), gu, work_.data(), m_);
      add_upper_transposed(s.full, s.row, m_, gu, work_.data());
      through_tanh(s.r1.data(), s.r2.data(), s.slope.data(), h, d, work_.data(), glogdet, ga, m_);
      scale(s.r2.data(), ga, gy, m_);
      add_lower(s.full, s.row, m_, ga, gy);
      std::copy_n(g_.data(), p_.d, gqu_.data());
    }
    s.columns.add(gy, T(1), g_.data());
    if (inverse)
      for (int64_t i = 0; i < p_.d; ++i) gqu_[i] = -g_[i];

    const int64_t k = s.step;
    const Block<T> full = block<T>(to.full, b, k, m_, m_), one = block<T>(to.diag1, b, k, 1, m_),
                   two = block<T>(to.diag2, b, k, 1, m_), bias = block<T>(to.bias, b, k, 1, m_);
    T *gfull = full.target(gfull_.data(), s.row), *g1 = one.target(work_.data(), m_), *g2 = two.target(a_.data(), m_);
    outer_triangles(s.row, m_, y, ga, gu, h, gfull);
    of_diagonal(s.r2.data(), s.turn1.data(), s.slope.data(), h, d, gu, h, glogdet, g1, m_);
    of_diagonal(s.r1.data(), s.turn2.data(), s.slope.data(), h, d, ga, y, glogdet, g2, m_);
    full.commit(gfull, s.row), one.commit(g1, m_), two.commit(g2, m_);
    if (bias.direct(m_)) std::copy_n(ga, m_, bias.where());
    bias.commit(ga, m_);
    s.columns.gradient(record_.z(at), gy, u, gqu_.data(), to.basis, b, k);
  }

  // Of the inverse: w + R2^T p = q, p = (1 - h^2) R1^T w - glogdet (log|.|)', lower triangular, from q in gu.
  // Then gu = -w, ga = -p and gy = R2^T ga = w - q are what they would be for the step forward with the gradient -w.
  void solve(const Step& s, const T* h, const T* d, T glogdet, T* gu, T* ga, T* gy) {
    T *before = work_.data(), *p = ga;
    std::fill_n(before, padded(m_), T(0));
    std::fill_n(p, padded(m_), T(0));
    for (int64_t j = 0; j < m_; ++j) {
      const T* F = s.full + j * s.row;
      const Tanh<T> t = {h[j], d[j]};
      const T of_log = glogdet * log_derivative_slope(s.r1[j], s.r2[j], s.slope[j], t);
      const T own = d[j] * before[j] - of_log, rest = head_dot(F, j, p);
      const T w = (gu[j] - rest - s.r2[j] * own) / derivative(s.slope[j], t);
      p[j] = d[j] * s.r1[j] * w + own;
      gy[j] = -(rest + s.r2[j] * p[j]);
      gu[j] = -w;
#pragma omp simd
      for (int64_t i = j + 1; i < m_; ++i) before[i] += F[i] * w;
    }
    for (int64_t j = 0; j < m_; ++j) ga[j] = -p[j];
  }

  const Problem& p_;
  int64_t m_;
  Record<T> record_;
  std::vector<Step> held_;
  std::vector<T> gfull_, z_, g_, gqu_, a_, gy_, gu_, ga_, work_;
};

// --- what Python sees -------------------------------------------------------------------------------

void sylvester_fwd(const View& z, const View& full, const View& diag1, const View& diag2, const View& bias,
                   const View& basis, const View& out, const View& logdet, int variant, int64_t iterations,
                   bool inverse) {
  const Problem p(z, {full, diag1, diag2, bias, basis}, variant, iterations);
  with_accumulator(z.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.samples, p.worth_it(), [&](int64_t begin, int64_t end) {
      Flow<T> flow(p, 1, 1);
      for (int64_t b = begin; b < end; ++b) at<T>(logdet, b) = T(flow.run(z, b, inverse, out));
    });
  });
}

void sylvester_bwd(const View& x, const View& full, const View& diag1, const View& diag2, const View& bias,
                   const View& basis, const View& gout, const View& glogdet, const View& gx, const View& gfull,
                   const View& gdiag1, const View& gdiag2, const View& gbias, const View& gbasis, int variant,
                   int64_t iterations, bool inverse) {
  const Problem p(x, {full, diag1, diag2, bias, basis}, variant, iterations);
  const Tensors to = {gfull, gdiag1, gdiag2, gbias, gbasis};
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.samples, p.worth_it(), [&](int64_t begin, int64_t end) {
      Flow<T> flow(p, inverse ? 1 : p.steps, inverse ? 1 : p.held());
      for (int64_t b = begin; b < end; ++b) flow.backward(x, gout, at<T>(glogdet, b), b, inverse, gx, to);
    });
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(sylvester) {
  using namespace fastflow;
  namespace py = pybind11;
  m.def("sylvester_fwd", &sylvester_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("sylvester_bwd", &sylvester_bwd, py::call_guard<py::gil_scoped_release>());
}
