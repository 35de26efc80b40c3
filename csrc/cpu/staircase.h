// Products with staircase matrices: row i has reach[i] leading entries that count, never fewer than the row before.
// A block of samples lies transposed, [units, width]: lanes are samples, and a weight is read where it lies, one
// element for all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../masked.h"
#include "parallel.h"
#include "tile.h"
#include "view.h"

namespace fastflow {

constexpr int64_t kBlock = 64;  // samples

// How many samples of a batch go together: fewer where there would be a single block. Not a matter of threads.
inline int64_t block_width(int64_t samples) { return std::min(kBlock, padded((samples + 1) / 2)); }

template <class T>
struct Stairs {
  const T* data = nullptr;
  int64_t rows = 0, columns = 0, row = 0, column = 0;  // sizes and strides
  std::vector<int64_t> reach;

  Stairs() = default;
  Stairs(const View& weight, const View& reaches)
      : data(reinterpret_cast<const T*>(weight.data)),
        rows(weight.size[0]),
        columns(weight.size[1]),
        row(weight.stride[0]),
        column(weight.stride[1]),
        reach(rows) {
    if (reaches.dtype != DType::i64 || reaches.size[0] != rows)
      throw std::invalid_argument("reach: expected " + std::to_string(rows) + " int64 numbers");
    for (int64_t i = 0; i < rows; ++i) {
      reach[i] = at<int64_t>(reaches, i);
      if (reach[i] < (i > 0 ? reach[i - 1] : 0) || reach[i] > columns)
        throw std::invalid_argument("reach: expected numbers from 0 to " + std::to_string(columns) +
                                    " that do not decrease, got " + std::to_string(reach[i]) + " for unit " +
                                    std::to_string(i));
    }
  }

  // The transpose, its rows and columns counted from their end: a staircase again.
  Stairs mirrored() const {
    Stairs m;
    m.data = data + (rows - 1) * row + (columns - 1) * column;
    m.rows = columns, m.columns = rows, m.row = -column, m.column = -row;
    if (reach.empty()) return m;  // a plain matrix
    m.reach.resize(columns);
    int64_t j = rows;
    for (int64_t i = 0; i < columns; ++i) {
      while (j > 0 && reach[j - 1] > columns - 1 - i) --j;
      m.reach[i] = rows - j;
    }
    return m;
  }
};

// out[i] += sum over k in [from, to) of w(i, k) in[k], for the rows [first, last)
template <class T>
void add_rectangle(const Stairs<T>& w, int64_t first, int64_t last, int64_t from, int64_t to, const T* in, T* out,
                   int64_t width) {
  if (first < last && from < to)
    multiply(Product<T>{last - first, width, to - from, w.data + first * w.row + from * w.column, w.row, w.column,
                        in + from * width, width, out + first * width, width, true});
}

// the same over all that each row reaches
template <class T>
void add_stairs(const Stairs<T>& w, const T* in, T* out, int64_t width) {
  for (int64_t i = 0; i < w.rows; i += kTileRows) {
    const int64_t end = std::min<int64_t>(i + kTileRows, w.rows);
    add_rectangle(w, i, end, 0, w.reach[i], in, out, width);
    for (int64_t k = i + 1; k < end; ++k) add_rectangle(w, k, k + 1, w.reach[i], w.reach[k], in, out, width);
  }
}

// --- blocks of samples ------------------------------------------------------------------------------

constexpr int64_t kWorthIt = 64 * 1024;  // products below which a second thread costs more than it gives

// body(first, count, width) for blocks of samples, each of which costs `work` products a sample
template <class Body>
void each_block(int64_t samples, int64_t work, const Body& body) {
  const int64_t width = std::max<int64_t>(1, block_width(samples)), blocks = (samples + width - 1) / width;
  parallel_for(blocks, samples * work >= kWorthIt, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k * width, std::min(width, samples - k * width), width);
  });
}

// [n, B] as [B, n]
inline View turned(const View& v) {
  View t = v;
  std::swap(t.size[0], t.size[1]);
  std::swap(t.stride[0], t.stride[1]);
  return t;
}

inline View rows_of(const View& v, int64_t first, int64_t count) {
  View r = v;
  r.data += first * v.stride[0] * v.itemsize();
  r.size[0] = count;
  return r;
}

// f(sample, unit, element of the block) for `count` samples of x [B, n] from `first` on; `mirrored` counts units from
// the end. Runs along whichever dimension is contiguous in x, in pieces that stay in L1 along the other.
template <class F>
void each_element(const View& x, int64_t count, int64_t width, bool mirrored, const F& f) {
  const int64_t n = x.size[1];
  const auto place = [&](int64_t i) { return (mirrored ? n - 1 - i : i) * width; };
  if (x.stride[0] == 1) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t b = 0; b < count; ++b) f(b, i, place(i) + b);
    return;
  }
  constexpr int64_t piece = 16;
  for (int64_t i0 = 0; i0 < n; i0 += piece)
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = i0; i < std::min(i0 + piece, n); ++i) f(b, i, place(i) + b);
}

template <class T>
void load(const View& x, int64_t first, int64_t count, int64_t width, bool mirrored, T* to) {
  if (count < width) std::fill(to, to + x.size[1] * width, T(0));
  each_element(x, count, width, mirrored, [&](int64_t b, int64_t i, int64_t k) { to[k] = at<T>(x, first + b, i); });
}

template <class T>
void store(const T* from, const View& x, int64_t first, int64_t count, int64_t width, bool mirrored) {
  each_element(x, count, width, mirrored, [&](int64_t b, int64_t i, int64_t k) { at<T>(x, first + b, i) = from[k]; });
}

// A start [B, n], or [n] for all samples, which becomes [1, n].
inline View start_of(const View& v, int64_t n) { return n != 1 && v.size[1] == 1 ? turned(v) : v; }

// Rows [first, last) of a block from a start [B, n], or [1, n] for all samples.
template <class T>
void fill_start(const View& start, int64_t sample, int64_t count, int64_t width, int64_t first, int64_t last, T* to) {
  for (int64_t i = first; i < last; ++i) {
    T* row = to + i * width;
    if (start.size[0] == 1) {
      std::fill(row, row + width, at<T>(start, 0, i));
      continue;
    }
    for (int64_t b = 0; b < count; ++b) row[b] = at<T>(start, sample + b, i);
    std::fill(row + count, row + width, T(0));
  }
}

// --- activations ------------------------------------------------------------------------------------

// f(std::integral_constant<Unit, kind>)
template <class F>
void with_unit(int activation, const F& f) {
  switch (static_cast<Unit>(activation)) {
    case Unit::linear:
      return f(std::integral_constant<Unit, Unit::linear>());
    case Unit::relu:
      return f(std::integral_constant<Unit, Unit::relu>());
    case Unit::tanh:
      return f(std::integral_constant<Unit, Unit::tanh>());
    case Unit::softplus:
      return f(std::integral_constant<Unit, Unit::softplus>());
    case Unit::elu:
      return f(std::integral_constant<Unit, Unit::elu>());
    case Unit::silu:
      return f(std::integral_constant<Unit, Unit::silu>());
  }
  throw std::invalid_argument("unknown activation " + std::to_string(activation));
}

template <Unit kind, class T>
void apply(const T* a, T* u, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) u[i] = unit<kind>(a[i]).y;
}

template <Unit kind, class T>
void apply_slope(const T* a, T* g, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) g[i] *= unit<kind>(a[i]).d;
}

template <class T>
void add_to(T* a, const T* b, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) a[i] += b[i];
}

// What the hidden layers of a network are, apart from their weights.
struct Hidden {
  int64_t layers;
  int activation;
  bool residual;

  // a_l += a_{l-2}
  bool joins(int64_t l) const { return residual && l >= 2 && l % 2 == 0 && l < layers; }
  int of(int64_t l) const { return residual && l == layers - 1 ? int(Unit::linear) : activation; }
};

}  // namespace fastflow
