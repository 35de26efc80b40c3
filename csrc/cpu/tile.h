// Products of matrices that fit the cache, C = A B: a tile of C stays in vector registers while the inner dimension
// runs. B and C have contiguous rows padded to kPad elements; A is read element by element through any two strides.
// The register tile is kTileRows x kTileVectors; the ragged edge gets tiles of its exact size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace fastflow {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif

constexpr int64_t kPad = 16;  // a whole number of vectors of either type on every machine

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};

// By value: an array of vectors whose address is taken may end up in memory instead of registers.
template <class T>
inline typename Vector<T>::type load_vector(const T* from) {
  typename Vector<T>::type v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store_vector(typename Vector<T>::type v, T* to) {
  std::memcpy(to, &v, sizeof(v));
}

template <class T>
struct Product {
  int64_t rows, columns, depth;  // C [rows, columns], A [rows, depth], B [depth, columns]; columns padded
  const T* a;
  int64_t a_row, a_depth;  // strides of A
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  bool add = false;  // to what C holds
};

// Of the depth: what is summed in registers before it is added to C. A sum of sums rounds less than one long sum.
constexpr int64_t kRun = 64;

template <int rows, int vectors, class T>
void run_of_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_row, T* c,
                 int64_t c_row, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = V{};
  for (int64_t k = 0; k < depth; ++k) {
    V row[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) row[j] = load_vector(b + k * b_row + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T value = a[i * a_row + k * a_depth];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += value * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      T* to = c + i * c_row + j * lanes;
      store_vector(add ? load_vector(to) + sum[i][j] : sum[i][j], to);
    }
}

template <int rows, int vectors, class T>
void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_row, T* c, int64_t c_row,
          bool add) {
  int64_t k = 0;
  do {
    run_of_tile<rows, vectors>(std::min(kRun, depth - k), a + k * a_depth, a_row, a_depth, b + k * b_row, b_row, c,
                               c_row, add || k > 0);
    k += kRun;
  } while (k < depth);
}

// the rows [first, rows) of one column of tiles, fewer than kTileRows of them at the end
template <int count, int vectors, class T>
void last_rows(const Product<T>& p, int64_t first, const T* b, T* c) {
  if constexpr (count > 0) {
    if (p.rows - first == count)
      tile<count, vectors>(p.depth, p.a + first * p.a_row, p.a_row, p.a_depth, b, p.b_row, c + first * p.c_row, p.c_row,
                           p.add);
    else
      last_rows<count - 1, vectors>(p, first, b, c);
  }
}

template <int vectors, class T>
void column(const Product<T>& p, int64_t j) {
  int64_t i = 0;
  for (; i + kTileRows <= p.rows; i += kTileRows)
    tile<kTileRows, vectors>(p.depth, p.a + i * p.a_row, p.a_row, p.a_depth, p.b + j, p.b_row, p.c + i * p.c_row + j,
                             p.c_row, p.add);
  last_rows<kTileRows - 1, vectors>(p, i, p.b + j, p.c + j);
}

template <int vectors, class T>
void columns(const Product<T>& p, int64_t j) {
  if constexpr (vectors > 0) {
    constexpr int64_t width = vectors * Vector<T>::lanes;
    for (; j + width <= p.columns; j += width) column<vectors>(p, j);
    columns<vectors - 1>(p, j);
  }
}

template <class T>
void multiply(const Product<T>& p) {
  columns<kTileVectors>(p, 0);
}

// The same for matrices of any size and any strides of B: a panel of B is packed, then all rows of A go past it.
constexpr int64_t kPanel = 64;       // columns of B that are packed together
constexpr int64_t kPanelRows = 120;  // rows of a task where there are few panels

template <class T>
void pack(const Product<T>& p, int64_t b_column, int64_t first, int64_t count, int64_t width, T* to) {
  constexpr int64_t step = 16;  // of the depth: rows of the panel that stay in L1 while a transposed B is read
  if (count < width) std::fill(to, to + p.depth * width, T(0));
  for (int64_t k0 = 0; k0 < p.depth; k0 += step)
    for (int64_t j = 0; j < count; ++j)
      for (int64_t k = k0; k < std::min(k0 + step, p.depth); ++k)
        to[k * width + j] = p.b[k * p.b_row + (first + j) * b_column];
}

template <class T>
void multiply_panels(const Product<T>& p, int64_t b_column) {
  const int64_t panels = (p.columns + kPanel - 1) / kPanel;
  const int64_t height = panels < 8 ? kPanelRows : std::max<int64_t>(1, p.rows);
  const int64_t strips = (p.rows + height - 1) / height;
  parallel_for(panels * strips, p.rows * p.columns * p.depth >= 256 * 1024, [&](int64_t begin, int64_t end) {
    std::vector<T> panel(p.depth * kPanel), out(height * kPad);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / strips * kPanel, count = std::min(kPanel, p.columns - first);
      const int64_t row = task % strips * height, rows = std::min(height, p.rows - row);
      const int64_t width = padded(count), whole = count / kPad * kPad;
      if (packed != first) pack(p, b_column, first, count, width, panel.data());
      packed = first;
      const T* a = p.a + row * p.a_row;
      T* c = p.c + row * p.c_row + first;
      if (whole > 0) multiply(Product<T>{rows, whole, p.depth, a, p.a_row, p.a_depth, panel.data(), width, c, p.c_row});
      if (whole == count) continue;
      multiply(Product<T>{rows, kPad, p.depth, a, p.a_row, p.a_depth, panel.data() + whole, width, out.data(), kPad});
      for (int64_t i = 0; i < rows; ++i) std::copy_n(out.data() + i * kPad, count - whole, c + i * p.c_row + whole);
    }
  });
}

}  // namespace fastflow
