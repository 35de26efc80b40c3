// The product of tile.h for dense tiles: out[m][n] = start + sum over k of a(m, k) b[k][n], where the rows of out may
// lie one after the other without padding, and the sum may start from a bias.
// The rows of b and out are contiguous and are read and written in whole vectors, up to kPad elements beyond their
// end; a is read one element at a time, with any strides.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile.h"

namespace fastflow {

// a(m, k) lies at data[m * row + k * column].
template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};

// What a sum starts from: value(m, n) at data[m * row + n * column], column 0 or 1; nothing: 0.
template <class T>
struct Start {
  const T* data = nullptr;
  int64_t row = 0, column = 0;
};

template <int rows, int vectors, bool add, class T>
inline void product_block(int64_t depth, const Left<T> a, const T* b, int64_t b_row, const Start<T> start, T* out,
                          int64_t out_row) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = V{};
      if (start.data && start.column)
        sum[i][j] = load_vector(start.data + i * start.row + j * lanes);
      else if (start.data)
        sum[i][j] = V{} + start.data[i * start.row];
    }
  for (int64_t k = 0; k < depth; ++k) {
    V right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = load_vector(b + k * b_row + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      T* to = out + i * out_row + j * lanes;
      store_vector(add ? load_vector(to) + sum[i][j] : sum[i][j], to);
    }
}

template <int vectors, bool add, class T>
inline void product_rows(int64_t m, int64_t depth, Left<T> a, const T* b, int64_t b_row, Start<T> start, T* out,
                         int64_t out_row) {
  constexpr int most = vectors == kTileVectors ? 6 : 8;
  const auto advance = [&](int64_t rows) {
    m -= rows;
    a.data += rows * a.row;
    out += rows * out_row;
    if (start.data) start.data += rows * start.row;
  };
  for (; m >= most; advance(most)) product_block<most, vectors, add>(depth, a, b, b_row, start, out, out_row);
  for (; m >= 4; advance(4)) product_block<4, vectors, add>(depth, a, b, b_row, start, out, out_row);
  for (; m >= 2; advance(2)) product_block<2, vectors, add>(depth, a, b, b_row, start, out, out_row);
  for (; m >= 1; advance(1)) product_block<1, vectors, add>(depth, a, b, b_row, start, out, out_row);
}

// out[m][n] = start + a b, or with `add` out += a b.
// Without `add` out_row may be n itself: what a row writes beyond its end is overwritten by the rows after it. For
// this the columns are done from the last to the first.
template <bool add, class T>
void product(int64_t m, int64_t n, int64_t depth, const Left<T>& a, const T* b, int64_t b_row, const Start<T>& start,
             T* out, int64_t out_row) {
  constexpr int lanes = Vector<T>::lanes, width = kTileVectors * lanes, rows = 24;
  for (int64_t i = 0; i < m; i += rows) {
    const int64_t some = m - i < rows ? m - i : rows;
    for (int64_t j = (n - 1) / width * width; j >= 0; j -= width) {
      const Left<T> left = {a.data + i * a.row, a.row, a.column};
      Start<T> from = start;
      if (from.data) from.data += i * start.row + j * start.column;
      const auto call = [&](auto vectors) {
        product_rows<vectors.value, add>(some, depth, left, b + j, b_row, from, out + i * out_row + j, out_row);
      };
      const int64_t vectors = n - j >= width ? kTileVectors : (n - j + lanes - 1) / lanes;
      if (vectors == 1) call(std::integral_constant<int, 1>());
      if (vectors == 2) call(std::integral_constant<int, 2>());
      if constexpr (kTileVectors > 2) {
        if (vectors == 3) call(std::integral_constant<int, 3>());
        if (vectors == 4) call(std::integral_constant<int, 4>());
      }
    }
  }
}

}  // namespace fastflow
