// What surrounds the matrix products of a trace on a GPU. Rows are [B, 1 + S, n]: every sample's value, then its S
// tangents. The activation makes value and tangents in one pass; the probes are given, or signs made where they are
// used. The arguments are packed by fastflow/ops/cuda/trace.py.
#include "../philox.h"
#include "../trace.h"
#include "launch.cuh"

namespace fastflow {

// e[s, b, d]
struct Probes {
  char* data;  // none: signs of the seed
  int64_t s, b, d;
  int64_t seed, samples, width;

  template <class T>
  FF_HD T at(int64_t i, int64_t j, int64_t k) const {
    if (data) return reinterpret_cast<const T*>(data)[i * s + j * b + k * d];
    return sign<T>(uint64_t(seed), uint64_t((i * samples + j) * width + k));
  }
};

// rows[b] = value[b], then factor[:, b] e[:, b]; without a factor the probes themselves
struct Rows {
  Matrix value, factor;
  Probes probes;
  char* rows;
  int64_t count;  // of rows of a sample
};

template <class T>
FF_D void trace_rows(const Rows& a) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x, width = a.probes.width;
  if (n >= a.probes.samples * a.count * width) return;
  const int64_t row = quotient(n, width), d = n - row * width, b = quotient(row, a.count), s = row - b * a.count - 1;
  T out;
  if (s < 0)
    out = a.value.at<T>(b, d);
  else
    out = a.probes.at<T>(s, b, d) * (a.factor.data ? a.factor.at<T>(s, b) : T(1));
  reinterpret_cast<T*>(a.rows)[n] = out;
}

// value = rows[:, 0] + bias, trace[s, b] = rows[b, 1 + s] . e[s, b]: a warp for every row
struct Contract {
  Matrix value, trace;
  Probes probes;
  char *rows, *bias;
  int64_t count, bias_stride;
};

template <class T>
FF_D void trace_contract(const Contract& a) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, width = a.probes.width;
  const int64_t b = quotient(row, a.count), s = row - b * a.count - 1;
  const bool active = b < a.probes.samples;
  const T* from = reinterpret_cast<const T*>(a.rows) + row * width;
  double sum = 0;
  if (active)
    for (int64_t d = threadIdx.x % 32; d < width; d += 32) {
      if (s < 0)
        a.value.at<T>(b, d) = from[d] + reinterpret_cast<const T*>(a.bias)[d * a.bias_stride];
      else
        sum += double(from[d]) * double(a.probes.at<T>(s, b, d));
    }
  sum = warp_sum(sum);
  if (active && s >= 0 && threadIdx.x % 32 == 0) a.trace.at<T>(s, b) = T(sum);
}

// --- activation: V units of a sample, value and tangents ------------------------------------------------

struct Dual {
  char *in, *out, *bias;  // rows [B, 1 + S, n]; bias [n]
  int64_t samples, count, width, activation, bias_stride;
};

template <class F>
FF_HD void with_activation(int activation, const F& f) {
  with_number<int(Activation::tanh), int(Activation::softplus), int(Activation::elu), int(Activation::silu)>(activation,
                                                                                                             f);
}

// f(offset of the first element of the sample's first row, unit) for the V units of this thread
template <int V, class F>
FF_D void units(const Dual& a, const F& f) {
  const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V, b = quotient(k, a.width);
  if (b < a.samples) f(b * a.count * a.width + (k - b * a.width), k - b * a.width);
}

// y = phi(a + bias), y' = phi'(a + bias) a'. `in` may be `out`; where the inputs are kept it becomes a + bias.
template <class T, int V>
FF_D void trace_activation_fwd(const Dual& a) {
  T *in = reinterpret_cast<T*>(a.in), *out = reinterpret_cast<T*>(a.out);
  const T* bias = reinterpret_cast<const T*>(a.bias);
  with_activation(a.activation, [&](auto kind) {
    constexpr Activation activation = Activation(decltype(kind)::value);
    units<V>(a, [&](int64_t at, int64_t unit) {
      T value[V], y[V], slope[V];
      load<V>(in + at, true, 1, value);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        value[v] += bias[(unit + v) * a.bias_stride];
        const Slope<T> f = activate<activation>(value[v]);
        y[v] = f.y, slope[v] = f.d;
      }
      if constexpr (keeps_input(activation)) store<V>(in + at, true, 1, value);
      store<V>(out + at, true, 1, y);
#pragma unroll 4
      for (int64_t s = 1; s < a.count; ++s) {
        load<V>(in + at + s * a.width, true, 1, value);
#pragma unroll
        for (int v = 0; v < V; ++v) value[v] *= slope[v];
        store<V>(out + at + s * a.width, true, 1, value);
      }
    });
  });
}

// Gradients `g` of (y, y') become gradients of (a, a'); where inputs were kept, `y` is made from them again.
struct DualBackward {
  Dual kept;  // in: what was kept, out: y
  char* g;
};

template <class T, int V>
FF_D void trace_activation_bwd(const DualBackward& a) {
  const T* kept = reinterpret_cast<const T*>(a.kept.in);
  T *g = reinterpret_cast<T*>(a.g), *out = reinterpret_cast<T*>(a.kept.out);
  const int64_t width = a.kept.width;
  with_activation(a.kept.activation, [&](auto kind) {
    constexpr Activation activation = Activation(decltype(kind)::value);
    units<V>(a.kept, [&](int64_t at, int64_t) {
      T first[V], value[V], gs[V], slope[V], bend[V], total[V], y[V];
      load<V>(kept + at, true, 1, first);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Curve<T> f = curve<activation>(first[v]);
        slope[v] = f.d, bend[v] = f.c, total[v] = T(0);
        if constexpr (keeps_input(activation)) y[v] = activate<activation>(first[v]).y;
      }
      if constexpr (keeps_input(activation)) store<V>(out + at, true, 1, y);
#pragma unroll 2
      for (int64_t s = 1; s < a.kept.count; ++s) {
        load<V>(kept + at + s * width, true, 1, value);
        load<V>(g + at + s * width, true, 1, gs);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          total[v] += value[v] * gs[v];
          gs[v] *= slope[v];
          value[v] *= slope[v];
        }
        store<V>(g + at + s * width, true, 1, gs);
        if constexpr (keeps_input(activation)) store<V>(out + at + s * width, true, 1, value);
      }
      load<V>(g + at, true, 1, gs);
#pragma unroll
      for (int v = 0; v < V; ++v) gs[v] = gs[v] * slope[v] + bend[v] * total[v];
      store<V>(g + at, true, 1, gs);
    });
  });
}

}  // namespace fastflow
