// Radial flows on a GPU. The parameters of a step: c [D], alpha, reach; kept of it is the distance before the step,
// which is after its inverse.
#include "../radial.h"
#include "steps.cuh"

namespace fastflow {

struct Radial {
  template <bool inverse, class T>
  FF_D static T factor(T alpha, T reach, T r) {
    return inverse ? (alpha - reach) / (reach + r) : (reach - alpha) / (alpha + r);
  }

  template <bool inverse, class T>
  FF_D static T apply(const Step<T>& s, T* z, double& logdet) {
    const T *c = s.p, alpha = c[s.width], reach = c[s.width + 1];
    const double square = s.sum([&](int d) {
      const T x = z[d] - c[d];
      return double(x * x);
    });
    T r = sqrt_positive(T(square) + kNearest<T>);
    r = inverse ? ring_root(alpha, reach, r) : r;
    const double change = double(ring(alpha, reach, r, T(s.width - 1)).logdet);
    logdet += inverse ? -change : change;
    const T y = factor<inverse>(alpha, reach, r);
    s.variables([&](int d) { z[d] += y * (z[d] - c[d]); });
    return r;
  }

  template <bool inverse, class T, class Put>
  FF_D static void gradient(const Step<T>& s, T r, const T* z, T* g, T gl, const Put& put) {
    const T *c = s.p, alpha = c[s.width], reach = c[s.width + 1], y = factor<inverse>(alpha, reach, r);
    const T dot = T(s.sum([&](int d) { return double((z[d] - c[d]) * g[d]); }));
    const RingGradient<T> own = ring_gradient<inverse>(alpha, reach, r, dot, gl, T(s.width - 1));
    s.variables([&](int d) {
      const T gain = y * g[d] + own.pull * (z[d] - c[d]);
      put(d, -gain);
      g[d] += gain;
    });
    if (s.lane) return;
    put(s.width, own.alpha);
    put(s.width + 1, own.reach);
  }
};

template <class X, bool inverse>
FF_D void radial_fwd(const StepsForward& a) {
  steps_fwd<Radial, X, inverse>(a);
}

template <class X, bool inverse>
FF_D void radial_bwd(const StepsBackward& a) {
  steps_bwd<Radial, X, inverse>(a);
}

template <class T>
FF_D void radial_finish(const StepsFinish& a) {
  finish_columns<T>(a);
}

}  // namespace fastflow
