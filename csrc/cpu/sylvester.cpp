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

// Everything of one thread. Vectors are padded to whole registers, with zeros.
template <class T>
class Flow {
 public:
  Flow(const Problem& p, int64_t recorded)
      : p_(p),
        m_(p.m),
        row_(m_ % Lanes<T>::n ? padded(m_) : m_),
        record_(recorded, p.d, p.m),
        columns_(p.kind, p.d, p.m, p.vectors, p.iterations),
        full_(m_ * row_),
        gfull_(m_ * row_),
        z_(padded(p.d)),
        g_(padded(p.d)),
        gqu_(padded(p.d)) {
    for (auto* v : {&r1_, &r2_, &product_slope_, &turn1_, &turn2_, &bias_, &a_, &gy_, &gu_, &ga_, &work_})
      v->resize(padded(m_));
  }

  // z' and the log-determinant of the direction, NaN where columns have not become orthonormal
  double run(const View& x, int64_t b, bool inverse, const View& out) {
    start(x, b, z_);
    double logdet = 0;
    for (int64_t i = 0; i < p_.steps; ++i) logdet += inverse ? -step_back(b, p_.steps - 1 - i) : step(b, i, 0);
    const Block<T> to = block<T>(out, b);
    std::copy_n(z_.data(), p_.d, to.target(z_.data(), p_.d));
    to.commit(z_.data(), p_.d);
    return logdet;
  }

  // From the gradients of a direction's results; x is what the steps start from, of the inverse its output.
  void backward(const View& x, const View& gout, T glogdet, int64_t b, bool inverse, const View& gx,
                const Tensors& to) {
    start(x, b, z_);
    start(gout, b, g_);
    for (int64_t k = 0; k < p_.steps; ++k) {
      step(b, k, inverse ? 0 : k);
      if (inverse) gradient(b, k, 0, -glogdet, true, to);
    }
    for (int64_t k = p_.steps - 1; k >= 0 && !inverse; --k) {
      if (k + 1 < p_.steps) load(b, k);
      gradient(b, k, k, glogdet, false, to);
    }
    const Block<T> of_x = block<T>(gx, b);
    std::copy_n(g_.data(), p_.d, of_x.target(g_.data(), p_.d));
    of_x.commit(g_.data(), p_.d);
  }

 private:
  static void start(const View& v, int64_t b, std::vector<T>& to) {
    const T* from = block<T>(v, b).read(to.data(), v.size[1]);
    if (from != to.data()) std::copy_n(from, v.size[1], to.data());
  }

  // the parameters of step k; 0, or NaN where its columns have not become orthonormal
  double load(int64_t b, int64_t k) {
    full_at_ = block<T>(p_.in.full, b, k, m_, m_).read(full_.data(), row_);
    const T* raw1 = block<T>(p_.in.diag1, b, k, 1, m_).read(work_.data(), m_);
    const T* raw2 = block<T>(p_.in.diag2, b, k, 1, m_).read(a_.data(), m_);
    const T* bias = block<T>(p_.in.bias, b, k, 1, m_).read(bias_.data(), m_);
    if (bias != bias_.data()) std::copy_n(bias, m_, bias_.data());
    diagonals(raw1, raw2, r1_.data(), r2_.data(), turn1_.data(), turn2_.data(), product_slope_.data(), m_);
    const double residual = columns_.load(p_.in.basis, b, k);
    return residual <= std::sqrt(std::numeric_limits<T>::epsilon()) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  }

  static void diagonals(const T* raw1, const T* raw2, T* r1, T* r2, T* turn1, T* turn2, T* slope, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Diagonal<T> one = diagonal(raw1[i]), two = diagonal(raw2[i]);
      r1[i] = one.r, r2[i] = two.r, turn1[i] = one.d, turn2[i] = two.d, slope[i] = diagonal_slope(one, two);
    }
  }

  static void activate(const T* a, const T* slope, T* h, T* d, T* logs, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Tanh<T> t = tanh_slope(a[i]);
      h[i] = t.h, d[i] = t.d, logs[i] = log_derivative(slope[i], t);
    }
  }

  // out = factor x
  static void scale(const T* factor, const T* x, T* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = factor[i] * x[i];
  }

  // z -> z', what its gradient needs into the record; log|dz'/dz|
  double step(int64_t b, int64_t k, int64_t at) {
    const double wrong = load(b, k);
    T *y = record_.y(at), *h = record_.h(at), *u = record_.u(at), *a = a_.data();
    std::copy_n(z_.data(), p_.d, record_.z(at));
    columns_.project(z_.data(), y);
    scale(r2_.data(), y, a, m_);
    add_lower_transposed(full_at_, row_, m_, y, a);
    for (int64_t i = 0; i < m_; ++i) a[i] += bias_[i];
    activate(a, product_slope_.data(), h, record_.slope(at), work_.data(), m_);
    const double logdet = ordered_sum(work_.data(), m_);
    scale(r1_.data(), h, u, m_);
    add_upper(full_at_, row_, m_, h, u);
    columns_.add(u, T(1), z_.data());
    return logdet + wrong;
  }

  // z' -> z by one scalar equation after the other, the last row first; log|dz'/dz|
  double step_back(int64_t b, int64_t k) {
    const double wrong = load(b, k);
    T *y = record_.y(0), *h = record_.h(0), *u = record_.u(0);
    std::vector<T>& logs = work_;
    columns_.project(z_.data(), y);
    std::fill_n(h, m_, T(0));
    std::copy_n(bias_.data(), m_, a_.data());
    for (int64_t i = m_ - 1; i >= 0; --i) {
      const T* F = full_at_ + i * row_;
      const T after = tail_dot(F, i, m_, h), rest = y[i] - after;
      const Tanh<T> t = tanh_slope(tanh_root(r2_[i] * rest + a_[i], product_slope_[i]));
      const T own = r1_[i] * t.h, value = rest - own;
      h[i] = t.h, u[i] = own + after, logs[i] = log_derivative(product_slope_[i], t);
#pragma omp simd
      for (int64_t j = 0; j < i; ++j) a_[j] += F[j] * value;
    }
    columns_.add(u, T(-1), z_.data());
    return ordered_sum(logs.data(), m_) + wrong;
  }

  // The gradients of step k, whose parameters are loaded, from g, that of its result, and glogdet, that of log|dz'/dz|.
  // `inverse`: g is that of z instead, and becomes that of z'.
  void gradient(int64_t b, int64_t k, int64_t at, T glogdet, bool inverse, const Tensors& to) {
    const T *y = record_.y(at), *h = record_.h(at), *d = record_.slope(at), *u = record_.u(at);
    T *gu = gu_.data(), *ga = ga_.data(), *gy = gy_.data();
    columns_.project(g_.data(), gu);
    if (inverse) {
      solve(h, d, glogdet, gu, ga, gy);
    } else {
      scale(r1_.data(), gu, work_.data(), m_);
      add_upper_transposed(full_at_, row_, m_, gu, work_.data());
      for (int64_t i = 0; i < m_; ++i)
        ga[i] = d[i] * work_[i] + glogdet * log_derivative_slope(r1_[i], r2_[i], product_slope_[i], {h[i], d[i]});
      scale(r2_.data(), ga, gy, m_);
      add_lower(full_at_, row_, m_, ga, gy);
      std::copy_n(g_.data(), p_.d, gqu_.data());
    }
    columns_.add(gy, T(1), g_.data());
    if (inverse)
      for (int64_t i = 0; i < p_.d; ++i) gqu_[i] = -g_[i];

    const Block<T> full = block<T>(to.full, b, k, m_, m_), one = block<T>(to.diag1, b, k, 1, m_),
                   two = block<T>(to.diag2, b, k, 1, m_), bias = block<T>(to.bias, b, k, 1, m_);
    T *gfull = full.target(gfull_.data(), row_), *g1 = one.target(work_.data(), m_), *g2 = two.target(a_.data(), m_);
    outer_triangles(row_, m_, y, ga, gu, h, gfull);
    for (int64_t i = 0; i < m_; ++i) {
      const T of_product = glogdet * d[i] / derivative(product_slope_[i], Tanh<T>{h[i], d[i]});
      g1[i] = turn1_[i] * (gu[i] * h[i] + of_product * r2_[i]);
      g2[i] = turn2_[i] * (ga[i] * y[i] + of_product * r1_[i]);
    }
    full.commit(gfull, row_), one.commit(g1, m_), two.commit(g2, m_);
    std::copy_n(ga, m_, bias.target(ga, m_));
    bias.commit(ga, m_);
    columns_.gradient(record_.z(at), gy, u, gqu_.data(), to.basis, b, k);
  }

  // Of the inverse: w + R2^T p = q, p = (1 - h^2) R1^T w - glogdet (log|.|)', lower triangular, from q in gu.
  // Then gu = -w, ga = -p and gy = R2^T ga = w - q are what they would be for the step forward with the gradient -w.
  void solve(const T* h, const T* d, T glogdet, T* gu, T* ga, T* gy) {
    T *before = work_.data(), *p = ga;
    std::fill_n(before, padded(m_), T(0));
    std::fill_n(p, padded(m_), T(0));
    for (int64_t j = 0; j < m_; ++j) {
      const T* F = full_at_ + j * row_;
      const Tanh<T> t = {h[j], d[j]};
      const T q = gu[j], own = d[j] * before[j] - glogdet * log_derivative_slope(r1_[j], r2_[j], product_slope_[j], t);
      const T rest = head_dot(F, j, p);
      const T w = (q - rest - r2_[j] * own) / derivative(product_slope_[j], t);
      p[j] = d[j] * r1_[j] * w + own;
      gy[j] = -(rest + r2_[j] * p[j]);
      gu[j] = -w;
#pragma omp simd
      for (int64_t i = j + 1; i < m_; ++i) before[i] += F[i] * w;
    }
    for (int64_t j = 0; j < m_; ++j) ga[j] = -p[j];
  }

  const Problem& p_;
  int64_t m_, row_;
  Record<T> record_;
  Columns<T> columns_;
  std::vector<T> full_, gfull_, z_, g_, gqu_;
  std::vector<T> r1_, r2_, product_slope_, turn1_, turn2_, bias_, a_, gy_, gu_, ga_, work_;
  const T* full_at_ = nullptr;
};

// --- what Python sees -------------------------------------------------------------------------------

void sylvester_fwd(const View& z, const View& full, const View& diag1, const View& diag2, const View& bias,
                   const View& basis, const View& out, const View& logdet, int variant, int64_t iterations,
                   bool inverse) {
  const Problem p(z, {full, diag1, diag2, bias, basis}, variant, iterations);
  with_accumulator(z.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.samples, p.worth_it(), [&](int64_t begin, int64_t end) {
      Flow<T> flow(p, 1);
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
      Flow<T> flow(p, inverse ? 1 : p.steps);
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
