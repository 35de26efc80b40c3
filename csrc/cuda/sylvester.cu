// Sylvester flows on a GPU: K steps z' = z + Q R1 tanh(R2 Q^T z + b), a block for every sample, its state in shared
// memory. R1 and R2 are read where they lie: two triangles of one matrix. The columns Q of the orthogonal variant come
// orthonormal already. Saved for backward: the inputs (of the inverse its output); a scratch record holds what the
// steps leave for their gradient. Bound by latency, where M is large by reading the matrices and writing their
// gradients. The arguments are packed by fastflow/ops/cuda/sylvester.py.
#include "../sylvester.h"
#include "launch.cuh"

namespace fastflow {

constexpr int kBlock = kThreads / 4;  // threads, as THREADS there: D is 64 in the paper

// element i of [b, k] at data[b batch + k step + i]
struct Part {
  char* data;
  int64_t batch, step;
};

struct Sylvester {
  Part z, full, diag1, diag2, bias, basis;
  int64_t kind, inverse, steps, d, m, vectors;
  char* work;  // where shared memory is too small for it
  int64_t work_size;
};

struct SylvesterForward {
  Sylvester in;
  Part out, logdet;
};

struct SylvesterBackward {
  Sylvester in;  // z: what the steps start from, of the inverse its output
  Part gout, glogdet, gz, gfull, gdiag1, gdiag2, gbias, gbasis;
  char* record;  // [B, K or 1, d + 4 m]
  char* chain;   // [B, vectors, d]
};

// f(i) for all i < n, then everyone knows
template <class F>
FF_D void each(int n, const F& f) {
  for (int i = threadIdx.x; i < n; i += kBlock) f(i);
  __syncthreads();
}

// the sum of f(i) over first <= i < n, for everyone
template <class T, class F>
FF_D T total(int first, int n, double* sums, const F& f) {
  T sum = 0;
  for (int i = first + threadIdx.x; i < n; i += kBlock) sum += f(i);
  return T(team_sum(double(sum), kBlock, sums));
}

// to(i, sum of f(i, j) over j < n) for all rows i, a warp for every row
template <class T, class F, class To>
FF_D void each_row(int rows, int n, const F& f, const To& to) {
  for (int i = threadIdx.x / 32; i < rows; i += kBlock / 32) {
    T sum = 0;
    for (int j = threadIdx.x % 32; j < n; j += 32) sum += f(i, j);
    const double all = warp_sum(double(sum));
    if (threadIdx.x % 32 == 0) to(i, T(all));
  }
  __syncthreads();
}

template <class T>
struct Unit {
  Diagonal<T> one, two;
  T slope;
  FF_D T r1() const { return one.r; }
  FF_D T r2() const { return two.r; }
};

// One sample. The vectors lie in shared memory: z, g, t [d] and y, h, s, u, a, gu, ga, gy, w [m].
template <class T>
struct Flow {
  const Sylvester& in;
  int64_t b;
  int k, kind, d, m, vectors;
  double* sums;
  T *z, *g, *t, *y, *h, *s, *u, *a, *gu, *ga, *gy, *w;

  FF_D Flow(const Sylvester& given, double* shared)
      : in(given),
        b(blockIdx.x),
        k(0),
        kind(int(given.kind)),
        d(int(given.d)),
        m(int(given.m)),
        vectors(int(given.vectors)),
        sums(shared) {
    T* memory = in.work ? reinterpret_cast<T*>(in.work) + b * in.work_size : reinterpret_cast<T*>(shared + kBlock / 32);
    z = memory, g = z + d, t = g + d, y = t + d;
    h = y + m, s = h + m, u = s + m, a = u + m, gu = a + m, ga = gu + m, gy = ga + m, w = gy + m;
  }

  FF_D T* at(const Part& p) const { return reinterpret_cast<T*>(p.data) + b * p.batch + k * p.step; }
  FF_D T F(int i, int j) const { return at(in.full)[int64_t(i) * m + j]; }
  FF_D T Q(int i, int j) const { return at(in.basis)[int64_t(i) * d + j]; }  // of the orthogonal variant: column i
  FF_D Unit<T> unit(int i) const {
    Unit<T> made = {diagonal(at(in.diag1)[i]), diagonal(at(in.diag2)[i]), 0};
    made.slope = diagonal_slope(made.one, made.two);
    return made;
  }

  // --- Q ---

  FF_D const T* vector(int i) const { return at(in.basis) + int64_t(i) * d; }
  FF_D T factor(int i) const {  // 2 / (v.v); a vector of zeros reflects nothing
    const T* v = vector(i);
    const T square = total<T>(0, d, sums, [&](int j) { return v[j] * v[j]; });
    return square > T(0) ? T(2) / square : T(0);
  }
  FF_D T along(int i, const T* x) const {
    const T* v = vector(i);
    return total<T>(0, d, sums, [&](int j) { return v[j] * x[j]; });
  }
  FF_D void reflect(int i, T* x) const {
    const T* v = vector(i);
    const T times = factor(i) * along(i, x);
    each(d, [&](int j) { x[j] -= times * v[j]; });
  }
  FF_D void turn(const T* from, T* to) const {
    const bool reversed = kind == int(Basis::triangular) && k % 2 == 1;
    each(d, [&](int i) { to[i] = from[reversed ? d - 1 - i : i]; });
  }

  // y = Q^T x
  FF_D void project(const T* x, T* to) const {
    if (kind == int(Basis::orthogonal)) {
      each_row<T>(m, d, [&](int i, int j) { return Q(i, j) * x[j]; }, [&](int i, T sum) { to[i] = sum; });
      return;
    }
    turn(x, to);
    for (int i = 0; i < vectors; ++i) reflect(i, to);
  }

  // x += sign Q v, by way of t
  FF_D void add(const T* v, T sign, T* x) const {
    if (kind == int(Basis::orthogonal)) {
      each(d, [&](int j) {
        T sum = 0;
        for (int i = 0; i < m; ++i) sum += Q(i, j) * v[i];
        x[j] += sign * sum;
      });
      return;
    }
    turn(v, t);
    for (int i = vectors - 1; i >= 0; --i) reflect(i, t);
    each(d, [&](int j) { x[j] += sign * t[j]; });
  }

  // --- a step ---

  // z -> z'; log|dz'/dz|
  FF_D T forth() {
    project(z, y);
    each(m, [&](int i) {
      T sum = 0;
      for (int j = i + 1; j < m; ++j) sum += F(j, i) * y[j];
      const Tanh<T> made = tanh_slope(unit(i).r2() * y[i] + sum + at(in.bias)[i]);
      h[i] = made.h, s[i] = made.d;
    });
    each_row<T>(
        m, m, [&](int i, int j) { return j > i ? F(i, j) * h[j] : T(0); },
        [&](int i, T sum) { u[i] = unit(i).r1() * h[i] + sum; });
    const T logdet = total<T>(0, m, sums, [&](int i) { return log_derivative(unit(i).slope, Tanh<T>{h[i], s[i]}); });
    add(u, T(1), z);
    return logdet;
  }

  // z' -> z by one scalar equation after the other, the last row first; log|dz'/dz|
  FF_D T back() {
    project(z, y);
    each(m, [&](int i) { a[i] = at(in.bias)[i]; });
    for (int i = m - 1; i >= 0; --i) {
      const T after = total<T>(i + 1, m, sums, [&](int j) { return F(i, j) * h[j]; }), rest = y[i] - after;
      const Unit<T> one = unit(i);
      const Tanh<T> found = tanh_slope(tanh_root(one.r2() * rest + a[i], one.slope));
      const T own = one.r1() * found.h;
      __syncthreads();  // all have read a[i]
      if (threadIdx.x == 0) h[i] = found.h, s[i] = found.d, u[i] = own + after;
      each(i, [&](int j) { a[j] += F(i, j) * (rest - own); });
    }
    const T logdet = total<T>(0, m, sums, [&](int i) { return log_derivative(unit(i).slope, Tanh<T>{h[i], s[i]}); });
    add(u, T(-1), z);
    return logdet;
  }

  // --- its gradient, as in csrc/cpu/sylvester.cpp ---

  FF_D T of_log(int i, const Unit<T>& one) const {
    return log_derivative_slope(one.r1(), one.r2(), one.slope, Tanh<T>{h[i], s[i]});
  }

  // From g to gu, ga and gy, and to the g before
  FF_D void through(T glogdet) {
    project(g, gu);
    each(m, [&](int j) {
      T sum = 0;
      for (int i = 0; i < j; ++i) sum += F(i, j) * gu[i];
      const Unit<T> one = unit(j);
      ga[j] = s[j] * (one.r1() * gu[j] + sum) + glogdet * of_log(j, one);
    });
    each_row<T>(
        m, m, [&](int j, int i) { return i < j ? F(j, i) * ga[i] : T(0); },
        [&](int j, T sum) { gy[j] = unit(j).r2() * ga[j] + sum; });
  }

  // The same of the inverse: a lower triangular system
  FF_D void solve(T glogdet) {
    project(g, gu);
    each(m, [&](int i) { w[i] = 0; });
    for (int j = 0; j < m; ++j) {
      const Unit<T> one = unit(j);
      const T own = s[j] * w[j] - glogdet * of_log(j, one);
      const T rest = -total<T>(0, j, sums, [&](int i) { return F(j, i) * ga[i]; });
      const T value = (gu[j] - rest - one.r2() * own) / derivative(one.slope, Tanh<T>{h[j], s[j]});
      const T p = s[j] * one.r1() * value + own;
      __syncthreads();  // all have read gu[j] and w[j]
      if (threadIdx.x == 0) ga[j] = -p, gy[j] = -(rest + one.r2() * p), gu[j] = -value;
      for (int i = j + 1 + threadIdx.x; i < m; i += kBlock) w[i] += F(j, i) * value;
      __syncthreads();
    }
  }

  // One reflection on the way back: `input` went in, x comes and goes on; adds to the gradient of its vector
  FF_D void through_reflection(int i, const T* input, T* x, T* grad) const {
    const T* v = vector(i);
    const T f = factor(i), of_x = along(i, x), of_input = along(i, input);
    each(d, [&](int j) {
      grad[j] += f * f * of_input * of_x * v[j] - f * of_input * x[j] - f * of_x * input[j];
      x[j] -= f * of_x * v[j];
    });
  }

  // The gradient of Q from those of y = Q^T x and Q u; x and gqu are [d] in memory
  FF_D void of_basis(const T* x, const T* gqu, T sign, T* chain, T* grad) {
    if (kind == int(Basis::triangular)) return;
    if (kind == int(Basis::orthogonal)) {
      for (int i = 0; i < m; ++i)
        each(d, [&](int j) { grad[int64_t(i) * d + j] = gy[i] * x[j] + sign * u[i] * gqu[j]; });
      return;
    }
    each(vectors * d, [&](int i) { grad[i] = 0; });
    turn(x, t);
    for (int i = 0; i < vectors; ++i) {
      each(d, [&](int j) { chain[int64_t(i) * d + j] = t[j]; });
      reflect(i, t);
    }
    turn(gy, t);
    for (int i = vectors - 1; i >= 0; --i) through_reflection(i, chain + int64_t(i) * d, t, grad + int64_t(i) * d);
    turn(u, t);
    for (int i = vectors - 1; i >= 0; --i) {
      each(d, [&](int j) { chain[int64_t(i) * d + j] = t[j]; });
      reflect(i, t);
    }
    each(d, [&](int j) { t[j] = sign * gqu[j]; });
    for (int i = 0; i < vectors; ++i) through_reflection(i, chain + int64_t(i) * d, t, grad + int64_t(i) * d);
  }
};

template <class T>
FF_D void sylvester_fwd(const SylvesterForward& arguments) {
  FF_SHARED(double, shared);
  Flow<T> flow(arguments.in, shared);
  const T* z = flow.at(arguments.in.z);
  each(flow.d, [&](int i) { flow.z[i] = z[i]; });
  const int steps = int(arguments.in.steps);
  double logdet = 0;
  for (int i = 0; i < steps; ++i) {
    flow.k = arguments.in.inverse ? steps - 1 - i : i;
    logdet += arguments.in.inverse ? -double(flow.back()) : double(flow.forth());
  }
  flow.k = 0;
  T* out = flow.at(arguments.out);
  each(flow.d, [&](int i) { out[i] = flow.z[i]; });
  if (threadIdx.x == 0) *flow.at(arguments.logdet) = T(logdet);
}

template <class T>
FF_D void sylvester_bwd(const SylvesterBackward& arguments) {
  FF_SHARED(double, shared);
  Flow<T> flow(arguments.in, shared);
  const bool inverse = arguments.in.inverse != 0;
  const int steps = int(arguments.in.steps), d = flow.d, m = flow.m;
  const T *z = flow.at(arguments.in.z), *gout = flow.at(arguments.gout);
  const T glogdet = (inverse ? T(-1) : T(1)) * *flow.at(arguments.glogdet);
  each(d, [&](int i) { flow.z[i] = z[i], flow.g[i] = gout[i]; });
  const int64_t size = d + 4 * int64_t(m);
  T* records = reinterpret_cast<T*>(arguments.record) + flow.b * (inverse ? 1 : steps) * size;
  T* chain = reinterpret_cast<T*>(arguments.chain) + flow.b * flow.vectors * d;

  const auto gradient = [&](const T* before) {  // of step k, whose y, h, s and u are at hand
    T *gfull = flow.at(arguments.gfull), *g1 = flow.at(arguments.gdiag1), *g2 = flow.at(arguments.gdiag2),
      *gbias = flow.at(arguments.gbias), *gbasis = flow.vectors ? flow.at(arguments.gbasis) : nullptr;
    inverse ? flow.solve(glogdet) : flow.through(glogdet);
    // of Q u it is the g after the step, of the inverse that of z' with the other sign
    if (inverse) flow.add(flow.gy, T(1), flow.g);
    flow.of_basis(before, flow.g, inverse ? T(-1) : T(1), chain, gbasis);
    if (!inverse) flow.add(flow.gy, T(1), flow.g);
    each(m * m, [&](int n) {
      const int i = n / m, j = n % m;
      gfull[n] = j < i ? flow.y[i] * flow.ga[j] : j > i ? flow.gu[i] * flow.h[j] : T(0);
    });
    each(m, [&](int i) {
      const Unit<T> one = flow.unit(i);
      const T of_product = glogdet * flow.s[i] / derivative(one.slope, Tanh<T>{flow.h[i], flow.s[i]});
      g1[i] = one.one.d * (flow.gu[i] * flow.h[i] + of_product * one.r2());
      g2[i] = one.two.d * (flow.ga[i] * flow.y[i] + of_product * one.r1());
      gbias[i] = flow.ga[i];
    });
  };

  for (int k = 0; k < steps; ++k) {
    flow.k = k;
    T* record = records + (inverse ? 0 : k) * size;
    each(d, [&](int i) { record[i] = flow.z[i]; });
    flow.forth();
    if (inverse)
      gradient(record);
    else
      each(m, [&](int i) {
        T* r = record + d + i;
        r[0] = flow.y[i], r[m] = flow.h[i], r[2 * m] = flow.s[i], r[3 * m] = flow.u[i];
      });
  }
  for (int k = steps - 1; k >= 0 && !inverse; --k) {
    flow.k = k;
    const T* record = records + k * size;
    each(m, [&](int i) {
      const T* r = record + d + i;
      flow.y[i] = r[0], flow.h[i] = r[m], flow.s[i] = r[2 * m], flow.u[i] = r[3 * m];
    });
    gradient(record);
  }
  flow.k = 0;
  T* gz = flow.at(arguments.gz);
  each(d, [&](int i) { gz[i] = flow.g[i]; });
}

}  // namespace fastflow
