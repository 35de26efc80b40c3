// Planar flows on the CPU: K units in one call, both directions, with parameters that all samples share or each has its
// own. What stays in memory and what is computed again is said in chain.h.
#include "../planar.h"

#include <vector>

#include "chain.h"
#include "module.h"
#include "roots.h"

namespace fastflow {
namespace {

// --- loops over a block of samples ---------------------------------------------------------------------

template <class T>
void tanh_loop(const T* a, T* h, T* d) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const Tanh<T> t = tanh_slope(a[l]);
    h[l] = t.h, d[l] = t.d;
  }
}

// logdet += sign log(1 + s d)
template <bool each, class T>
void logdet_loop(const T* slope, const T* h, const T* d, double sign, double* logdet) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l)
    logdet[l] += sign * double(log_derivative(lane<each>(slope, 0, l), Tanh<T>{h[l], d[l]}));
}

// z += factor h û
template <bool each, class T>
void move_loop(const T* u, const T* h, T factor, T* z, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) z[d * L + l] += factor * h[l] * lane<each>(u, d, l);
}

template <class T>
void constrain_loop(const T* p, const T* square, T* slope, T* shift, T* rise, T* shift_rise) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const Constraint<T> c = constrain(p[l], square[l]);
    slope[l] = c.slope, shift[l] = c.shift, rise[l] = c.rise, shift_rise[l] = c.shift_rise;
  }
}

template <bool inverse, bool each, class T>
void gradient_loop(const T* slope, const T* h, const T* d, const T* dot, const T* gl, T* ga, T* gs) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const auto u = unit_gradient<inverse>(lane<each>(slope, 0, l), Tanh<T>{h[l], d[l]}, dot[l], gl[l]);
    ga[l] = u.a, gs[l] = u.slope;
  }
}

// --- the family ------------------------------------------------------------------------------------------

template <class T, bool each>
class Planar {
 public:
  using Number = T;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kKept = 2;  // tanh(a) and 1 - tanh(a)^2
  struct Gradients {
    View u, w, b;
  };

  Planar(const View& z, const View& u, const View& w, const View& b, const Gradients& out = {})
      : u_(u), w_(w), b_(b), out_(out), steps_(b.size[each ? 1 : 0]), n_(z.size[1]) {
    if constexpr (!each) {
      raw_ = shared_values<T>(u, steps_, n_), made_ = raw_;
      weights_ = shared_values<T>(w, steps_, n_), biases_ = shared_values<T>(b, steps_, 1);
      for (int64_t k = 0; k < steps_; ++k) {
        const T *w = &weights_[k * n_], *u = &raw_[k * n_];
        double p = 0, square = 0;
        for (int64_t d = 0; d < n_; ++d) p += double(w[d]) * u[d], square += double(w[d]) * w[d];
        const Constraint<T> c = constrain(p, square).template as<T>();
        for (int64_t d = 0; d < n_; ++d) made_[k * n_ + d] += c.shift * w[d];
        constraints_.push_back(c), slopes_.push_back(c.slope);
      }
    }
  }

  // the parameters of one unit: [n][L] and [L] where each sample has its own, [n] and one number otherwise
  struct Step {
    const T *w, *u, *b, *slope;
    LaneBuffer<T> wide, numbers, work;  // w, u, û;  b and the constraint;  scratch of gradient()
  };

  int64_t steps() const { return steps_; }
  int64_t sums() const { return each ? 0 : 2 * n_ + 2; }  // of the gradients of û, of w, of b, of s

  Step step() const {
    return {
        nullptr, nullptr, nullptr, nullptr, LaneBuffer<T>(each ? 3 * n_ : 0), LaneBuffer<T>(7), LaneBuffer<T>(6 + n_)};
  }

  void load(Step& s, int64_t k, const Block& block) const {
    if constexpr (each) {
      T *w = s.wide[0], *u = s.wide[n_], *made = s.wide[2 * n_], *p = s.numbers[5], *square = s.numbers[6];
      load_lanes(BlockOf(w_, block.first, k), block.count, n_, w);
      load_lanes(BlockOf(u_, block.first, k), block.count, n_, u);
      load_lanes({b_, block.first, k}, block.count, 1, s.numbers[0]);
      dot_variables<true, T>(w, u, nullptr, p, n_);
      dot_variables<true, T>(w, w, nullptr, square, n_);
      constrain_loop(p, square, s.numbers[1], s.numbers[2], s.numbers[3], s.numbers[4]);
      std::copy(u, u + n_ * L, made);
      const T* shift = s.numbers[2];
      for (int64_t d = 0; d < n_; ++d)
#pragma omp simd
        for (int64_t l = 0; l < L; ++l) made[d * L + l] += shift[l] * w[d * L + l];
      s.w = w, s.u = made, s.b = s.numbers[0], s.slope = s.numbers[1];
    } else {
      s.w = &weights_[k * n_], s.u = &made_[k * n_], s.b = &biases_[k], s.slope = &slopes_[k];
    }
  }

  template <bool inverse>
  void apply(Step& s, T* z, double* logdet, T* kept) const {
    T *h = kept, *d = kept + L, *v = s.work[0], *slopes = s.work[1], *a = inverse ? s.work[2] : v;
    dot_variables<each>(z, s.w, s.b, v, n_);
    if constexpr (inverse) {
      for (int64_t l = 0; l < L; ++l) slopes[l] = lane<each>(s.slope, 0, l);
      tanh_roots(v, slopes, a, L);
    }
    tanh_loop(a, h, d);
    logdet_loop<each>(s.slope, h, d, inverse ? -1.0 : 1.0, logdet);
    replay<inverse>(s, z, kept);
  }

  template <bool inverse>
  void replay(Step& s, T* z, const T* kept) const {
    move_loop<each>(s.u, kept, T(inverse ? -1 : 1), z, n_);
  }

  template <bool inverse>
  void gradient(Step& s, const T* in, const T* out, const T* kept, T* g, const T* gl, int64_t k, const Block& block,
                double* sums) const {
    const T *h = kept, *d = kept + L, *z = inverse ? out : in;  // z: before the unit, which is after its inverse
    T *dot = s.work[0], *ga = s.work[1], *gs = s.work[2], *signed_h = s.work[3], *own = s.work[6];
    dot_variables<each, T>(g, s.u, nullptr, dot, n_);
    gradient_loop<inverse, each>(s.slope, h, d, dot, gl, ga, gs);
    for (int64_t l = 0; l < L; ++l) signed_h[l] = inverse ? -h[l] : h[l];
    if constexpr (inverse) move_loop<each>(s.w, ga, T(1), g, n_);  // g is now that of z'
    if constexpr (each) {
      // of û and s as they are, then of u and w: dû = du + shift dw + w dshift
      T *ew = s.work[4], *factor = s.work[5];
      const T *w = s.wide[0], *u = s.wide[n_], *shift = s.numbers[2], *rise = s.numbers[3], *shift_rise = s.numbers[4];
      const T* square = s.numbers[6];
      dot_variables<true, T>(g, w, nullptr, ew, n_);
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) {
        ew[l] *= signed_h[l];
        factor[l] = ew[l] * shift_rise[l] + gs[l] * rise[l];
      }
      for (int64_t i = 0; i < n_; ++i)
#pragma omp simd
        for (int64_t l = 0; l < L; ++l) own[i * L + l] = signed_h[l] * g[i * L + l] + factor[l] * w[i * L + l];
      store_lanes(BlockOf(out_.u, block.first, k), block.count, n_, own);
      for (int64_t i = 0; i < n_; ++i)
#pragma omp simd
        for (int64_t l = 0; l < L; ++l) {
          const T e = signed_h[l] * g[i * L + l], length = T(-2) * shift[l] * ew[l] / square[l];
          own[i * L + l] = ga[l] * z[i * L + l] + shift[l] * e + factor[l] * u[i * L + l] + length * w[i * L + l];
        }
      store_lanes(BlockOf(out_.w, block.first, k), block.count, n_, own);
      store_lanes({out_.b, block.first, k}, block.count, 1, ga);
    } else {
      for (int64_t i = 0; i < n_; ++i) sums[i] += double(dot_lanes(signed_h, g + i * L));
      for (int64_t i = 0; i < n_; ++i) sums[n_ + i] += double(dot_lanes(ga, z + i * L));
      sums[2 * n_] += double(sum_lanes(ga)), sums[2 * n_ + 1] += double(sum_lanes(gs));
    }
    if constexpr (!inverse) move_loop<each>(s.w, ga, T(1), g, n_);
  }

  void finish(const double* sums) const {
    if constexpr (!each)
      for (int64_t k = 0; k < steps_; ++k, sums += 2 * n_ + 2) {
        const T *w = &weights_[k * n_], *u = &raw_[k * n_];
        const Constraint<T>& c = constraints_[k];
        double ew = 0, square = 0;
        for (int64_t d = 0; d < n_; ++d) ew += sums[d] * w[d], square += double(w[d]) * w[d];
        const double factor = ew * c.shift_rise + sums[2 * n_ + 1] * c.rise,
                     length = -2 * double(c.shift) * ew / square;
        for (int64_t d = 0; d < n_; ++d) {
          at<T>(out_.u, k, d) = T(sums[d] + factor * w[d]);
          at<T>(out_.w, k, d) = T(sums[n_ + d] + c.shift * sums[d] + factor * u[d] + length * w[d]);
        }
        at<T>(out_.b, k) = T(sums[2 * n_]);
      }
  }

 private:
  const View &u_, &w_, &b_;
  Gradients out_;
  int64_t steps_, n_;
  std::vector<T> raw_, made_, weights_, biases_, slopes_;  // u, û, w, b, 1 + s of all units
  std::vector<Constraint<T>> constraints_;
};

// --- what Python sees ------------------------------------------------------------------------------------

void planar_fwd(const View& z, const View& u, const View& w, const View& b, const View& running, const View& y,
                const View& logdet, bool each, bool inverse) {
  with_options(z, each, inverse, [&](auto type, auto own, auto back) {
    const Planar<decltype(type), own()> family(z, u, w, b);
    chain_forward<back()>(family, z, running, y, logdet);
  });
}

void planar_bwd(const View& z, const View& u, const View& w, const View& b, const View& gy, const View& glogdet,
                const View& gz, const View& gu, const View& gw, const View& gb, bool each, bool inverse) {
  with_options(z, each, inverse, [&](auto type, auto own, auto back) {
    const Planar<decltype(type), own()> family(z, u, w, b, {gu, gw, gb});
    chain_backward<back()>(family, z, gy, glogdet, gz);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(planar) {
  using namespace fastflow;
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("planar_fwd", &planar_fwd, release);
  m.def("planar_bwd", &planar_bwd, release);
}
