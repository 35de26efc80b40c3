// One variable of an autoregressive layer solved for x, and the gradient of that. t and h are the network's outputs.
#pragma once

#include "scale_map.h"

namespace fastflow {

enum Form { kScaleFirst, kShiftFirst, kGate, kBernoulli };  // as FORMS in fastflow/ops/autoregressive.py

template <class T>
struct Solved {
  T x, logdet;
};

// `sign` is -1, +1 for the reciprocal of a scale: x sees s^sign
template <int form, int kind, class T>
FF_HD Solved<T> solve(T z, T t, T h, T sign, const MapConstants<T>& c) {
  if constexpr (form == kBernoulli) {  // log p(x) = x t - softplus(t)
    const Logistic<T> f = logistic(t);
    const T x = z < f.sigmoid ? T(1) : T(0);
    return {x, x * t - f.softplus};
  } else {
    const ScaleSlope<T> scale = scale_slope<kind>(h, c.amplitude, c);
    const T logdet = sign * scale.log_s;
    if constexpr (form == kGate) return {z + (z - t) * exp(-(c.gain * h + c.offset)), logdet};
    const T m = multiplier<kind>(scale, sign);
    return {form == kShiftFirst ? z * m - t : (z - t) * m, logdet};
  }
}

template <class T>
struct SolvedGrad {
  T gz, gt, gh;
};

// gx and glogdet are the gradients of what solve() returned
template <int form, int kind, class T>
FF_HD SolvedGrad<T> solve_grad(T x, T z, T t, T h, T gx, T glogdet, T sign, const MapConstants<T>& c) {
  const ScaleSlope<T> scale = scale_slope<kind>(h, c.amplitude, c);
  const T slope = sign * scale.dlog_s;
  if constexpr (form == kGate) {
    const T odds = exp(-(c.gain * h + c.offset));  // (1 - s) / s
    return {gx + gx * odds, -gx * odds, glogdet * slope - gx * c.gain * (z - t) * odds};
  }
  const T gz = gx * multiplier<kind>(scale, sign);
  if constexpr (form == kShiftFirst) return {gz, -gx, slope * (gx * (x + t) + glogdet)};
  return {gz, -gz, slope * (gx * x + glogdet)};
}

}  // namespace fastflow
