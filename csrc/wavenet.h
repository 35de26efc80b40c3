// The gate of a WaveNet layer, tanh(a) sigmoid(b), and its slopes: host and device.
#pragma once

#include "math.h"

namespace fastflow {

template <class T>
struct Gate {
  T tanh, sigmoid;
};

// With q = e^{-2|a|} - 1 and r = e^{-|b|}:  tanh|a| = -q / (2 + q),  sigmoid|b| = 1 / (1 + r); one division for both.
template <class T>
FF_HD Gate<T> gate(T a, T b) {
  const T v = T(-2) * abs(a), r = exp_nonpositive(-abs(b));
  const bool small = v > T(-0.34);
  const T q = small ? expm1_reduced(small ? v : T(0)) : exp_nonpositive(v) - T(1);
  const T x = T(2) + q, y = T(1) + r, inverse = T(1) / (x * y);
  const T t = -q * y * inverse, s = (b < T(0) ? r : T(1)) * x * inverse;
  return {a < T(0) ? -t : t, s};
}

// the gradients of a and b from that of tanh(a) sigmoid(b)
template <class T>
FF_HD void gate_backward(T tanh, T sigmoid, T g, T& ga, T& gb) {
  ga = g * sigmoid * (T(1) - tanh * tanh);
  gb = g * tanh * sigmoid * (T(1) - sigmoid);
}

}  // namespace fastflow
