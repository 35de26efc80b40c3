// Scale maps: from the raw output h of a network to a positive scale s(h), always through log s.
// The constants mirror fastflow/ops/scale_map.py, where the meaning of each map is written in PyTorch.
#pragma once

#include "math.h"

namespace fastflow {

enum MapKind { kNone, kExp, kSigmoid, kSoftplus, kTanh, kLinearTanh, kAtan, kSoftClip, kSigmoidEps };

// a sigmoid with eps = 0 has an exact logarithm, so it is a kind of its own
FF_HD int resolve(int kind, double eps) { return kind == kSigmoid && eps != 0 ? int(kSigmoidEps) : kind; }

// v = gain * h + offset is what a map sees
template <class T>
struct MapConstants {
  T gain, offset, amplitude, eps, maximum;
  T log_amplitude;
};

template <class T>
struct ScaleSlope {
  T log_s, s;
  T dlog_s;      // d log s / d h
  T damplitude;  // d log s / d amplitude, where the amplitude may be learned
};

// Each map is one function of (h, amplitude); `amplitude` is the constant, or the learned one at this element.
template <int kind, class T>
FF_HD ScaleSlope<T> scale_slope(T h, T amplitude, const MapConstants<T>& c) {
  const T v = c.gain * h + c.offset;
  if constexpr (kind == kNone) {
    return {T(0), T(1), T(0), T(0)};
  } else if constexpr (kind == kExp) {
    return {v, exp(v), c.gain, T(0)};
  } else if constexpr (kind == kSigmoid) {  // s = amplitude * sigmoid(v), log sigmoid(v) = v - softplus(v)
    const Logistic<T> f = logistic(-v);
    return {c.log_amplitude - f.softplus, amplitude * f.complement, c.gain * f.sigmoid, T(0)};
  } else if constexpr (kind == kSigmoidEps) {  // s = amplitude * sigmoid(v) + eps
    const Logistic<T> f = logistic(v);
    const T s = amplitude * f.sigmoid + c.eps;
    return {log(s), s, c.gain * amplitude * f.sigmoid * f.complement / s, T(0)};
  } else if constexpr (kind == kSoftplus) {  // s = min(softplus(v) + eps, maximum)
    const Logistic<T> f = logistic(v);
    const T unclamped = f.softplus + c.eps;
    const T s = unclamped > c.maximum ? c.maximum : unclamped;
    // softplus(v) = e^v (1 - e^v / 2 + ...) where it would underflow
    const bool tail = (v < T(-15)) & (c.eps == T(0));
    const T log_s = tail ? v - T(0.5) * f.q : log(s);
    const T slope = tail ? T(1) - T(0.5) * f.q : f.sigmoid / s;
    return {log_s, s, unclamped > c.maximum ? T(0) : c.gain * slope, T(0)};
  } else if constexpr (kind == kTanh) {  // log s = amplitude * tanh(v)
    const T t = tanh(v);
    const T log_s = amplitude * t;
    return {log_s, exp(log_s), c.gain * amplitude * (T(1) - t * t), t};
  } else if constexpr (kind == kLinearTanh) {  // s = 1 + amplitude * tanh(v)
    const T t = tanh(v);
    const T s = T(1) + amplitude * t;
    return {log(s), s, c.gain * amplitude * (T(1) - t * t) / s, T(0)};
  } else if constexpr (kind == kAtan) {  // log s = amplitude * atan(v)
    const T log_s = amplitude * atan(v);
    return {log_s, exp(log_s), c.gain * amplitude / (T(1) + v * v), T(0)};
  } else {  // kSoftClip: log s = v / (1 + |v| / amplitude)
    const T d = T(1) + abs(v) / amplitude;
    const T log_s = v / d;
    return {log_s, exp(log_s), c.gain / (d * d), T(0)};
  }
}

// Maps whose reciprocal takes a division: a loop over them fixes the sign first.
FF_HD constexpr bool divides(int kind) {
  return kind == kSigmoid || kind == kSigmoidEps || kind == kSoftplus || kind == kLinearTanh;
}

// e^{sign * log s}: the scale, or its reciprocal for sign = -1, without the log of a rounded scale
template <int kind, class T>
FF_HD T multiplier(const ScaleSlope<T>& scale, T sign) {
  if constexpr (kind == kNone) return T(1);
  if constexpr (!divides(kind)) return exp(sign * scale.log_s);
  return sign < T(0) ? T(1) / scale.s : scale.s;
}

}  // namespace fastflow
