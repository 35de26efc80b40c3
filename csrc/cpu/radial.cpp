// Radial flows on the CPU: K steps in one call, both directions, with parameters that all samples share or each has its
// own. What stays in memory and what is computed again is said in chain.h.
#include "../radial.h"

#include <vector>

#include "chain.h"
#include "module.h"

namespace fastflow {
namespace {

// --- loops over a block of samples ---------------------------------------------------------------------

// r = |z - c|
template <bool each, class T>
void distance_loop(const T* z, const T* c, T* r, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T sum[L];
  std::fill(sum, sum + L, kNearest<T>);
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) {
      const T x = z[d * L + l] - lane<each>(c, d, l);
      sum[l] += x * x;
    }
#pragma omp simd
  for (int64_t l = 0; l < L; ++l) r[l] = sqrt_positive(sum[l]);
}

// logdet, y and r of the step
template <bool inverse, bool each, class T>
void ring_loop(const T* alpha, const T* reach, T others, double* logdet, T* y, T* r) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const T a = lane<each>(alpha, 0, l), b = lane<each>(reach, 0, l);
    const T at = inverse ? ring_root(a, b, r[l]) : r[l];
    const Ring<T> made = ring(a, b, at, others);
    logdet[l] += double(inverse ? -made.logdet : made.logdet);
    y[l] = inverse ? (a - b) / (b + at) : made.y;
    r[l] = at;
  }
}

// z += y (z - c)
template <bool each, class T>
void move_loop(const T* c, const T* y, T* z, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) z[d * L + l] += y[l] * (z[d * L + l] - lane<each>(c, d, l));
}

// the dot product of z - c and g
template <bool each, class T>
void pull_loop(const T* z, const T* c, const T* g, T* dot, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T sum[L] = {};
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) sum[l] += (z[d * L + l] - lane<each>(c, d, l)) * g[d * L + l];
  std::copy(sum, sum + L, dot);
}

template <bool inverse, bool each, class T>
void gradient_loop(const T* alpha, const T* reach, const T* r, const T* dot, const T* gl, T others, T* pull, T* ga,
                   T* gr) {
#pragma omp simd
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const auto g =
        ring_gradient<inverse>(lane<each>(alpha, 0, l), lane<each>(reach, 0, l), r[l], dot[l], gl[l], others);
    pull[l] = g.pull, ga[l] = g.alpha, gr[l] = g.reach;
  }
}

// g of the output -> of the input, in place; of the centre what is lost, in every lane
template <bool each, class T>
void back_loop(const T* z, const T* c, const T* y, const T* pull, T* g, T* gc, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) {
      const T gain = y[l] * g[d * L + l] + pull[l] * (z[d * L + l] - lane<each>(c, d, l));
      g[d * L + l] += gain;
      gc[d * L + l] = -gain;
    }
}

// --- the family ------------------------------------------------------------------------------------------

template <class T, bool each>
class Radial {
 public:
  using Number = T;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kKept = 2;  // y, and the distance r before the step, which is after its inverse
  struct Gradients {
    View centre, alpha, beta;
  };

  Radial(const View& z, const View& centre, const View& alpha, const View& beta, bool absolute,
         const Gradients& out = {})
      : centre_(centre), alpha_(alpha), beta_(beta), out_(out), absolute_(absolute) {
    steps_ = alpha.size[each ? 1 : 0], n_ = z.size[1];
    if constexpr (!each) {
      centres_ = shared_values<T>(centre, steps_, n_);
      const std::vector<T> a = shared_values<T>(alpha, steps_, 1), b = shared_values<T>(beta, steps_, 1);
      for (int64_t k = 0; k < steps_; ++k)
        spheres_.push_back(sphere(double(a[k]), double(b[k]), absolute).template as<T>());
    }
  }

  // the parameters of one step: [n][L] and [L] where each sample has its own, [n] and one number otherwise
  struct Step {
    const T *centre, *alpha, *reach;
    LaneBuffer<T> wide, numbers, work;  // c;  alpha, reach and their derivatives;  scratch of gradient()
  };

  int64_t steps() const { return steps_; }
  int64_t sums() const { return each ? 0 : n_ + 2; }  // of the gradients of c, α, ρ

  Step step() const {
    return {nullptr, nullptr, nullptr, LaneBuffer<T>(each ? n_ : 0), LaneBuffer<T>(6), LaneBuffer<T>(4 + n_)};
  }

  void load(Step& s, int64_t k, const Block& block) const {
    if constexpr (each) {
      load_lanes(BlockOf(centre_, block.first, k), block.count, n_, s.wide[0]);
      T *a = s.numbers[0], *b = s.numbers[1], *alpha_rise = s.numbers[2], *reach_rise = s.numbers[3];
      T *alpha = s.numbers[4], *reach = s.numbers[5];
      load_lanes(BlockOf(alpha_, block.first, k), block.count, 1, alpha);
      load_lanes(BlockOf(beta_, block.first, k), block.count, 1, reach);
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) {
        const Sphere<T> made = sphere(alpha[l], reach[l], absolute_);
        a[l] = made.alpha, b[l] = made.reach, alpha_rise[l] = made.alpha_rise, reach_rise[l] = made.reach_rise;
      }
      s.centre = s.wide[0], s.alpha = a, s.reach = b;
    } else {
      s.centre = &centres_[k * n_], s.alpha = &spheres_[k].alpha, s.reach = &spheres_[k].reach;
    }
  }

  template <bool inverse>
  void apply(Step& s, T* z, double* logdet, T* kept) const {
    distance_loop<each>(z, s.centre, kept + L, n_);
    ring_loop<inverse, each>(s.alpha, s.reach, T(n_ - 1), logdet, kept, kept + L);
    replay<inverse>(s, z, kept);
  }

  template <bool inverse>
  void replay(Step& s, T* z, const T* kept) const {
    move_loop<each>(s.centre, kept, z, n_);
  }

  template <bool inverse>
  void gradient(Step& s, const T* in, const T* out, const T* kept, T* g, const T* gl, int64_t k, const Block& block,
                double* sums) const {
    const T *z = inverse ? out : in, *r = kept + L;  // z: before the step, which is after its inverse
    T *dot = s.work[0], *pull = s.work[1], *ga = s.work[2], *gr = s.work[3], *gc = s.work[4];
    pull_loop<each>(z, s.centre, g, dot, n_);
    gradient_loop<inverse, each>(s.alpha, s.reach, r, dot, gl, T(n_ - 1), pull, ga, gr);
    back_loop<each>(z, s.centre, kept, pull, g, gc, n_);
    if constexpr (each) {
      const T *alpha_rise = s.numbers[2], *reach_rise = s.numbers[3];
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) ga[l] *= alpha_rise[l], gr[l] *= reach_rise[l];
      store_lanes(BlockOf(out_.centre, block.first, k), block.count, n_, gc);
      store_lanes(BlockOf(out_.alpha, block.first, k), block.count, 1, ga);
      store_lanes(BlockOf(out_.beta, block.first, k), block.count, 1, gr);
    } else {
      for (int64_t d = 0; d < n_; ++d) sums[d] += double(sum_lanes(gc + d * L));
      sums[n_] += double(sum_lanes(ga)), sums[n_ + 1] += double(sum_lanes(gr));
    }
  }

  void finish(const double* sums) const {
    if constexpr (!each)
      for (int64_t k = 0; k < steps_; ++k, sums += n_ + 2) {
        for (int64_t d = 0; d < n_; ++d) at<T>(out_.centre, k, d) = T(sums[d]);
        at<T>(out_.alpha, k) = T(sums[n_] * spheres_[k].alpha_rise);
        at<T>(out_.beta, k) = T(sums[n_ + 1] * spheres_[k].reach_rise);
      }
  }

 private:
  const View &centre_, &alpha_, &beta_;
  Gradients out_;
  bool absolute_;
  int64_t steps_, n_;
  std::vector<T> centres_;
  std::vector<Sphere<T>> spheres_;
};

// --- what Python sees ------------------------------------------------------------------------------------

void radial_fwd(const View& z, const View& centre, const View& alpha, const View& beta, const View& running,
                const View& y, const View& logdet, bool absolute, bool each, bool inverse) {
  with_options(z, each, inverse, [&](auto type, auto own, auto back) {
    const Radial<decltype(type), own()> family(z, centre, alpha, beta, absolute);
    chain_forward<back()>(family, z, running, y, logdet);
  });
}

void radial_bwd(const View& z, const View& centre, const View& alpha, const View& beta, const View& gy,
                const View& glogdet, const View& gz, const View& gcentre, const View& galpha, const View& gbeta,
                bool absolute, bool each, bool inverse) {
  with_options(z, each, inverse, [&](auto type, auto own, auto back) {
    const Radial<decltype(type), own()> family(z, centre, alpha, beta, absolute, {gcentre, galpha, gbeta});
    chain_backward<back()>(family, z, gy, glogdet, gz);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(radial) {
  using namespace fastflow;
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("radial_fwd", &radial_fwd, release);
  m.def("radial_bwd", &radial_bwd, release);
}
