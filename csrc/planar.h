// Planar flow, one unit:  z' = z + û tanh(w.z + b),  log-determinant log(1 + s (1 - tanh^2)) with s = w.û,  and what
// makes it invertible:  û = u + (m(w.u) - w.u) w / |w|^2,  m(p) = softplus(p) - 1,  so that s = m(w.u) > -1 exactly.
#pragma once

#include "root.h"

namespace fastflow {

// û = u + shift w
template <class T>
struct Constraint {
  T slope;       // 1 + w.û = softplus(w.u); never 0, so that the log-determinant is finite
  T shift;       // (m(p) - p) / |w|^2
  T rise;        // d slope / dp
  T shift_rise;  // d shift / dp

  template <class S>
  FF_HD Constraint<S> as() const {
    const S rounded = S(slope), smallest = bit_cast<S>(typename Float<S>::Int(1) << Float<S>::mantissa);
    return {rounded < smallest ? smallest : rounded, S(shift), S(rise), S(shift_rise)};
  }
};

template <class T>
FF_HD Constraint<T> constrain(T p, T square) {
  const Logistic<T> f = logistic(p);
  const T smallest = bit_cast<T>(typename Float<T>::Int(1) << Float<T>::mantissa);
  const T opposite = (p < T(0) ? -p : T(0)) + log1p_unit(f.q);  // softplus(-p) = softplus(p) - p
  return {f.softplus < smallest ? smallest : f.softplus, (opposite - T(1)) / square, f.sigmoid, -f.complement / square};
}

// What the gradients of a unit's outputs say of its own: `dot` is û.g, g the gradient of its output (z' forward, z in
// the inverse), gl that of its log-determinant. Then for either direction, with G the gradient of z',
//     the gradient of its input  g + a w,    of b  a,    of w where û and s are held  a z,
//     of û  +-tanh G,    of s  `slope`      (+ forward, - inverse)
template <class T>
struct UnitGradient {
  T a, slope;
};

template <bool inverse, class T>
FF_HD UnitGradient<T> unit_gradient(T slope, Tanh<T> t, T dot, T gl) {
  const T s = slope - T(1), q = derivative(slope, t), share = t.d / q, m = T(2) * gl * s * t.h * share;
  if constexpr (inverse) return {m - share * (dot + s * m), -gl * share};
  return {t.d * dot - m, gl * share};
}

}  // namespace fastflow
