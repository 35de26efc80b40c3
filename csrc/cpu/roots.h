// The equations of root.h, n of them side by side.
#pragma once

#include <cstdint>

#include "../root.h"

namespace fastflow {

// One step of each; has any moved? Not to be inlined: within an outer loop gcc leaves it scalar.
template <class T>
__attribute__((noinline)) bool root_steps(const T* __restrict v, const T* __restrict slope, T* __restrict a,
                                          int64_t n) {
  T moved = 0;
#pragma omp simd reduction(+ : moved)
  for (int64_t j = 0; j < n; ++j) {
    const T next = root_step(a[j], abs(v[j]), slope[j]);
    moved += next != a[j] ? T(1) : T(0);
    a[j] = next;
  }
  return moved > T(0);
}

// a[j] + (slope[j] - 1) tanh(a[j]) = v[j], until none moves. Every root is what it is whatever its neighbours are.
template <class T>
void tanh_roots(const T* __restrict v, const T* __restrict slope, T* __restrict a, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) a[j] = root_start(abs(v[j]), slope[j]);
  for (int i = 0; i < kRootSteps<T> && root_steps(v, slope, a, n); ++i) {
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T signed_root = v[j] < T(0) ? -a[j] : a[j];
    a[j] = v[j] == v[j] && slope[j] == slope[j] ? signed_root : not_a_number<T>();
  }
}

}  // namespace fastflow
