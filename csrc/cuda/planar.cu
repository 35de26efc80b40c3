// Planar flows on a GPU. The parameters of a unit: û [D], w [D], b, 1 + w.û; kept of it is the argument of its tanh.
#include "../planar.h"
#include "steps.cuh"

namespace fastflow {

struct Planar {
  template <bool inverse, class T>
  FF_D static T apply(const Step<T>& s, T* z, double& logdet) {
    const T *u = s.p, *w = s.p + s.width, b = w[s.width], slope = w[s.width + 1];
    const T v = T(s.sum([&](int d) { return double(z[d] * w[d]); })) + b;
    const T a = inverse ? tanh_root(v, slope) : v;
    const Tanh<T> t = tanh_slope(a);
    const double change = double(log_derivative(slope, t));
    logdet += inverse ? -change : change;
    s.variables([&](int d) { z[d] += inverse ? -u[d] * t.h : u[d] * t.h; });
    return a;
  }

  template <bool inverse, class T, class Put>
  FF_D static void gradient(const Step<T>& s, T kept, const T* z, T* g, T gl, const Put& put) {
    const T *u = s.p, *w = s.p + s.width, slope = w[s.width + 1];
    const Tanh<T> t = tanh_slope(kept);
    const T dot = T(s.sum([&](int d) { return double(u[d] * g[d]); }));
    const UnitGradient<T> own = unit_gradient<inverse>(slope, t, dot, gl);
    s.variables([&](int d) {
      const T back = g[d] + own.a * w[d];
      put(d, inverse ? -t.h * back : t.h * g[d]);
      put(s.width + d, own.a * z[d]);
      g[d] = back;
    });
    if (s.lane) return;
    put(2 * s.width, own.a);
    put(2 * s.width + 1, own.slope);
  }
};

template <class X, bool inverse>
FF_D void planar_fwd(const StepsForward& a) {
  steps_fwd<Planar, X, inverse>(a);
}

template <class X, bool inverse>
FF_D void planar_bwd(const StepsBackward& a) {
  steps_bwd<Planar, X, inverse>(a);
}

template <class T>
FF_D void planar_finish(const StepsFinish& a) {
  finish_columns<T>(a);
}

}  // namespace fastflow
