// Layers of a network with few inputs or few outputs, on a block of 64 samples: no products of matrices but loops over
// the rows of the wide side, which do all that happens to a row while it is in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "mlp_stack.h"
#include "tile.h"
#include "transpose.h"

namespace fastflow::mlp {

constexpr int64_t kSamples = 64;  // of a block
constexpr int64_t kNarrow = 4;    // inputs or outputs that are few

template <class T>
bool is_narrow(const Linear<T>& l) {
  return std::min(l.in, l.out) <= kNarrow;
}

// f(n), 1 <= n <= kNarrow, with n constant
template <class F>
void with_count(int64_t n, const F& f) {
  static_assert(kNarrow == 4, "the cases below");
  if (n == 1) f(std::integral_constant<int64_t, 1>());
  if (n == 2) f(std::integral_constant<int64_t, 2>());
  if (n == 3) f(std::integral_constant<int64_t, 3>());
  if (n == 4) f(std::integral_constant<int64_t, 4>());
}

// --- sums over the samples --------------------------------------------------------------------------------

// Gradients of a layer's parameters: of W with padded rows, or, where it is narrow, as `dots`. In these and in that of
// b the lanes of a vector are summed apart until the end of the step.
template <class T>
struct LayerGrad {
  T *weight, *dots, *bias;
};

template <class T>
void store_sum(typename Vector<T>::type sum, T* to, bool add) {
  store_vector(add ? load_vector(to) + sum : sum, to);
}

template <class T>
void add_bias_grad(const Linear<T>& l, const T* g, T* to, bool add) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < l.out; ++i) {
    typename Vector<T>::type sum = {};
    for (int64_t v = 0; v < kSamples; v += lanes) sum += load_vector(g + i * kSamples + v);
    store_sum(sum, to + i * lanes, add);
  }
}

// to[i] = the sum of the lanes of from[i]
template <class T>
void sum_lanes(const T* from, int64_t n, T* to) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = std::min(lanes, n - i);
    typename Vector<T>::type rows[lanes] = {};
    std::memcpy(rows, from + i * lanes, count * sizeof(rows[0]));
    T sums[lanes];
    store_vector<T>(lane_sums<T>(rows), sums);
    std::copy_n(sums, count, to + i);
  }
}

// --- few inputs -------------------------------------------------------------------------------------------

// y = phi(W x + b); phi(a, place) is called once for every element
template <int64_t inputs, class T, class F>
void narrow_rows(const Linear<T>& l, const T* x, T* y, F phi) {
  for (int64_t i = 0; i < l.out; ++i) {
    T w[inputs];
    for (int64_t j = 0; j < inputs; ++j) w[j] = l.weight[i * inputs + j];
    const T b = l.bias[i];
    const int64_t row = i * kSamples;
#pragma omp simd
    for (int64_t s = 0; s < kSamples; ++s) {
      T a = b;
#pragma GCC unroll 4
      for (int64_t j = 0; j < inputs; ++j) a += w[j] * x[j * kSamples + s];
      y[row + s] = phi(a, row + s);
    }
  }
}

// gx = W^T g, gW (+)= g x^T, gb (+)= g
template <int64_t inputs, class T>
void narrow_rows_grad(const Linear<T>& l, const T* g, const T* x, T* gx, const LayerGrad<T>& to, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes, vectors = kSamples / lanes;
  V sums[inputs][vectors] = {};
  for (int64_t i = 0; i < l.out; ++i) {
    V bias = {}, dots[inputs] = {};
#pragma GCC unroll 16
    for (int64_t v = 0; v < vectors; ++v) {
      const V gi = load_vector(g + i * kSamples + v * lanes);
      bias += gi;
#pragma GCC unroll 4
      for (int64_t j = 0; j < inputs; ++j) {
        dots[j] += gi * load_vector(x + j * kSamples + v * lanes);
        sums[j][v] += l.weight[i * inputs + j] * gi;
      }
    }
    store_sum(bias, to.bias + i * lanes, add);
    for (int64_t j = 0; j < inputs; ++j) store_sum(dots[j], to.dots + (i * inputs + j) * lanes, add);
  }
  std::memcpy(gx, sums, sizeof(sums));
}

// --- few outputs ------------------------------------------------------------------------------------------

// gx = W^T g slope(place), gW (+)= g x^T
template <int64_t outputs, class T, class F>
void narrow_columns_grad(const Linear<T>& l, const T* g, const T* x, T* gx, F slope, const LayerGrad<T>& to, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes, vectors = kSamples / lanes;
  for (int64_t j = 0; j < l.in; ++j) {
    T w[outputs];
    for (int64_t i = 0; i < outputs; ++i) w[i] = l.weight[i * l.in + j];
    const int64_t row = j * kSamples;
#pragma omp simd
    for (int64_t s = 0; s < kSamples; ++s) {
      T sum = T(0);
#pragma GCC unroll 4
      for (int64_t i = 0; i < outputs; ++i) sum += w[i] * g[i * kSamples + s];
      gx[row + s] = sum * slope(row + s);
    }
    V dots[outputs] = {};
#pragma GCC unroll 16
    for (int64_t v = 0; v < vectors; ++v)
#pragma GCC unroll 4
      for (int64_t i = 0; i < outputs; ++i)
        dots[i] += load_vector(g + i * kSamples + v * lanes) * load_vector(x + row + v * lanes);
    for (int64_t i = 0; i < outputs; ++i) store_sum(dots[i], to.dots + (i * l.in + j) * lanes, add);
  }
}

}  // namespace fastflow::mlp
