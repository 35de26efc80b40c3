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

  // z [D] in T, or in double where it is to be undone
  template <bool inverse, class T, class Z>
  FF_D static T apply(const Step<T>& s, Z* z, double& logdet) {
    const T *c = s.p, alpha = c[s.width], reach = c[s.width + 1];
    const double square = s.sum([&](int d) {
      const T x = T(z[d] - Z(c[d]));
      return double(x * x);
    });
    T r = sqrt_positive(T(square) + kNearest<T>);
    r = inverse ? ring_root(alpha, reach, r) : r;
    const double change = double(ring(alpha, reach, r, T(s.width - 1)).logdet);
    logdet += inverse ? -change : change;
    const Z y = factor<inverse>(Z(alpha), Z(reach), Z(r));
    s.variables([&](int d) { z[d] += y * (z[d] - Z(c[d])); });
    return r;
  }

  template <bool inverse, class T, class Put>
  FF_D static void gradient(const Step<T>& s, T r, double* z, T* g, T gl, const Put& put) {
    const T *c = s.p, alpha = c[s.width], reach = c[s.width + 1], y = factor<inverse>(alpha, reach, r);
    const double a = double(alpha) + double(r), b = double(reach) + double(r), undo = inverse ? b / a : a / b;
    const auto before = [&](int d) { return double(c[d]) + (z[d] - double(c[d])) * undo; };
    const auto apart = [&](int d) { return T((inverse ? z[d] : before(d)) - double(c[d])); };
    const T dot = T(s.sum([&](int d) { return double(apart(d) * g[d]); }));
    const RingGradient<T> own = ring_gradient<inverse>(alpha, reach, r, dot, gl, T(s.width - 1));
    s.variables([&](int d) {
      const T gain = y * g[d] + own.pull * apart(d);
      put(d, -gain);
      g[d] += gain;
      z[d] = before(d);
    });
    if (s.lane) return;
    put(s.width, own.alpha);
    put(s.width + 1, own.reach);
  }
};

template <class X, int inverse>
FF_D void radial_fwd(const StepsForward& a) {
  steps_fwd<Radial, X, inverse != 0>(a);
}

template <class X, int inverse>
FF_D void radial_bwd(const StepsBackward& a) {
  steps_bwd<Radial, X, inverse != 0>(a);
}

template <class T>
FF_D void radial_finish(const StepsFinish& a) {
  finish_columns<T>(a);
}

}  // namespace fastflow
