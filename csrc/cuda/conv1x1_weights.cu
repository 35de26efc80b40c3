// The matrices of invertible 1x1 convolutions from their LU factors, for all layers of a model in one launch:
//   W = P L (U + diag(sign e^log_s)),  M = W diag(e^(gain a)),  c = M b,  logdet = sum log_s + gain sum a
// or the inverse M^-1, -b, -logdet. Everything is computed in double and rounded once. A block makes one layer; what
// its threads hand to each other lies in scratch memory, [C, C] at a time. Bound by latency: C is at most 128 or so.
// The arguments are packed by fastflow/ops/cuda/conv1x1_weights.py.
#include "launch.cuh"

namespace fastflow {

constexpr int kLayers = 64;  // of a launch: their addresses fit the 4 KB of arguments that every GPU takes

struct LayerFactors {
  char *lower, *upper, *log_s, *permutation, *sign, *log_scale, *bias;
};

struct Factors {
  int64_t n;
  double gain;
  int64_t inverse;
  char* scratch;                  // [layers, matrices, n, n] of double
  int64_t first;                  // layer of this launch among those of the outputs
  char *matrix, *shift, *logdet;  // forward: [N, n, n], [N, n], [N]; backward: their gradients
  char *glower, *gupper, *glog_s, *glog_scale, *gbias;
  LayerFactors layers[kLayers];
};

// for (i, j) of an n x n matrix, by all threads
template <class F>
FF_D void each_entry(int n, const F& f) {
  for (int k = threadIdx.x; k < n * n; k += kThreads) f(k / n, k % n);
}

// One layer, its vectors in shared memory.
template <class S>
struct Layer {
  int n;
  const S *lower, *upper;
  const int64_t* permutation;
  double *diagonal, *reciprocal, *scale, *b, *terms;  // [n]: of U, 1 / that, e^(gain a), b, log_s + gain a

  FF_D Layer(const Factors& a, double* shared) {
    const LayerFactors& f = a.layers[blockIdx.x];
    n = int(a.n);
    lower = reinterpret_cast<const S*>(f.lower), upper = reinterpret_cast<const S*>(f.upper);
    permutation = reinterpret_cast<const int64_t*>(f.permutation);
    diagonal = shared, reciprocal = shared + n, scale = shared + 2 * n, b = shared + 3 * n, terms = shared + 4 * n;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const double log_s = double(widen(reinterpret_cast<const S*>(f.log_s)[i]));
      const double sign = double(widen(reinterpret_cast<const S*>(f.sign)[i]));
      const double shift = f.log_scale ? a.gain * double(widen(reinterpret_cast<const S*>(f.log_scale)[i])) : 0;
      diagonal[i] = sign * exp(log_s), reciprocal[i] = sign * exp(-log_s), scale[i] = exp(shift);
      b[i] = f.bias ? double(widen(reinterpret_cast<const S*>(f.bias)[i])) : 0;
      terms[i] = log_s + shift;
    }
    __syncthreads();
  }

  FF_D double L(int i, int k) const { return double(widen(lower[i * n + k])); }
  FF_D double U(int k, int j) const { return k == j ? diagonal[j] : double(widen(upper[k * n + j])); }
  // a permutation that is none must not reach outside of the factors
  FF_D int row(int i) const { return permutation[i] < 0 ? 0 : int(smaller(permutation[i], n - 1)); }

  FF_D double logdet() const {
    double total = 0;
    for (int i = 0; i < n; ++i) total += terms[i];
    return total;
  }

  // M
  FF_D void matrix(double* to) const {
    each_entry(n, [&](int i, int j) {
      const int r = row(i), last = r < j ? r : j;
      double sum = r <= j ? U(r, j) : L(r, j) * diagonal[j];
      for (int k = 0; k < last; ++k) sum += L(r, k) * U(k, j);
      to[i * n + j] = sum * scale[j];
    });
    __syncthreads();
  }

  // M^-1 = diag(1 / scale) U^-1 L^-1 P^T: a thread makes whole columns by substitution
  FF_D void inverse(double* to) const {
    for (int j = threadIdx.x; j < n; j += kThreads) {
      const int start = row(j);
      for (int i = 0; i < n; ++i) {
        double sum = i == start ? 1 : 0;
        for (int k = start; k < i; ++k) sum -= L(i, k) * to[k * n + j];
        to[i * n + j] = sum;
      }
      for (int i = n - 1; i >= 0; --i) {
        double sum = to[i * n + j];
        for (int k = i + 1; k < n; ++k) sum -= U(i, k) * to[k * n + j];
        to[i * n + j] = sum * reciprocal[i];
      }
      for (int i = 0; i < n; ++i) to[i * n + j] /= scale[i];
    }
    __syncthreads();
  }
};

template <class S>
FF_D void lu_weights_fwd(const Factors& a) {
  using T = Accumulator<S>;
  FF_SHARED(double, shared);
  const Layer<S> layer(a, shared);
  const int n = layer.n;
  const int64_t number = a.first + blockIdx.x, size = int64_t(n) * n;
  double* m = reinterpret_cast<double*>(a.scratch) + number * size;
  a.inverse ? layer.inverse(m) : layer.matrix(m);
  T *matrix = reinterpret_cast<T*>(a.matrix) + number * size, *shift = reinterpret_cast<T*>(a.shift) + number * n;
  each_entry(n, [&](int i, int j) { matrix[i * n + j] = T(m[i * n + j]); });
  for (int i = threadIdx.x; i < n; i += kThreads) {
    double sum = 0;
    for (int j = 0; j < n && !a.inverse; ++j) sum += m[i * n + j] * layer.b[j];
    shift[i] = T(a.inverse ? -layer.b[i] : sum);
  }
  if (threadIdx.x == 0) reinterpret_cast<T*>(a.logdet)[number] = T(a.inverse ? -layer.logdet() : layer.logdet());
}

template <class S>
FF_D void lu_weights_bwd(const Factors& a) {
  using T = Accumulator<S>;
  FF_SHARED(double, shared);
  const Layer<S> layer(a, shared);
  const int n = layer.n;
  const int64_t number = a.first + blockIdx.x, size = int64_t(n) * n;
  // m: M;  g: the gradient of M;  rows: that of L U;  v: M^-1
  double *m = reinterpret_cast<double*>(a.scratch) + number * 4 * size, *g = m + size, *rows = g + size,
         *v = rows + size;
  const T *gmatrix = reinterpret_cast<const T*>(a.matrix) + number * size,
          *gshift = reinterpret_cast<const T*>(a.shift) + number * n;
  const double gl = (a.inverse ? -1 : 1) * double(reinterpret_cast<const T*>(a.logdet)[number]);
  layer.matrix(m);
  if (a.inverse) {  // g = -V^T G V^T
    layer.inverse(v);
    each_entry(n, [&](int i, int j) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += double(gmatrix[i * n + k]) * v[j * n + k];
      rows[i * n + j] = sum;
    });
    __syncthreads();
    each_entry(n, [&](int i, int j) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum -= v[k * n + i] * rows[k * n + j];
      g[i * n + j] = sum;
    });
  } else {
    each_entry(n, [&](int i, int j) { g[i * n + j] = double(gmatrix[i * n + j]) + double(gshift[i]) * layer.b[j]; });
  }
  __syncthreads();
  T* glog_scale = reinterpret_cast<T*>(a.glog_scale) + number * n;
  T* gbias = reinterpret_cast<T*>(a.gbias) + number * n;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    double of_scale = gl, of_bias = 0;
    for (int i = 0; i < n; ++i) {
      of_scale += g[i * n + j] * m[i * n + j];
      of_bias += double(gshift[i]) * m[i * n + j];
    }
    glog_scale[j] = T(a.gain * of_scale);
    gbias[j] = T(a.inverse ? -double(gshift[j]) : of_bias);
  }
  each_entry(n, [&](int i, int j) { rows[layer.row(i) * n + j] = g[i * n + j] * layer.scale[j]; });
  __syncthreads();
  T *glower = reinterpret_cast<T*>(a.glower) + number * size, *gupper = reinterpret_cast<T*>(a.gupper) + number * size;
  T* glog_s = reinterpret_cast<T*>(a.glog_s) + number * n;
  each_entry(n, [&](int i, int j) {  // strictly lower part of G U^T; upper part of L^T G
    double sum = 0;
    if (i > j)
      for (int k = j; k < n; ++k) sum += rows[i * n + k] * layer.U(j, k);
    glower[i * n + j] = T(sum);
    sum = i <= j ? rows[i * n + j] : 0;
    if (i <= j)
      for (int k = i + 1; k < n; ++k) sum += layer.L(k, i) * rows[k * n + j];
    gupper[i * n + j] = T(i < j ? sum : 0);
    if (i == j) glog_s[i] = T(sum * layer.diagonal[i] + gl);
  });
}

}  // namespace fastflow
