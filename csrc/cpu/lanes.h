// Samples in lanes: a block of samples lies as [n][kLanes], so that every loop over samples is one over contiguous
// memory and vectorises whatever the number n of variables is. No sample depends on its neighbours. Lanes without a
// sample hold zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace fastflow {

template <class T>
constexpr int64_t kLanes = 256 / sizeof(T);

// [n][kLanes] on cache lines
template <class T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t n = 0) : rows_(n) {}
  T* operator[](int64_t i) { return rows_[i].values; }
  T* data() { return rows_.data()->values; }

 private:
  struct alignas(64) Row {
    T values[kLanes<T>];
  };
  std::vector<Row> rows_;
};

// Where a tensor [B, n] has a block of samples; or [B, K, n], at step k.
struct BlockOf {
  const View& view;
  int64_t offset, sample, variable;  // the strides of a sample and of a variable

  BlockOf(const View& v, int64_t first)
      : view(v), offset(first * v.stride[0]), sample(v.stride[0]), variable(v.stride[1]) {}
  BlockOf(const View& v, int64_t first, int64_t k)
      : view(v), offset(first * v.stride[0] + k * v.stride[1]), sample(v.stride[0]), variable(v.stride[2]) {}
};

// f(lane, first variable, last) over a block in pieces of which a row lies in a cache line or two: the samples may be
// any distance apart, and a power of two is usual, which a cache holds few lines of.
template <class F>
void each_piece(int64_t count, int64_t n, const F& f) {
  for (int64_t d = 0; d < n; d += 16)
    for (int64_t l = 0; l < count; ++l) f(l, d, std::min<int64_t>(d + 16, n));
}

template <class T>
void load_lanes(const BlockOf& block, int64_t count, int64_t n, T* to) {
  constexpr int64_t L = kLanes<T>;
  with_type(block.view.dtype, [&](auto type) {
    const auto* from = reinterpret_cast<const decltype(type)*>(block.view.data) + block.offset;
    each_piece(count, n, [&](int64_t l, int64_t first, int64_t last) {
      for (int64_t d = first; d < last; ++d) to[d * L + l] = T(widen(from[l * block.sample + d * block.variable]));
    });
  });
  for (int64_t d = 0; count < L && d < n; ++d) std::fill(to + d * L + count, to + (d + 1) * L, T(0));
}

template <class T>
void store_lanes(const BlockOf& block, int64_t count, int64_t n, const T* from) {
  constexpr int64_t L = kLanes<T>;
  with_type(block.view.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr ((sizeof(S) == 8) == (sizeof(T) == 8)) {
      S* to = reinterpret_cast<S*>(block.view.data) + block.offset;
      each_piece(count, n, [&](int64_t l, int64_t first, int64_t last) {
        for (int64_t d = first; d < last; ++d) narrow(from[d * L + l], to[l * block.sample + d * block.variable]);
      });
    } else {
      throw std::invalid_argument("float64 outputs belong to float64 computations, and only to them");
    }
  });
}

// A parameter that all samples share, [K] or [K, n], in the accumulator's type.
template <class T>
std::vector<T> shared_values(const View& v, int64_t rows, int64_t n) {
  std::vector<T> out(rows * n);
  with_type(v.dtype, [&](auto type) {
    const auto* from = reinterpret_cast<const decltype(type)*>(v.data);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t d = 0; d < n; ++d) out[k * n + d] = T(widen(from[k * v.stride[0] + d * v.stride[1]]));
  });
  return out;
}

// Element (d, l) of a parameter in lanes; one that all samples share is a number for every d.
template <bool each, class T>
inline T lane(const T* p, int64_t d, int64_t l) {
  if constexpr (each) return p[d * kLanes<T> + l];
  return p[d];
}

template <class T>
T sum_lanes(const T* a) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < kLanes<T>; ++l) sum += a[l];
  return sum;
}

// the sum over the lanes of a b
template <class T>
T dot_lanes(const T* a, const T* b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < kLanes<T>; ++l) sum += a[l] * b[l];
  return sum;
}

// to = start + sum over d of a b
template <bool each, class T>
void dot_variables(const T* a, const T* b, const T* start, T* to, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T sum[L];
#pragma omp simd
  for (int64_t l = 0; l < L; ++l) sum[l] = start ? lane<each>(start, 0, l) : T(0);
  for (int64_t d = 0; d < n; ++d)
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) sum[l] += a[d * L + l] * lane<each>(b, d, l);
  std::copy(sum, sum + L, to);
}

}  // namespace fastflow
