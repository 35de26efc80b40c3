// Radial flow, one step:  x = z - c,  r = |x|,  z' = z + y x  with y = β̂ / (α + r),  α > 0,  β̂ = ρ - α,
// ρ = softplus(β) the reach; log-determinant (D - 1) log(1 + y) + log(1 + y α / (α + r)).
//
// 1 + y = (r + ρ) / (α + r) and 1 + y α / (α + r) = (r^2 + 2 α r + α ρ) / (α + r)^2: positive terms only, which is what
// is taken where y is near -1.
//
// The inverse: r' = |z' - c| = r (1 + y) is r^2 + (ρ - r') r - α r' = 0, of which the positive root is taken without
// cancellation; then z = z' - β̂ / (ρ + r) (z' - c).
#pragma once

#include "math.h"
#include "root.h"

namespace fastflow {

// The square of the least distance to the centre: at the centre itself the direction is nothing and not 0 / 0.
template <class T>
constexpr T kNearest = T(1e-24);

template <class T>
FF_HD T sqrt_positive(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return ::sqrtf(x);
  return ::sqrt(x);
#else
  if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
  return __builtin_sqrt(x);
#endif
}

template <class T>
struct Sphere {
  T alpha, reach, alpha_rise, reach_rise;  // and the derivatives by what they are made of

  template <class S>
  FF_HD Sphere<S> as() const {
    return {S(alpha), S(reach), S(alpha_rise), S(reach_rise)};
  }
};

// alpha_map: |α| or softplus(α)
template <class T>
FF_HD Sphere<T> sphere(T alpha, T beta, bool absolute) {
  const Logistic<T> b = logistic(beta), a = logistic(alpha);
  const T sign = alpha > T(0) ? T(1) : alpha < T(0) ? T(-1) : T(0);
  return {absolute ? abs(alpha) : a.softplus, b.softplus, absolute ? sign : a.sigmoid, b.sigmoid};
}

template <class T>
struct Ring {
  T y, logdet;
};

// forward, at the distance r
template <class T>
FF_HD Ring<T> ring(T alpha, T reach, T r, T others) {
  const T h = T(1) / (alpha + r), y = (reach - alpha) * h, e = alpha * h, t = y * e;
  const T across = y < T(-0.5) ? log((r + reach) * h) : log1p_above(y);
  const T along = t < T(-0.5) ? log((r * h) * (r * h) + (T(2) * r + reach) * h * e) : log1p_above(t);
  return {y, others * across + along};  // others: D - 1
}

// r of r'
template <class T>
FF_HD T ring_root(T alpha, T reach, T r) {
  const T q = reach - r, root = sqrt_positive(q * q + T(4) * alpha * r);
  return q > T(0) ? T(2) * alpha * r / (q + root) : (root - q) * T(0.5);
}

// What the gradients of a step's outputs say of its own: `dot` is x.g, g the gradient of its output (z' forward, z in
// the inverse), gl that of its log-determinant.
//   forward: the gradient of z is (1 + y) g + pull x; of the centre what is left of g, that minus this
//   inverse: the gradient of z' is (1 + y') g + pull x with 1 + y' = 1 / (1 + y); of the centre g minus this
template <class T>
struct RingGradient {
  T pull, alpha, reach;
};

template <bool inverse, class T>
FF_HD RingGradient<T> ring_gradient(T alpha, T reach, T r, T dot, T gl, T others) {
  const T h = T(1) / (alpha + r), beta = reach - alpha, y = beta * h, e = alpha * h, t = y * e;
  const T one_y = y < T(-0.5) ? (r + reach) * h : T(1) + y;
  const T one_t = t < T(-0.5) ? (r * h) * (r * h) + (T(2) * r + reach) * h * e : T(1) + t;
  // the log-determinant by y and by e, and through both by r, which is in h alone
  const T ly = others / one_y + e / one_t, le = y / one_t, lr = -(ly * y + le * e) * h;
  T gdot = dot, g = gl, pull = T(0);
  if constexpr (inverse) {
    // λ = J^-1 (g - gl dlogdet/dz); J is 1 + y across x and 1 + t along it. Then as forward, of -λ and -gl.
    const T along = dot / r - gl * lr;  // of the unit vector x / r
    pull = (along / one_t - dot / (r * one_y)) / r;
    gdot = -(along / one_t) * r, g = -gl;
  }
  const T gy = gdot + g * ly, ge = g * le, gh = gy * beta + ge * alpha, gr = -gh * h * h;
  if constexpr (!inverse) pull = gr / r;
  return {pull, ge * h + gr - gy * h, gy * h};
}

}  // namespace fastflow
