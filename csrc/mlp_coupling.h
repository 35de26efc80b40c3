// What the layers of an MLP-coupling stack compute elementwise, beside csrc/coupling.h: the hidden activations, their
// slopes from what backward keeps of them, and ActNorm.
#pragma once

#include "trace.h"

namespace fastflow {

// as ACTIVATIONS in fastflow/ops/mlp_stack.py
enum class HiddenKind : int { relu, leaky_relu, tanh, elu, silu, softplus };

// Of silu, whose output does not determine its slope, the slope is kept beside the output.
FF_HD constexpr bool keeps_slope(HiddenKind kind) { return kind == HiddenKind::silu; }

FF_HD constexpr Activation smooth(HiddenKind kind) {
  return kind == HiddenKind::tanh       ? Activation::tanh
         : kind == HiddenKind::elu      ? Activation::elu
         : kind == HiddenKind::softplus ? Activation::softplus
                                        : Activation::silu;
}

// phi(a), phi'(a); `leak` is the slope below 0. NaN passes.
template <HiddenKind kind, class T>
FF_HD Slope<T> hidden(T a, [[maybe_unused]] T leak) {
  if constexpr (kind == HiddenKind::relu)
    return {a <= T(0) ? T(0) : a, a <= T(0) ? T(0) : T(1)};
  else if constexpr (kind == HiddenKind::leaky_relu)
    return {a > T(0) ? a : leak * a, a > T(0) ? T(1) : leak};
  else
    return activate<smooth(kind)>(a);
}

// phi'(a) from y = phi(a); of leaky_relu where leak > 0. Not for kinds that keep their slope.
template <HiddenKind kind, class T>
FF_HD T slope_from_output(T y, [[maybe_unused]] T leak) {
  if constexpr (kind == HiddenKind::relu)
    return y <= T(0) ? T(0) : T(1);
  else if constexpr (kind == HiddenKind::leaky_relu)
    return y > T(0) ? T(1) : leak;
  else
    return curve<smooth(kind)>(y).d;
}

}  // namespace fastflow
