// The activations of masked networks, with the slope that a gradient sees.
#pragma once

#include "trace.h"

namespace fastflow {

enum class Unit : int { linear = -1, relu, tanh, softplus, elu, silu };  // as ACTIVATIONS in fastflow/ops/masked.py

// (phi(a), phi'(a)); NaN stays NaN
template <Unit kind, class T>
FF_HD Slope<T> unit(T a) {
  if constexpr (kind == Unit::linear) return {a, T(1)};
  if constexpr (kind == Unit::relu) return {a < T(0) ? T(0) : a, a <= T(0) ? T(0) : T(1)};
  if constexpr (kind == Unit::tanh) return activate<Activation::tanh>(a);
  if constexpr (kind == Unit::softplus) return activate<Activation::softplus>(a);
  if constexpr (kind == Unit::elu) return activate<Activation::elu>(a);
  if constexpr (kind == Unit::silu) return activate<Activation::silu>(a);
}

}  // namespace fastflow
