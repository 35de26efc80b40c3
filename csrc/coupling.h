// Affine coupling, elementwise:   y = x m + g t   or   y = (x + g t) m,   log m = +-log s(h)
// The inverse of either form is the other one with -g and 1 / m, so one functor serves both directions.
#pragma once

#include "scale_map.h"

namespace fastflow {

template <class T>
struct CouplingConstants {
  T shift_gain;  // g
  T sign;        // log m = sign * log s: -1 where m = 1 / s
  MapConstants<T> map;
};

template <class T>
struct CouplingValue {
  T y, log_m;
};

// `add_first` and `from_output` are constants on the CPU, whose loops must not branch
template <int kind, class T>
FF_HD CouplingValue<T> coupling(T x, T t, T h, T amplitude, const CouplingConstants<T>& c, bool add_first) {
  const ScaleSlope<T> scale = scale_slope<kind>(h, amplitude, c.map);
  const T m = multiplier<kind>(scale, c.sign);
  const T shift = c.shift_gain * t;
  return {add_first ? (x + shift) * m : x * m + shift, c.sign * scale.log_s};
}

template <class T>
struct CouplingGrad {
  T gx, gt, gh, gamplitude;
};

// `value` is x, or y when from_output: x m is then y - g t (or y), so nothing is ever divided
template <int kind, class T>
FF_HD CouplingGrad<T> coupling_grad(T value, T t, T h, T amplitude, T gy, T glogdet, const CouplingConstants<T>& c,
                                    bool add_first, bool from_output) {
  const ScaleSlope<T> scale = scale_slope<kind>(h, amplitude, c.map);
  const T m = multiplier<kind>(scale, c.sign);
  const T shift = c.shift_gain * t;
  const T gx = gy * m;
  T scaled;  // the term of y that m multiplies, times m
  if (add_first)
    scaled = from_output ? value : (value + shift) * m;
  else
    scaled = from_output ? value - shift : value * m;
  const T glog_m = gy * scaled + glogdet;
  const T glog_s = c.sign * glog_m;
  return {gx, c.shift_gain * (add_first ? gx : gy), glog_s * scale.dlog_s, glog_s * scale.damplitude};
}

}  // namespace fastflow
