// Vectors across: sums of their lanes, and a block of rows transposed by squares of one vector each way; by shuffles
// where the compiler has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "tile.h"

namespace fastflow {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTFLOW_SHUFFLE
#endif
#endif

#if defined(FASTFLOW_SHUFFLE)
// a0 b0 a1 b1 ... from the lower or the upper half of a and b
template <bool upper, class V, size_t... i>
inline V interleave(const V& a, const V& b, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i);
  return __builtin_shufflevector(a, b, int((i & 1) * lanes + i / 2 + (upper ? lanes / 2 : 0))...);
}
#endif

// The sum of the lanes of a[i] in lane i, a tree; overwrites a.
template <class T>
inline typename Vector<T>::type lane_sums(typename Vector<T>::type* a) {
  constexpr int64_t lanes = Vector<T>::lanes;
#if defined(FASTFLOW_SHUFFLE)
  using Lanes = std::make_index_sequence<size_t(lanes)>;
#pragma GCC unroll 4
  for (int64_t half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i)
      a[i] = interleave<false>(a[i], a[i + half], Lanes()) + interleave<true>(a[i], a[i + half], Lanes());
  return a[0];
#else
  typename Vector<T>::type sums = {};
  for (int64_t i = 0; i < lanes; ++i) {
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) a[i][k] += a[i][k + half];
    sums[i] = a[i][0];
  }
  return sums;
#endif
}

// from [rows][columns] to [columns][row], row >= rows a multiple of kPad; zeros behind the end of a row
template <int64_t columns, class T>
void transpose_rows(const T* from, int64_t rows, T* to, int64_t row) {
#if defined(FASTFLOW_SHUFFLE)
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  using Lanes = std::make_index_sequence<size_t(lanes)>;
  static_assert(columns % lanes == 0, "whole vectors");
  for (int64_t r = 0; r < row; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes) {
      V a[lanes], b[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) {
        a[i] = V{};
        if (r + i < rows) std::memcpy(&a[i], from + (r + i) * columns + c, sizeof(V));
      }
    // rows i and i + lanes / 2 interleaved, as often as lanes has bits
#pragma GCC unroll 4
      for (int64_t width = 1; width < lanes; width *= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < lanes / 2; ++i) {
          b[2 * i] = interleave<false>(a[i], a[i + lanes / 2], Lanes());
          b[2 * i + 1] = interleave<true>(a[i], a[i + lanes / 2], Lanes());
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) std::memcpy(to + (c + i) * row + r, &a[i], sizeof(V));
    }
#else
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * row + r] = from[r * columns + c];
    std::fill(to + c * row + rows, to + (c + 1) * row, T(0));
  }
#endif
}

}  // namespace fastflow
