// Orthonormal columns by a fixed number of Bjorck's iterations, Q <- Q (I + (I - Q^T Q) / 2) from Q0 / |Q0|, on the
// Gram matrix: with G = Q^T Q and T = (3 I - G) / 2 an iteration is P <- T P, G <- T G T, all [M, M], and Q = Q0 P at
// the end. In double: the Gram matrix has the squared condition number. What it lost is got back by the last kPolish
// iterations, which start from Q itself, orthonormal to a few roundings by then; they also see what really came out.
// Q is kept as the rows of its transpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../sylvester.h"
#include "tile.h"

namespace fastflow {

// Some iterations from rows A [M, D].
class Bjorck {
 public:
  Bjorck(int64_t m, int64_t d, int64_t iterations)
      : m_(m), d_(d), iterations_(iterations), row_(whole(m)), wide_(whole(d)), size_(m * row_) {
    a_.resize(m * wide_), transposed_.resize(d * row_), kept_.resize(2 * iterations * size_);
    for (auto* matrix : {&p_, &g_, &h_, &t_}) matrix->resize(size_);
  }

  static int64_t whole(int64_t n) {
    constexpr int64_t lanes = Vector<double>::lanes;
    return (n + lanes - 1) / lanes * lanes;
  }
  double* rows() { return a_.data(); }  // A [M, wide]: what is to be iterated, zeros beyond D
  int64_t wide() const { return wide_; }

  // Iterates, at most as often as asked for: once the distance of G from I was at most `enough`, one more has made the
  // rest vanish. Returns |Q Q^T - I|, and Q in `out` [M, wide].
  double forward(double enough, double* out) {
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) transposed_[j * row_ + i] = a_[i * wide_ + j];
    multiply(Product<double>{m_, row_, d_, a_.data(), wide_, 1, transposed_.data(), row_, g_.data(), row_});
    identity(p_);
    for (done_ = 0; done_ < iterations_;) {
      double *t = kept_t(done_), *p = kept_p(done_), distance = 0;
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j < m_; ++j) {
          const double g = g_[i * row_ + j] - (i == j);
          distance = std::max(distance, std::fabs(g));
          t[i * row_ + j] = (i == j) - 0.5 * g;
        }
      std::copy(p_.begin(), p_.end(), p);
      square(t, p, p_.data());
      square(g_.data(), t, h_.data());
      square(t, h_.data(), g_.data());
      ++done_;
      if (distance <= enough) break;
    }
    multiply(Product<double>{m_, wide_, m_, p_.data(), row_, 1, a_.data(), wide_, out, wide_});
    double total = 0;
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < m_; ++j) {
        const double g = g_[i * row_ + j] - (i == j);
        total += g * g;
      }
    return std::sqrt(total);
  }

  // From the gradient of Q to that of A, both [M, wide]
  void backward(const double* g_out, double* g_a) {
    // of Q = P A
    multiply(Product<double>{m_, row_, d_, g_out, wide_, 1, transposed_.data(), row_, p_gradient(), row_});
    multiply(Product<double>{m_, wide_, m_, p_.data(), 1, row_, g_out, wide_, g_a, wide_});
    double *gp = p_gradient(), *gg = g_.data();
    std::fill(g_.begin(), g_.end(), 0.0);
    for (int64_t k = done_ - 1; k >= 0; --k) {
      const double *t = kept_t(k), *p = kept_p(k);
      // everything but gp is symmetric; G T = 3 T - 2 T^2
      square(t, t, h_.data());
      for (int64_t i = 0; i < size_; ++i) h_[i] = 3 * t[i] - 2 * h_[i];
      square(gg, h_.data(), t_.data());  // of T in T G T: this and its transpose
      square(gp, p, h_.data());          // of T in T P
      for (int64_t i = 0; i < size_; ++i) h_[i] = 0.5 * h_[i] + t_[i];
      square(gg, t, t_.data());
      square(t, t_.data(), gg);
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j < m_; ++j) gg[i * row_ + j] -= 0.5 * (h_[i * row_ + j] + h_[j * row_ + i]);
      square(t, gp, t_.data());
      std::copy(t_.begin(), t_.end(), gp);
    }
    for (double& g : g_) g *= 2;  // of G = A A^T
    multiply(Product<double>{m_, wide_, m_, gg, row_, 1, a_.data(), wide_, g_a, wide_, true});
  }

 private:
  void square(const double* a, const double* b, double* c) const {
    multiply(Product<double>{m_, row_, m_, a, row_, 1, b, row_, c, row_});
  }
  void identity(std::vector<double>& matrix) const {
    std::fill(matrix.begin(), matrix.end(), 0.0);
    for (int64_t i = 0; i < m_; ++i) matrix[i * row_ + i] = 1;
  }
  double* kept_t(int64_t k) { return kept_.data() + 2 * k * size_; }
  double* kept_p(int64_t k) { return kept_t(k) + size_; }
  double* p_gradient() { return gp_.empty() ? (gp_.resize(size_), gp_.data()) : gp_.data(); }

  int64_t m_, d_, iterations_, row_, wide_, size_, done_ = 0;
  std::vector<double> a_, transposed_, kept_, p_, g_, h_, t_, gp_;
};

// The whole of it for one matrix after the other.
template <class T>
class Orthonormal {
 public:
  Orthonormal(int64_t m, int64_t d, int64_t iterations)
      : m_(m),
        d_(d),
        scaled_(iterations > 0),
        first_(m, d, std::max<int64_t>(0, iterations - kPolish)),
        second_(m, d, std::min<int64_t>(iterations, kPolish)),
        out_(m * first_.wide()) {}

  // rows [M, D] of columns -> rows [M, row] of orthonormal columns; returns |Q^T Q - I|
  double forward(const T* from, T* to, int64_t row) {
    const int64_t wide = first_.wide();
    double square = 0;
    for (int64_t i = 0; i < m_ * d_; ++i) square += double(from[i]) * double(from[i]);
    scale_ = scaled_ && square > 0 ? 1 / std::sqrt(square) : 1;
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) first_.rows()[i * wide + j] = scale_ * double(from[i * d_ + j]);
    first_.forward(sizeof(T) == 4 ? 1e-3 : 1e-8, second_.rows());
    const double residual = second_.forward(0, out_.data());
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) to[i * row + j] = T(out_[i * wide + j]);
    return residual;
  }

  // From the gradient of what the last forward gave [M, row] to that of what it took [M, D]
  void backward(const T* grad, int64_t row, T* to) {
    const int64_t wide = first_.wide();
    std::vector<double>& g = out_;
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j) g[i * wide + j] = double(grad[i * row + j]);
    gradient_.resize(g.size());
    second_.backward(g.data(), gradient_.data());
    first_.backward(gradient_.data(), g.data());
    double along = 0;  // of the normalisation: Q does not depend on the length of Q0
    if (scaled_)
      for (int64_t i = 0; i < m_ * wide; ++i) along += g[i] * first_.rows()[i];
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < d_; ++j)
        to[i * d_ + j] = T(scale_ * (g[i * wide + j] - along * first_.rows()[i * wide + j]));
  }

 private:
  int64_t m_, d_;
  bool scaled_;
  double scale_ = 1;
  Bjorck first_, second_;
  std::vector<double> out_, gradient_;
};

}  // namespace fastflow
