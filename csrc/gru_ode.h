// GRU-ODE-Bayes, unit by unit: the cell's gates, the jump, what a channel's observation is made to, and their slopes.
// Host and device.
#pragma once

#include "math.h"
#include "wavenet.h"

namespace fastflow {

enum class CellKind : int { full, minimal };  // as CELLS in fastflow/ops/gru_ode_reference.py

template <class T>
FF_HD T sigmoid(T a) {
  const T q = exp_nonpositive(-abs(a)), big = T(1) / (T(1) + q);
  return a < T(0) ? q * big : big;
}

// --- dh/dt = (1 - z)(u - h), u = tanh(.. U (r h)); the minimal cell has z in the place of r ---------------

// u = tanh(a), c = 1 - z = sigmoid(-b), and dh/dt
template <class T>
FF_HD T full_rate(T a, T b, T h, T& u, T& c) {
  const Gate<T> f = gate(a, -b);
  u = f.tanh, c = f.sigmoid;
  return c * (u - h);
}

// From the gradient gk of dh/dt to those of a, b and h.
template <class T>
FF_HD void full_rate_backward(T gk, T u, T c, T h, T& ga, T& gb, T& gh) {
  const T through = gk * c;
  ga = through * (T(1) - u * u);
  gb = -(u - h) * through * (T(1) - c);
  gh = -through;
}

template <class T>
FF_HD T minimal_rate(T a, T z, T h, T& u) {
  u = tanh(a);
  return (T(1) - z) * (u - h);
}

template <class T>
FF_HD void minimal_rate_backward(T gk, T u, T z, T h, T& ga, T& gz, T& gh) {
  const T through = gk * (T(1) - z);
  ga = through * (T(1) - u * u);
  gz = -(u - h) * gk;
  gh = -through;
}

// --- the jump, torch.nn.GRUCell -------------------------------------------------------------------------

// r, z and n come as what goes into their functions (n without r hn) and become their values; returns the new state
template <class T>
FF_HD T jump(T& r, T& z, T& n, T hn, T h) {
  r = sigmoid(r), z = sigmoid(z), n = tanh(n + r * hn);
  return n + z * (h - n);
}

// r, z, n and hn become the gradients of what goes into their functions; returns that of h but for the products
template <class T>
FF_HD T jump_backward(T g, T& r, T& z, T& n, T& hn, T h) {
  const T gn = g * (T(1) - z) * (T(1) - n * n), through = g * z;
  z = g * (h - n) * z * (T(1) - z);
  const T slope = r * (T(1) - r);
  n = gn;
  const T gr = gn * hn * slope;
  hn = gn * r;
  r = gr;
  return through;
}

// --- a channel's observation ----------------------------------------------------------------------------

template <class T>
struct Features {
  T value, mean, logvar, error, inverse;  // error = (value - mean) / std, inverse = 1 / std
};

template <class T>
FF_HD Features<T> features(T value, T mean, T logvar) {
  const T inverse = exp(T(-0.5) * logvar);
  return {value, mean, logvar, (value - mean) * inverse, inverse};
}

}  // namespace fastflow
