// The one scalar equation behind every inverse of a flow with tanh units:
//
//     a + s tanh(a) = v,     slope = 1 + s > 0  (the derivative at a = 0, where it is smallest if s < 0)
//
//     planar     z' = z + u tanh(w.z + b):       v = w.z' + b,  s = w.u,       then z = z' - u tanh(a)
//     Sylvester  y + r1 tanh(r2 y + c) = t:      v = r2 t + c,  s = r1 r2,     then y = t - r1 tanh(a)
//
// It takes the slope and not s: at the edge of invertibility, s -> -1, all of what is left is in the slope, and what
// the caller knows of it exactly (planar: softplus(w.u)) a difference 1 + s would round away. slope = 0 has a root too.
//
// The function is odd; for v >= 0 it is convex where s <= 0 and concave where s >= 0. Newton's method therefore walks
// from a bound of the root on the right side straight to it and never crosses: it needs no bisection, and a step that
// would turn back is rounding and ends it. The bounds (each holds everywhere, the best is taken):
//     s < 0, from above:  v / slope,  v + |s|,  (5 v / |s|)^(1/3) where that is <= 1, for a - tanh a >= a^3 / 5 there
//     s > 0, from below:  v / slope,  v - s
// leave at most 6 steps in float, 7 in double (slope 1e-30 ... 1e6, |v| 1e-30 ... 1e3). NaN in, NaN out.
//
// The gradient is the implicit one:  da = (dv - tanh(a) ds) / (1 + s sech^2 a).
#pragma once

#include "math.h"

namespace fastflow {

template <class T>
constexpr int kRootSteps = sizeof(T) == 4 ? 8 : 9;

template <class T>
struct Tanh {
  T h, d;  // tanh(a), and 1 - h^2 without cancellation
};

template <class T>
FF_HD Tanh<T> tanh_slope(T a) {
  const T q = exp_nonpositive(T(-2) * abs(a)), r = T(1) / (T(1) + q);
  const T large = T(1) - T(2) * (q * r);
  const bool small = abs(a) < T(0.625);
  const T h = small ? a + tanh_small(a) : (a < T(0) ? -large : large);
  return {h, small ? T(1) - h * h : T(4) * q * (r * r)};
}

// log(1 + x) for x >= -0.5: with what rounding 1 + x lost, to first order
template <class T>
FF_HD T log1p_above(T x) {
  const T u = T(1) + x;
  return log(u) + (x - (u - T(1))) / u;
}

// log(1 + s d) with d = 1 - h^2: the logarithm of the derivative at a. No cancellation on either side of 0.
template <class T>
FF_HD T log_derivative(T slope, Tanh<T> t) {
  const T x = (slope - T(1)) * t.d;
  return x < T(-0.5) ? log(slope + (T(1) - slope) * (t.h * t.h)) : log1p_above(x);
}

// 1 + s d, as accurate
template <class T>
FF_HD T derivative(T slope, Tanh<T> t) {
  const T s = slope - T(1);
  return s < T(0) ? slope - s * (t.h * t.h) : T(1) + s * t.d;
}

// a bound of the root for v >= 0
template <class T>
FF_HD T root_start(T v, T slope) {
  const T s = slope - T(1);
  const T line = v / slope, flat = v - s;
  T above = line < flat ? line : flat;  // slope 0: inf or NaN, and flat
  const T cube = T(-5) * v / s;
  const T small = exp(log(cube) * T(1.0 / 3));
  above = cube < T(1) && !(above < small) ? small : above;
  return s < T(0) ? above : (line > flat ? line : flat);
}

// the next a, for v >= 0; the same again once it is found
template <class T>
FF_HD T root_step(T a, T v, T slope) {
  const T s = slope - T(1);
  const Tanh<T> t = tanh_slope(a);
  const T rest = a < T(0.625) ? -tanh_small(a) : a - t.h;  // a - tanh a
  const T f = s < T(0) ? (slope * a - v) - s * rest : (a - v) + s * t.h;
  const T step = f / derivative(slope, t);
  return (s < T(0) ? step > T(0) : step < T(0)) ? a - step : a;
}

// a in one go: what a thread calls; for many equations on the CPU see cpu/roots.h
template <class T>
FF_HD T tanh_root(T v, T slope) {
  const T target = abs(v);
  T a = root_start(target, slope);
  for (int i = 0; i < kRootSteps<T>; ++i) {
    const T next = root_step(a, target, slope);
    if (next == a) break;
    a = next;
  }
  a = v < T(0) ? -a : a;
  return v == v && slope == slope ? a : not_a_number<T>();
}

}  // namespace fastflow
