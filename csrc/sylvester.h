// Sylvester flows, the arithmetic of one hidden unit of a step  z' = z + Q R1 tanh(R2 Q^T z + b):
//     log|dz'/dz| = sum log(1 + (1 - tanh(a)^2) r1 r2),   a = R2 Q^T z + b,  r the diagonals of R1 and R2
#pragma once

#include "root.h"

namespace fastflow {

enum class Basis : int { orthogonal, householder, triangular };  // VARIANTS in fastflow/ops/sylvester.py

constexpr double kGap = 1e-6;  // between 1 and a diagonal element: GAP in fastflow/ops/sylvester.py

// r = tanh(raw), no nearer to +-1 than kGap
template <class T>
struct Diagonal {
  T r, gap, d;  // gap = 1 - |r| without cancellation, d = dr/draw
};

template <class T>
FF_HD Diagonal<T> diagonal(T raw) {
  const Tanh<T> t = tanh_slope(raw);
  const T gap = t.d / (T(1) + abs(t.h)), limit = T(1) - T(kGap);
  const bool near = gap < T(kGap);
  const T r = t.h < T(0) ? -limit : limit;
  return {near ? r : t.h, near ? T(kGap) : gap, near ? T(0) : t.d};
}

// 1 + r1 r2
template <class T>
FF_HD T diagonal_slope(const Diagonal<T>& one, const Diagonal<T>& two) {
  const T product = one.r * two.r;
  return product < T(0) ? one.gap + two.gap - one.gap * two.gap : T(1) + product;
}

// d log(1 + r1 r2 (1 - h^2)) / da
template <class T>
FF_HD T log_derivative_slope(T r1, T r2, T slope, Tanh<T> t) {
  return T(-2) * t.h * t.d * (r1 * r2) / derivative(slope, t);
}

}  // namespace fastflow
