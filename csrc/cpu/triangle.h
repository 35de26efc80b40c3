// Products of a vector with the strict triangles of a matrix F [n, n] that stays where it is, whole vectors at a time:
// rows are `row` elements apart and padded to whole vectors, as are the vectors, with zeros. What lies in the other
// triangle and on the diagonal is read, but never counts, NaN or not.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tile.h"

namespace fastflow {

template <class T>
struct Lanes {
  using V = typename Vector<T>::type;
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Int I __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t n = Vector<T>::lanes;

  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  static I index() {
    I i = {};
    for (int64_t k = 0; k < n; ++k) i[k] = Int(k);
    return i;
  }
  static V below(V v, int64_t m) { return index() < I{} + Int(m) ? v : V{}; }  // lanes before m
  static V above(V v, int64_t m) { return index() > I{} + Int(m) ? v : V{}; }  // lanes after m
  static T sum(V v) {
    T part[n];
    store(part, v);
    for (int64_t width = n / 2; width > 0; width /= 2)
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) part[k] += part[k + width];
    return part[0];
  }
};

// sum over j < i of F[j] w[j], F a row
template <class T>
T head_dot(const T* F, int64_t i, const T* w) {
  using L = Lanes<T>;
  typename L::V sum = {};
  int64_t c = 0;
  for (; c + L::n <= i; c += L::n) sum += L::load(F + c) * L::load(w + c);
  if (c < i) sum += L::below(L::load(F + c), i - c) * L::load(w + c);
  return L::sum(sum);
}

// sum over j > i of F[j] w[j]
template <class T>
T tail_dot(const T* F, int64_t i, int64_t n, const T* w) {
  using L = Lanes<T>;
  int64_t c = i / L::n * L::n;
  typename L::V sum = L::above(L::load(F + c), i - c) * L::load(w + c);
  for (c += L::n; c < n; c += L::n) sum += L::load(F + c) * L::load(w + c);
  return L::sum(sum);
}

// out[i] += sum over j > i of F[i, j] w[j]:  the strictly upper triangle
template <class T>
void add_upper(const T* F, int64_t row, int64_t n, const T* w, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += tail_dot(F + i * row, i, n, w);
}

// out[i] += sum over j < i of F[i, j] w[j]:  the strictly lower triangle
template <class T>
void add_lower(const T* F, int64_t row, int64_t n, const T* w, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += head_dot(F + i * row, i, w);
}

// sum over rows i of [begin, end) of F[i, c : c + lanes] w[i]
template <class T>
typename Vector<T>::type columns_dot(const T* F, int64_t row, int64_t begin, int64_t end, const T* w) {
  using L = Lanes<T>;
  typename L::V sum[4] = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] += w[i + u] * L::load(F + (i + u) * row);
  for (; i < end; ++i) sum[0] += w[i] * L::load(F + i * row);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// out[j] += sum over i < j of F[i, j] w[i]:  the transpose of the strictly upper triangle
template <class T>
void add_upper_transposed(const T* F, int64_t row, int64_t n, const T* w, T* out) {
  using L = Lanes<T>;
  for (int64_t c = 0; c < n; c += L::n) {
    typename L::V sum = columns_dot(F + c, row, 0, c, w);
    for (int64_t i = c; i < std::min(c + L::n, n); ++i) sum += w[i] * L::above(L::load(F + i * row + c), i - c);
    L::store(out + c, L::load(out + c) + sum);
  }
}

// out[j] += sum over i > j of F[i, j] w[i]:  the transpose of the strictly lower triangle
template <class T>
void add_lower_transposed(const T* F, int64_t row, int64_t n, const T* w, T* out) {
  using L = Lanes<T>;
  for (int64_t c = 0; c < n; c += L::n) {
    typename L::V sum = columns_dot(F + c, row, std::min(c + L::n, n), n, w);
    for (int64_t i = c; i < std::min(c + L::n, n); ++i) sum += w[i] * L::below(L::load(F + i * row + c), i - c);
    L::store(out + c, L::load(out + c) + sum);
  }
}

// out[j] += sum over i of F[i, j] w[i], a whole matrix [rows, n]
template <class T>
void add_transposed(const T* F, int64_t row, int64_t rows, int64_t n, const T* w, T* out) {
  using L = Lanes<T>;
  for (int64_t c = 0; c < n; c += L::n) L::store(out + c, L::load(out + c) + columns_dot(F + c, row, 0, rows, w));
}

// out[i] = sum over j of F[i, j] w[j], a whole matrix [rows, n]
template <class T>
void product(const T* F, int64_t row, int64_t rows, int64_t n, const T* w, T* out) {
  for (int64_t i = 0; i < rows; ++i) out[i] = head_dot(F + i * row, n, w);
}

// F[i, j] = lower[i] head[j] for j < i, upper[i] tail[j] for j > i, 0 on the diagonal
template <class T>
void outer_triangles(int64_t row, int64_t n, const T* lower, const T* head, const T* upper, const T* tail, T* F) {
  using L = Lanes<T>;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < n; c += L::n) {
      const typename L::V left = lower[i] * L::load(head + c), right = upper[i] * L::load(tail + c);
      L::store(F + i * row + c, c + L::n <= i ? left : c > i ? right : L::below(left, i - c) + L::above(right, i - c));
    }
}

}  // namespace fastflow
