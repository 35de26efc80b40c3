// The orthonormal columns Q [D, M] of one step of a Sylvester flow: made by Bjorck's iterations, a product of
// reflections that is never formed, or the identity and the reversal in turns.
#pragma once

#include <algorithm>
#include <vector>

#include "orthonormal.h"
#include "rows.h"
#include "triangle.h"

namespace fastflow {

// rows x columns numbers of a tensor, `stride` apart, that are worked on as contiguous rows of the accumulator type:
// where they lie if they lie so, in a buffer [rows, row] otherwise
template <class T>
struct Block {
  const View& v;
  int64_t offset, stride, rows, columns;

  bool direct(int64_t row) const { return v.dtype == dtype_of<T>() && stride == 1 && row == columns; }
  T* where() const { return reinterpret_cast<T*>(v.data) + offset; }

  const T* read(T* buffer, int64_t row) const {
    if (direct(row)) return where();
    with_type(v.dtype, [&](auto type) {
      using S = decltype(type);
      const auto copy = [buffer](const S& element, int64_t i) { buffer[i] = T(widen(element)); };
      for (int64_t i = 0; i < rows; ++i)
        run(reinterpret_cast<const S*>(v.data) + offset + i * columns * stride, stride, i * row, columns, copy);
    });
    return buffer;
  }
  T* target(T* buffer, int64_t row) const { return direct(row) ? where() : buffer; }
  void commit(const T* values, int64_t row) const {
    if (direct(row)) return;
    with_type(v.dtype, [&](auto type) {
      using S = decltype(type);
      if constexpr ((sizeof(S) == 8) == (sizeof(T) == 8)) {
        const auto copy = [values](S& element, int64_t i) { narrow(values[i], element); };
        for (int64_t i = 0; i < rows; ++i)
          run(reinterpret_cast<S*>(v.data) + offset + i * columns * stride, stride, i * row, columns, copy);
      }
    });
  }
};

// of [B, K, rows columns]
template <class T>
Block<T> block(const View& v, int64_t b, int64_t k, int64_t rows, int64_t columns) {
  return {v, b * v.stride[0] + k * v.stride[1], v.stride[2], rows, columns};
}
// of [B, D]
template <class T>
Block<T> block(const View& v, int64_t b) {
  return {v, b * v.stride[0], v.stride[1], 1, v.size[1]};
}

// Vectors are padded to whole registers, with zeros.
template <class T>
class Columns {
 public:
  Columns(Basis kind, int64_t d, int64_t m, int64_t vectors, int64_t iterations)
      : kind_(kind),
        d_(d),
        m_(m),
        count_(vectors),
        row_(padded(d)),
        rows_(vectors * row_),
        raw_(vectors * d),
        grads_(vectors * row_),
        inputs_(vectors * row_),
        g_(row_),
        factor_(vectors),
        orthonormal_(kind == Basis::orthogonal ? m : 0, d, iterations) {}

  // makes them those of step k of sample b; |Q^T Q - I|
  double load(const View& basis, int64_t b, int64_t k) {
    reversed_ = kind_ == Basis::triangular && k % 2 == 1;
    if (kind_ == Basis::triangular) return 0;
    const Block<T> given = block<T>(basis, b, k, count_, d_);
    if (kind_ == Basis::orthogonal) return orthonormal_.forward(given.read(raw_.data(), d_), rows_.data(), row_);
    const T* from = given.read(raw_.data(), d_);
    for (int64_t h = 0; h < count_; ++h) {
      std::copy_n(from + h * d_, d_, vector(h));
      const T square = dot(vector(h), vector(h));
      factor_[h] = square > T(0) ? T(2) / square : T(0);
    }
    return 0;
  }

  // y = Q^T z
  void project(const T* z, T* y) {
    if (kind_ == Basis::orthogonal) return product(rows_.data(), row_, m_, d_, z, y);
    turn(z, y);
    for (int64_t h = 0; h < count_; ++h) reflect(h, dot(vector(h), y), y);
  }

  // z += sign Q u
  void add(const T* u, T sign, T* z) {
    T* out = g_.data();
    if (kind_ == Basis::orthogonal) {
      std::fill_n(out, row_, T(0));
      add_transposed(rows_.data(), row_, m_, d_, u, out);
    } else {
      turn(u, out);
      for (int64_t h = count_ - 1; h >= 0; --h) reflect(h, dot(vector(h), out), out);
    }
#pragma omp simd
    for (int64_t i = 0; i < d_; ++i) z[i] += sign * out[i];
  }

  // The gradient of what load() read from those of y = Q^T z and of Q u
  void gradient(const T* z, const T* gy, const T* u, const T* gqu, const View& gbasis, int64_t b, int64_t k) {
    if (kind_ == Basis::triangular) return;
    const Block<T> out = block<T>(gbasis, b, k, count_, d_);
    T* to = out.target(raw_.data(), d_);
    if (kind_ == Basis::orthogonal) {
      for (int64_t i = 0; i < m_; ++i) {
        T* row = grads_.data() + i * row_;
        const T one = gy[i], two = u[i];
#pragma omp simd
        for (int64_t j = 0; j < d_; ++j) row[j] = one * z[j] + two * gqu[j];
      }
      orthonormal_.backward(grads_.data(), row_, to);
    } else {
      std::fill(grads_.begin(), grads_.end(), T(0));
      T *x = inputs_.data(), *g = g_.data();
      const auto through = [&](int64_t h) {  // reflection h: x is what went in, g comes and goes on
        const T vg = dot(vector(h), g), vx = dot(vector(h), x + h * row_), f = factor_[h];
        const T *v = vector(h), *in = x + h * row_;
        T* grad = grads_.data() + h * row_;
        const T of_g = -f * vx, of_x = -f * vg, of_v = f * f * vx * vg;
#pragma omp simd
        for (int64_t j = 0; j < d_; ++j) grad[j] += of_g * g[j] + of_x * in[j] + of_v * v[j];
        reflect(h, vg, g);
      };
      std::copy_n(z, d_, g);
      for (int64_t h = 0; h < count_; ++h) {
        std::copy_n(g, d_, x + h * row_);
        reflect(h, dot(vector(h), g), g);
      }
      std::copy_n(gy, d_, g);
      for (int64_t h = count_ - 1; h >= 0; --h) through(h);
      std::copy_n(u, d_, g);
      for (int64_t h = count_ - 1; h >= 0; --h) {
        std::copy_n(g, d_, x + h * row_);
        reflect(h, dot(vector(h), g), g);
      }
      std::copy_n(gqu, d_, g);
      for (int64_t h = 0; h < count_; ++h) through(h);
      for (int64_t h = 0; h < count_; ++h) std::copy_n(grads_.data() + h * row_, d_, to + h * d_);
    }
    out.commit(to, d_);
  }

 private:
  T* vector(int64_t h) { return rows_.data() + h * row_; }
  T dot(const T* a, const T* b) const { return head_dot(a, d_, b); }
  // x -= 2 v (v.x) / (v.v); a vector of zeros reflects nothing
  void reflect(int64_t h, T along, T* x) {
    const T* v = vector(h);
    const T times = factor_[h] * along;
#pragma omp simd
    for (int64_t j = 0; j < d_; ++j) x[j] -= times * v[j];
  }
  void turn(const T* from, T* to) const {
    if (reversed_)
      std::reverse_copy(from, from + d_, to);
    else
      std::copy_n(from, d_, to);
  }

  Basis kind_;
  int64_t d_, m_, count_, row_;
  bool reversed_ = false;
  std::vector<T> rows_, raw_, grads_, inputs_, g_, factor_;
  Orthonormal<T> orthonormal_;
};

}  // namespace fastflow
