// The matrices of invertible 1x1 convolutions from their LU factors, for all layers of a model in one call:
//   W = P L (U + diag(sign e^log_s)),  M = W diag(e^(gain a)),  c = M b,  logdet = sum log_s + gain sum a
// or the inverse M^-1, -b, -logdet. Everything is computed in double and rounded once. A layer is one task; backward
// starts from the factors again, nothing is saved.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "module.h"
#include "rows.h"
#include "tile.h"

namespace fastflow {
namespace {

using Views = std::vector<View>;
using Numbers = std::vector<double>;

constexpr int64_t kParallelWork = 100000;  // multiply-adds below which a second thread costs more than it gives

void axpy(double factor, const double* from, double* to, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) to[j] += factor * from[j];
}

// [n] or [n, m], row after row
Numbers numbers(const View& v) {
  Numbers values(v.size[0] * v.size[1]);
  with_type(v.dtype, [&](auto type) {
    using S = decltype(type);
    double* to = values.data();
    for (int64_t i = 0; i < v.size[0]; ++i) {
      const auto copy = [to](const S& element, int64_t k) { to[k] = double(widen(element)); };
      run(reinterpret_cast<const S*>(v.data) + v.offset(i, 0, 0), v.stride[1], i * v.size[1], v.size[1], copy);
    }
  });
  return values;
}

// out[layer, i, j]: outputs are contiguous
void write(const View& out, int64_t layer, const double* values, int64_t n) {
  with_type(out.dtype, [&](auto type) {
    using S = decltype(type);
    S* to = reinterpret_cast<S*>(out.data) + layer * out.stride[0];
    if constexpr (sizeof(S) >= 4)
      for (int64_t i = 0; i < n; ++i) to[i] = S(values[i]);
  });
}

struct Layer {
  int64_t n;
  double gain;
  Numbers lower, upper;              // L below the diagonal; U with its diagonal: all else is 0
  Numbers log_s, sign, a, b, scale;  // scale = e^(gain a)
  const int64_t* permutation;

  double logdet() const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += log_s[i] + gain * a[i];
    return total;
  }

  // L (U + diag): a dense product in registers outruns half of one row by row
  Numbers product() const {
    const int64_t width = padded(n);
    Numbers unit = lower, wide(n * width), out(n * width);
    for (int64_t i = 0; i < n; ++i) {
      unit[i * n + i] = 1;
      std::copy_n(&upper[i * n], n, &wide[i * width]);
    }
    multiply(Product<double>{n, width, n, unit.data(), n, 1, wide.data(), width, out.data(), width});
    return out;
  }

  // M: the rows of the product in P's order, its columns times e^(gain a)
  Numbers matrix() const {
    const Numbers rows = product();
    const int64_t width = padded(n);
    Numbers out(n * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = rows[permutation[i] * width + j] * scale[j];
    return out;
  }

  // M^-1 = diag(e^(-gain a)) U^-1 L^-1 P^T by substitution in rows
  Numbers inverse() const {
    Numbers rows(n * n), out(n * n);
    for (int64_t i = 0; i < n; ++i) {
      rows[i * n + i] = 1;
      for (int64_t k = 0; k < i; ++k) axpy(-lower[i * n + k], &rows[k * n], &rows[i * n], 0, k + 1);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t k = i + 1; k < n; ++k) axpy(-upper[i * n + k], &rows[k * n], &rows[i * n], 0, n);
      const double scale = sign[i] * std::exp(-log_s[i]);
      for (int64_t j = 0; j < n; ++j) rows[i * n + j] *= scale;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = rows[i * n + permutation[j]] / scale[i];
    return out;
  }
};

struct Factors {
  Views lower, upper, log_s, permutation, sign, log_scale, bias;
  double gain;

  Layer layer(int64_t k) const {
    const int64_t n = log_s[k].size[0];
    Layer one = {n,
                 gain,
                 numbers(lower[k]),
                 numbers(upper[k]),
                 numbers(log_s[k]),
                 numbers(sign[k]),
                 Numbers(n),
                 Numbers(n),
                 Numbers(n),
                 reinterpret_cast<const int64_t*>(permutation[k].data)};
    if (!log_scale.empty()) one.a = numbers(log_scale[k]), one.b = numbers(bias[k]);
    for (int64_t i = 0; i < n; ++i) {
      one.scale[i] = std::exp(gain * one.a[i]);
      std::fill(&one.lower[i * n] + i, &one.lower[i * n] + n, 0.0);
      std::fill(&one.upper[i * n], &one.upper[i * n] + i, 0.0);
      one.upper[i * n + i] = one.sign[i] * std::exp(one.log_s[i]);
    }
    return one;
  }

  int64_t layers() const { return log_s.size(); }

  bool worth_it() const {
    const int64_t n = layers() ? log_s[0].size[0] : 0;
    return layers() * n * n * n / 3 > kParallelWork;
  }

  // an exception must not leave a parallel loop: everything that could be wrong is looked at here
  void check() const {
    const size_t count = log_s.size();
    for (const Views* list : {&lower, &upper, &permutation, &sign})
      if (list->size() != count) throw std::invalid_argument("the lists of factors differ in length");
    if (log_scale.size() != bias.size() || (!bias.empty() && bias.size() != count))
      throw std::invalid_argument("the lists of ActNorm's parameters differ in length");
    const int64_t n = count ? log_s[0].size[0] : 0;
    const DType dtype = count ? log_s[0].dtype : DType::f32;
    const auto number = [n, dtype](const View& v, int64_t columns) {
      return v && v.dtype == dtype && dtype != DType::i64 && v.size[0] == n && v.size[1] == columns && v.size[2] == 1;
    };
    for (size_t k = 0; k < count; ++k) {
      const View& p_k = permutation[k];
      const bool indices =
          p_k && p_k.dtype == DType::i64 && p_k.size[0] == n && p_k.size[1] == 1 && (n < 2 || p_k.stride[0] == 1);
      if (!indices || !number(lower[k], n) || !number(upper[k], n) || !number(log_s[k], 1) || !number(sign[k], 1) ||
          (!bias.empty() && (!number(log_scale[k], 1) || !number(bias[k], 1))))
        throw std::invalid_argument("the factors of layer " + std::to_string(k) + " do not go together");
      const int64_t* p = reinterpret_cast<const int64_t*>(permutation[k].data);
      for (int64_t i = 0; i < n; ++i)
        if (p[i] < 0 || p[i] >= n)
          throw std::invalid_argument("permutation[" + std::to_string(k) + "] holds " + std::to_string(p[i]) +
                                      ", expected rows 0 to " + std::to_string(n - 1));
    }
  }
};

// --- what Python sees -------------------------------------------------------------------------------

void lu_weights_fwd(Views lower, Views upper, Views log_s, Views permutation, Views sign, Views log_scale, Views bias,
                    const View& matrix, const View& shift, const View& logdet, double gain, bool inverse) {
  const Factors factors = {lower, upper, log_s, permutation, sign, log_scale, bias, gain};
  factors.check();
  parallel_for(factors.layers(), factors.worth_it(), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Layer layer = factors.layer(k);
      const int64_t n = layer.n;
      const Numbers m = inverse ? layer.inverse() : layer.matrix();
      Numbers c(n);
      for (int64_t i = 0; i < n; ++i) {
        if (inverse) c[i] = -layer.b[i];
        for (int64_t j = 0; j < n && !inverse; ++j) c[i] += m[i * n + j] * layer.b[j];
      }
      const double total = inverse ? -layer.logdet() : layer.logdet();
      write(matrix, k, m.data(), n * n);
      write(shift, k, c.data(), n);
      write(logdet, k, &total, 1);
    }
  });
}

// The gradient of M from that of M^-1 = V:  -V^T G V^T
Numbers through_inverse(const Numbers& v, const Numbers& g, int64_t n) {
  Numbers transposed(n * n), right(n * n), out(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) transposed[i * n + j] = v[j * n + i];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k) axpy(g[i * n + k], &transposed[k * n], &right[i * n], 0, n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k) axpy(-transposed[i * n + k], &right[k * n], &out[i * n], 0, n);
  return out;
}

struct Gradient {
  Numbers lower, upper, log_s, log_scale, bias;
};

// g: gradient of M or of M^-1, gc: of c or of -b, gl: of logdet or of -logdet
Gradient gradient(const Layer& layer, Numbers g, const Numbers& gc, double gl, bool inverse) {
  const int64_t n = layer.n;
  Gradient out = {Numbers(n * n), Numbers(n * n), Numbers(n), Numbers(n), Numbers(n)};
  const Numbers m = layer.matrix();
  if (inverse) {
    g = through_inverse(layer.inverse(), g, n);
    gl = -gl;
    for (int64_t i = 0; i < n; ++i) out.bias[i] = -gc[i];
  } else {
    for (int64_t i = 0; i < n; ++i) {
      axpy(gc[i], layer.b.data(), &g[i * n], 0, n);
      axpy(gc[i], &m[i * n], out.bias.data(), 0, n);
    }
  }
  // G = P^T gM diag(e^(gain a)), the gradient of L U
  Numbers rows(n * n), upper_transposed(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      out.log_scale[j] += layer.gain * g[i * n + j] * m[i * n + j];
      rows[layer.permutation[i] * n + j] = g[i * n + j] * layer.scale[j];
      upper_transposed[j * n + i] = layer.upper[i * n + j];
    }
  // gL = strictly lower part of G U^T, gU = upper part of L^T G
  out.upper = rows;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      axpy(rows[i * n + j], &upper_transposed[j * n], &out.lower[i * n], 0, std::min(i, j + 1));
    for (int64_t k = 0; k < i; ++k) axpy(layer.lower[i * n + k], &rows[i * n], &out.upper[k * n], k, n);
  }
  for (int64_t i = 0; i < n; ++i) {
    out.log_s[i] = out.upper[i * n + i] * layer.upper[i * n + i] + gl;
    out.log_scale[i] += layer.gain * gl;
    std::fill(&out.upper[i * n], &out.upper[i * n] + i + 1, 0.0);
  }
  return out;
}

void lu_weights_bwd(Views lower, Views upper, Views log_s, Views permutation, Views sign, Views log_scale, Views bias,
                    const View& gmatrix, const View& gshift, const View& glogdet, const View& glower,
                    const View& gupper, const View& glog_s, const View& glog_scale, const View& gbias, double gain,
                    bool inverse) {
  const Factors factors = {lower, upper, log_s, permutation, sign, log_scale, bias, gain};
  factors.check();
  const auto part = [](const View& v, int64_t k, int64_t rows, int64_t columns) {
    View one = v;
    one.data += k * v.stride[0] * v.itemsize();
    one.size[0] = rows, one.size[1] = columns, one.size[2] = 1;
    one.stride[0] = v.stride[1], one.stride[1] = v.stride[2], one.stride[2] = 0;
    return numbers(one);
  };
  parallel_for(factors.layers(), factors.worth_it(), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Layer layer = factors.layer(k);
      const int64_t n = layer.n;
      const Gradient g =
          gradient(layer, part(gmatrix, k, n, n), part(gshift, k, n, 1), part(glogdet, k, 1, 1)[0], inverse);
      write(glower, k, g.lower.data(), n * n);
      write(gupper, k, g.upper.data(), n * n);
      write(glog_s, k, g.log_s.data(), n);
      write(glog_scale, k, g.log_scale.data(), n);
      write(gbias, k, g.bias.data(), n);
    }
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(conv1x1_weights) {
  using namespace fastflow;
  namespace py = pybind11;
  m.def("lu_weights_fwd", &lu_weights_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("lu_weights_bwd", &lu_weights_bwd, py::call_guard<py::gil_scoped_release>());
}
