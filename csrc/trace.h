// The activations of MLP dynamics and what a tangent sees of them:  y = phi(a),  y' = phi'(a) a'.  In reverse, with the
// gradients g of y and g' of the tangents y':  g_a = g phi'(a) + phi''(a) sum a' g',  g_a' = g' phi'(a), so one slope
// and one curvature serve every tangent of a unit.
#pragma once

#include "math.h"

namespace fastflow {

enum class Activation : int { tanh, softplus, elu, silu };  // as ACTIVATIONS in fastflow/ops/trace_mlp.py

// Backward keeps the outputs (y, y') of a layer; of silu, whose output does not determine phi', the inputs (a, a').
constexpr bool keeps_input(Activation kind) { return kind == Activation::silu; }

template <class T>
struct Slope {
  T y, d;  // phi(a), phi'(a)
};

template <Activation kind, class T>
FF_HD Slope<T> activate(T a) {
  if constexpr (kind == Activation::tanh) {
    const T y = tanh(a);
    return {y, T(1) - y * y};
  } else if constexpr (kind == Activation::softplus) {
    const Logistic<T> f = logistic(a);
    return {f.softplus, f.sigmoid};
  } else if constexpr (kind == Activation::elu) {
    const T y = expm1(a > T(0) ? T(0) : a);
    return {a > T(0) ? a : y, a > T(0) ? T(1) : y + T(1)};
  } else {  // a sigmoid(a)
    const Logistic<T> f = logistic(a);
    return {a * f.sigmoid, f.sigmoid * (T(1) + a * f.complement)};
  }
}

template <class T>
struct Curve {
  T d, c;  // phi'(a), and c with phi''(a) a' = c times the kept tangent
};

template <Activation kind, class T>
FF_HD Curve<T> curve(T kept) {
  if constexpr (kind == Activation::tanh) {
    return {T(1) - kept * kept, T(-2) * kept};
  } else if constexpr (kind == Activation::softplus) {  // e^-y = 1 - sigmoid(a)
    const T d = -expm1(-kept);
    return {d, T(1) - d};
  } else if constexpr (kind == Activation::elu) {
    return {kept > T(0) ? T(1) : kept + T(1), kept > T(0) ? T(0) : T(1)};
  } else {
    const Logistic<T> f = logistic(kept);
    const T d = f.sigmoid * (T(1) + kept * f.complement);
    return {d, f.sigmoid * f.complement * (T(2) + kept * (f.complement - f.sigmoid))};
  }
}

}  // namespace fastflow
