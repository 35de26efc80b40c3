// From the scale map that Python names to the instance of a loop that computes it.
#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../scale_map.h"

namespace fastflow {

// ScaleMap.constants in fastflow/ops/scale_map.py: gain, offset, amplitude, eps, maximum
using PackedMap = std::array<double, 5>;

template <class T>
MapConstants<T> map_constants(const PackedMap& m) {
  return {T(m[0]), T(m[1]), T(m[2]), T(m[3]), T(m[4]), T(log(m[2]))};
}

// f(std::integral_constant<int, kind>)
template <class F>
auto with_kind(int kind, const F& f) {
  switch (kind) {
#define FASTFLOW_KIND(k) \
  case k:                \
    return f(std::integral_constant<int, k>());
    FASTFLOW_KIND(kNone)
    FASTFLOW_KIND(kExp)
    FASTFLOW_KIND(kSigmoid)
    FASTFLOW_KIND(kSigmoidEps)
    FASTFLOW_KIND(kSoftplus)
    FASTFLOW_KIND(kTanh)
    FASTFLOW_KIND(kLinearTanh)
    FASTFLOW_KIND(kAtan)
    FASTFLOW_KIND(kSoftClip)
#undef FASTFLOW_KIND
    default:
      throw std::invalid_argument("unknown scale map " + std::to_string(kind));
  }
}

}  // namespace fastflow
