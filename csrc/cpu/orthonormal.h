// Orthonormal columns by a fixed number of Bjorck's iterations, Q <- Q (I + (I - Q^T Q) / 2) from Q0 / |Q0|, on the
// Gram matrix: with E = Q^T Q - I an iteration is  P <- P - E P / 2,  E <- (E^3 - 3 E^2) / 4,  all [M, M], and Q = Q0 P
// at the end. In double: the Gram matrix has the squared condition number. What it lost is got back by the last kPolish
// iterations, which start from Q itself, orthonormal to a few roundings by then; they also see what really came out.
// Q is kept as the rows of its transpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.h"

namespace fastflow {

constexpr int64_t kPolish = 2;  // iterations that start from the columns themselves again

using Doubles = std::vector<double>;

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// A few iterations on rows A [M, D]: Q = scale P A. Rows are padded to whole vectors, with zeros.
class Bjorck {
 public:
  Bjorck(int64_t m, int64_t d, int64_t iterations)
      : m_(m),
        d_(d),
        iterations_(iterations),
        row_(whole(m)),
        wide_(whole(d)),
        size_(m * row_),
        a_(m * wide_),
        transposed_(d * row_),
        e_(size_),
        p_(size_),
        s_(size_) {}

  static int64_t whole(int64_t n) {
    constexpr int64_t lanes = Vector<double>::lanes;
    return (n + lanes - 1) / lanes * lanes;
  }
  double* rows() { return a_.data(); }  // A [M, wide]
  int64_t wide() const { return wide_; }

  // Iterates as often as asked for, but for iterations that would change nothing: after the distance of Q^T Q from I
  // was at most `enough`. Returns |Q^T Q - I|, and Q as rows in `out` [M, wide].
  double forward(bool normalise, double enough, double* out) {
    for (int64_t j = 0; j < d_; ++j)
      for (int64_t i = 0; i < m_; ++i) transposed_[j * row_ + i] = a_[i * wide_ + j];
    multiply(Product<double>{m_, row_, d_, a_.data(), wide_, 1, transposed_.data(), row_, e_.data(), row_});
    double square = 0;
    for (int64_t i = 0; i < m_; ++i) square += e_[i * row_ + i];
    normalised_ = normalise && square > 0;
    scale_ = normalised_ ? 1 / std::sqrt(square) : 1;
    std::fill(p_.begin(), p_.end(), 0.0);
    for (double& e : e_) e *= scale_ * scale_;
    for (int64_t i = 0; i < m_; ++i) e_[i * row_ + i] -= 1, p_[i * row_ + i] = scale_;
    for (done_ = 0; done_ < iterations_;) {
      if (int64_t(kept_.size()) < 2 * (done_ + 1) * size_) kept_.resize(2 * (done_ + 1) * size_);
      double *e = kept_.data() + 2 * done_ * size_, *p = e + size_;
      std::copy(e_.begin(), e_.end(), e);
      std::copy(p_.begin(), p_.end(), p);
      ++done_;
      for (int64_t i = 0; i < size_; ++i) s_[i] = -0.5 * e[i];
      times(s_.data(), p, p_.data(), true);
      times(e, e, s_.data());
      for (int64_t i = 0; i < size_; ++i) e_[i] = -0.75 * s_[i];
      for (int64_t i = 0; i < size_; ++i) s_[i] *= 0.25;
      times(s_.data(), e, e_.data(), true);
      if (dot(e, e, size_) <= enough * enough) break;
    }
    multiply(Product<double>{m_, wide_, m_, p_.data(), row_, 1, a_.data(), wide_, out, wide_});
    return std::sqrt(dot(e_.data(), e_.data(), size_));
  }

  // From the gradient of Q to that of A, both [M, wide]
  void backward(const double* gq, double* ga) {
    gp_.resize(size_), ge_.assign(size_, 0.0), t_.resize(size_);
    multiply(Product<double>{m_, row_, d_, gq, wide_, 1, transposed_.data(), row_, gp_.data(), row_});
    multiply(Product<double>{m_, wide_, m_, p_.data(), 1, row_, gq, wide_, ga, wide_});
    for (int64_t k = done_ - 1; k >= 0; --k) {
      const double *e = kept_.data() + 2 * k * size_, *p = e + size_;
      times(gp_.data(), p, t_.data());  // P, E and its gradient G are symmetric
      // of E^2: G E and its transpose; of E^3: G E E and its transpose, and E G E
      times(ge_.data(), e, s_.data());
      for (int64_t i = 0; i < size_; ++i) t_[i] = -0.25 * t_[i] - 0.75 * s_[i], s_[i] *= 0.25;
      times(s_.data(), e, t_.data(), true);
      times(e, s_.data(), ge_.data());
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j < m_; ++j) ge_[i * row_ + j] += t_[i * row_ + j] + t_[j * row_ + i];
      for (int64_t i = 0; i < size_; ++i) s_[i] = -0.5 * e[i], t_[i] = gp_[i];
      times(s_.data(), t_.data(), gp_.data(), true);
    }
    for (double& g : ge_) g *= 2 * scale_ * scale_;  // of the Gram matrix A A^T
    multiply(Product<double>{m_, wide_, m_, ge_.data(), row_, 1, a_.data(), wide_, ga, wide_, true});
    if (!normalised_) return;
    // Q does not depend on the length of A
    const double along = dot(ga, a_.data(), m_ * wide_) * scale_ * scale_;
    for (int64_t i = 0; i < m_ * wide_; ++i) ga[i] -= along * a_[i];
  }

 private:
  // c = a b, or c += a b
  void times(const double* a, const double* b, double* c, bool add = false) const {
    constexpr int usual = 8;  // the M of the paper: one tile
    if (m_ == usual && row_ == Vector<double>::lanes)
      run_of_tile<usual, 1>(usual, a, usual, 1, b, usual, c, usual, add);
    else
      multiply(Product<double>{m_, row_, m_, a, row_, 1, b, row_, c, row_, add});
  }

  int64_t m_, d_, iterations_, row_, wide_, size_, done_ = 0;
  double scale_ = 1;
  bool normalised_ = false;
  Doubles a_, transposed_, e_, p_, s_, kept_, gp_, ge_, t_;
};

// All iterations for one matrix after the other.
template <class T>
class Orthonormal {
 public:
  Orthonormal(int64_t m, int64_t d, int64_t iterations)
      : m_(m),
        d_(d),
        first_(m, d, std::max<int64_t>(0, iterations - kPolish)),
        second_(m, d, std::min(iterations, kPolish)),
        normalise_(iterations > 0),
        one_(m * first_.wide()),
        two_(m * first_.wide()) {}

  // rows [M, D] of columns -> rows [M, row] of orthonormal columns; returns |Q^T Q - I|
  double forward(const T* from, T* to, int64_t row) {
    const int64_t wide = first_.wide();
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) first_.rows()[i * wide + j] = double(from[i * d_ + j]);
    // with what the second adds, nothing is left in T after that
    first_.forward(normalise_, sizeof(T) == 4 ? 1e-3 : 1e-8, second_.rows());
    const double residual = second_.forward(false, 0, one_.data());
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) to[i * row + j] = T(one_[i * wide + j]);
    return residual;
  }

  // From the gradient of what the last forward gave [M, row] to that of what it took [M, D]
  void backward(const T* grad, int64_t row, T* to) {
    const int64_t wide = first_.wide();
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) one_[i * wide + j] = double(grad[i * row + j]);
    second_.backward(one_.data(), two_.data());
    first_.backward(two_.data(), one_.data());
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) to[i * d_ + j] = T(one_[i * wide + j]);
  }

 private:
  int64_t m_, d_;
  Bjorck first_, second_;
  bool normalise_;
  Doubles one_, two_;
};

}  // namespace fastflow
