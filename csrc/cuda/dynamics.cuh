// A time-dependent MLP on a tile of samples in shared memory: value and tangents forward, and the reverse of that
// sweep.
//
//     u = W y + b,  a = gate(t) u + t shift,   u' = W y',  a' = gate(t) u',   y <- phi(a),  y' <- phi'(a) a'
//
// Every sample has a time of its own. Rows are [unit][row][sample], row 0 the value, then the tangents; a unit's rows
// begin `stride` elements apart, an odd number, so that neighbouring units lie in different banks. Parameters are
// packed by fastflow/ops/cuda/dynamics.py, weights transposed and padded to four units, and lie in shared memory where
// they fit.
#pragma once

#include "../trace.h"
#include "launch.cuh"

namespace fastflow {

constexpr int kLayers = 16;  // of a network, at most
constexpr int kUnits = 4;    // of a thread
constexpr int kPart = 16;    // terms of a sum that are added up by themselves: so rounding grows with their number less

struct NetLayer {
  int64_t in, out;
  int64_t weight;  // where it begins among the packed: [in][padded], then the vectors below, [padded] each
  int64_t linear;  // first row of what is kept of it: u, and behind the u of all layers the y of all
};

struct Net {
  char* packed;
  int64_t size;                                                         // elements of it
  int64_t copied;                                                       // into shared memory?
  int64_t depth, activation, gated, features, tangents, widest, units;  // widest: padded; units: of all layers
  NetLayer layers[kLayers];
};

enum Vector : int { kBias, kShift, kGate, kGateBias };  // a = sigmoid(t gate + gate_bias) u + t shift

// A tile of samples and what the network is to it.
template <class T>
struct NetTile {
  const Net& net;
  const T* params;
  T* times;  // of the samples
  int samples, rows, stride;

  FF_D int sample() const { return int(threadIdx.x) % samples; }
  FF_D int lane() const { return int(threadIdx.x) / samples; }
  FF_D int lanes() const { return kThreads / samples; }
  FF_D int padded(const NetLayer& l) const { return (int(l.out) + kUnits - 1) / kUnits * kUnits; }
  FF_D const T* vector(const NetLayer& l, int which) const { return params + l.weight + (l.in + which) * padded(l); }
  FF_D T& at(T* buffer, int unit, int row, int s) const { return buffer[unit * stride + row * samples + s]; }
  FF_D bool keeps_linear() const { return net.gated || net.activation == int(Activation::silu); }
};

// The parameters go into shared memory where they fit; a barrier must follow.
template <class T>
FF_D NetTile<T> net_tile(const Net& net, int samples, unsigned char* params, unsigned char* times) {
  const T* from = reinterpret_cast<const T*>(net.packed);
  T* const copy = reinterpret_cast<T*>(params);
  if (net.copied)
    for (int64_t i = threadIdx.x; i < net.size; i += kThreads) copy[i] = from[i];
  const int rows = 1 + int(net.tangents);
  return {net, net.copied ? copy : from, reinterpret_cast<T*>(times), samples, rows, rows * samples | 1};
}

// f(i, sample) for i < n, by all threads
template <class T, class F>
FF_D void each(const NetTile<T>& t, int n, const F& f) {
  for (int i = t.lane(); i < n; i += t.lanes()) f(i, t.sample());
  __syncthreads();
}

template <class F>
FF_D void with_activation(int64_t kind, const F& f) {
  with_number<int(Activation::tanh), int(Activation::softplus), int(Activation::elu), int(Activation::silu)>(int(kind),
                                                                                                             f);
}

template <Activation kind>
struct Keeps {
  static constexpr bool input = keeps_input(kind);  // found out here, where host and device are one
};

template <class T>
FF_D T sigmoid(T v) {
  return logistic(v).sigmoid;
}

// --- forward --------------------------------------------------------------------------------------------

// finish(first unit, first tangent, sample, sums) with the sums of W y of four units: the value's, which every thread
// makes for itself, and those of R tangents
template <int R, class T, class F>
FF_D void products(const NetTile<T>& t, const NetLayer& l, const T* in, int tangents, const F& finish) {
  const int s = t.sample(), groups = t.padded(l) / kUnits, chunks = R == 0 ? 1 : (tangents + R - 1) / (R > 0 ? R : 1);
  for (int task = t.lane(); task < groups * chunks; task += t.lanes()) {
    const int chunk = task / groups, unit = (task - chunk * groups) * kUnits;
    const T* weight = t.params + l.weight + unit;
    T sum[1 + R][kUnits] = {};
    int at[1 + R];
#pragma unroll
    for (int r = 0; r <= R; ++r) {
      const int row = r == 0 ? 0 : chunk * R + r;
      at[r] = (row < tangents ? row : tangents) * t.samples + s;
    }
    for (int from = 0; from < int(l.in); from += kPart) {
      T part[1 + R][kUnits] = {};
      const int to = int(smaller(from + kPart, l.in));
#pragma unroll 2
      for (int k = from; k < to; ++k) {
        T w[kUnits];
        load<kUnits>(weight + k * groups * kUnits, true, 1, w);
#pragma unroll
        for (int r = 0; r <= R; ++r) {
          const T y = in[k * t.stride + at[r]];
#pragma unroll
          for (int u = 0; u < kUnits; ++u) part[r][u] += w[u] * y;
        }
      }
#pragma unroll
      for (int r = 0; r <= R; ++r)
#pragma unroll
        for (int u = 0; u < kUnits; ++u) sum[r][u] += part[r][u];
    }
    finish(unit, 1 + chunk * R, s, sum);
  }
  __syncthreads();
}

// f(Constant<R>): how many tangents a thread takes
template <class F>
FF_D void with_tangents(int tangents, const F& f) {
  with_number<0, 1, 3>(tangents < 2 ? tangents : 3, f);
}

// One layer from the rows `in` to the rows `out`; u is kept in `linear` where it is given.
template <class T>
FF_D void layer_fwd(const NetTile<T>& t, const NetLayer& l, bool hidden, int tangents, const T* in, T* out, T* linear) {
  const T *bias = t.vector(l, kBias), *shift = t.vector(l, kShift);
  const T *gate = t.vector(l, kGate), *gate_bias = t.vector(l, kGateBias);
  with_tangents(tangents, [&](auto number) {
    constexpr int R = decltype(number)::value;
    products<R>(t, l, in, tangents, [&](int unit, int first, int s, const T(&sum)[1 + R][kUnits]) {
      const T time = t.times[s];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int m = unit + u;
        if (m >= int(l.out)) continue;
        const T factor = t.net.gated ? sigmoid(time * gate[m] + gate_bias[m]) : T(1);
        const T value = sum[0][u] + bias[m], a = factor * value + time * shift[m];
        Slope<T> f = {a, T(1)};
        if (hidden)
          with_activation(t.net.activation, [&](auto kind) { f = activate<Activation(decltype(kind)::value)>(a); });
        if (first == 1) {
          t.at(out, m, 0, s) = f.y;
          if (linear) t.at(linear, m, 0, s) = value;
        }
#pragma unroll
        for (int r = 1; r <= R; ++r)
          if (first + r - 1 <= tangents) {
            t.at(out, m, first + r - 1, s) = f.d * factor * sum[r][u];
            if (linear) t.at(linear, m, first + r - 1, s) = sum[r][u];
          }
      }
    });
  });
}

// All layers, between two buffers; returns where the outputs are.
template <class T>
FF_D T* net_fwd(const NetTile<T>& t, int tangents, const T* in, T* first, T* second) {
  T *out = first, *other = second;
  for (int i = 0; i < int(t.net.depth); ++i) {
    layer_fwd(t, t.net.layers[i], i + 1 < int(t.net.depth), tangents, in, out, static_cast<T*>(nullptr));
    in = out;
    T* const swap = out;
    out = other, other = swap;
  }
  return other;
}

// All layers with what their reverse needs, in `kept`; returns where the outputs are.
template <class T>
FF_D T* net_keep(const NetTile<T>& t, int tangents, const T* in, T* kept) {
  T* const values = kept + (t.keeps_linear() ? t.net.units * t.stride : 0);
  for (int i = 0; i < int(t.net.depth); ++i) {
    const NetLayer& l = t.net.layers[i];
    layer_fwd(t, l, i + 1 < int(t.net.depth), tangents, in, values + l.linear * t.stride,
              t.keeps_linear() ? kept + l.linear * t.stride : nullptr);
    in = values + l.linear * t.stride;
  }
  return const_cast<T*>(in);
}

// --- reverse --------------------------------------------------------------------------------------------

// g: of a layer's outputs (y, y'), becomes that of (u, u'), with zeros for the units of the padding. `of_units`: the
// gradients of a and of the gate's argument, [2][widest][sample].
template <class T>
FF_D void units_bwd(const NetTile<T>& t, const NetLayer& l, bool hidden, T* g, T* linear, T* values, T* of_units) {
  const T *shift = t.vector(l, kShift), *gate = t.vector(l, kGate), *gate_bias = t.vector(l, kGateBias);
  each(t, t.padded(l), [&](int m, int s) {
    if (m >= int(l.out)) {
      for (int r = 0; r < t.rows; ++r) t.at(g, m, r, s) = T(0);
      return;
    }
    const T time = t.times[s], factor = t.net.gated ? sigmoid(time * gate[m] + gate_bias[m]) : T(1);
    T ga = t.at(g, m, 0, s), slope = T(1);
    if (hidden)
      with_activation(t.net.activation, [&](auto kind) {
        constexpr Activation activation = Activation(decltype(kind)::value);
        constexpr bool input = Keeps<activation>::input;
        T* const rows = input ? linear : values;
        const T scale = input ? factor : T(1);  // of the kept tangents
        const Curve<T> f = curve<activation>(scale * t.at(rows, m, 0, s) + (input ? time * shift[m] : T(0)));
        T total = T(0);
        for (int r = 1; r < t.rows; ++r) total += scale * t.at(rows, m, r, s) * t.at(g, m, r, s);
        ga = ga * f.d + f.c * total, slope = f.d;
      });
    T of_gate = T(0);
    for (int r = 0; r < t.rows; ++r) {
      const T gr = r == 0 ? ga : t.at(g, m, r, s) * slope;
      if (t.net.gated) of_gate += gr * t.at(linear, m, r, s);
      t.at(g, m, r, s) = gr * factor;
    }
    of_units[m * t.samples + s] = ga;
    of_units[(int(t.net.widest) + m) * t.samples + s] = of_gate * factor * (T(1) - factor);
  });
}

// Adds the gradients of a layer's parameters to `sums`, laid out as the parameters are: every one by the same thread,
// in double, for there are as many terms as stages of all steps.
template <class T>
FF_D void parameters_bwd(const NetTile<T>& t, const NetLayer& l, const T* g, const T* in, const T* of_units,
                         double* sums) {
  const int out = int(l.out), n = int(l.in), padded = t.padded(l), quarter = padded / 4, inputs = (n + 3) / 4;
  const int columns = t.rows * t.samples;
  for (int task = threadIdx.x; task < quarter * inputs; task += kThreads) {
    const int k = task / quarter, m = task - k * quarter;  // and every quarter further
    T sum[4][4] = {};
    int from[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) from[v] = (k + v * inputs < n ? k + v * inputs : n - 1) * t.stride;
    for (int column = 0; column < columns; ++column) {
      T gs[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) gs[u] = g[(m + u * quarter) * t.stride + column];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const T y = in[from[v] + column];
#pragma unroll
        for (int u = 0; u < 4; ++u) sum[v][u] += gs[u] * y;
      }
    }
#pragma unroll
    for (int v = 0; v < 4; ++v)
#pragma unroll
      for (int u = 0; u < 4; ++u)
        if (k + v * inputs < n) sums[l.weight + (k + v * inputs) * padded + m + u * quarter] += double(sum[v][u]);
  }
  double* const vectors = sums + l.weight + n * padded;
  for (int task = threadIdx.x; task < out * (t.net.gated ? 4 : 2); task += kThreads) {
    const int which = task / out, m = task - which * out;
    const T* const of = of_units + ((which >= kGate ? int(t.net.widest) : 0) + m) * t.samples;
    T sum = T(0);
    for (int s = 0; s < t.samples; ++s) {
      const T value = which == kBias ? g[m * t.stride + s] : of[s];
      sum += which == kShift || which == kGate ? t.times[s] * value : value;
    }
    vectors[which * padded + m] += double(sum);
  }
}

// gin = Wᵀ g of the first `rows` rows. There is no barrier behind it.
template <class T>
FF_D void inputs_bwd(const NetTile<T>& t, const NetLayer& l, int rows, const T* g, T* gin) {
  with_number<1, 2>(rows < 2 ? 1 : 2, [&](auto number) {
    constexpr int R = decltype(number)::value;  // rows of a thread
    const int s = t.sample(), n = int(l.in), padded = t.padded(l);
    const int groups = (n + kUnits - 1) / kUnits, chunks = (rows + R - 1) / R;
    for (int task = t.lane(); task < groups * chunks; task += t.lanes()) {
      const int chunk = task / groups, first = (task - chunk * groups) * kUnits;
      const T* weight[kUnits];
      T sum[kUnits][R] = {};
      int at[R];
#pragma unroll
      for (int v = 0; v < kUnits; ++v) weight[v] = t.params + l.weight + (first + v < n ? first + v : n - 1) * padded;
#pragma unroll
      for (int r = 0; r < R; ++r) at[r] = (chunk * R + r < rows ? chunk * R + r : rows - 1) * t.samples + s;
      for (int from = 0; from < padded; from += kPart) {
        T part[kUnits][R] = {};
        const int to = int(smaller(from + kPart, padded));
        for (int m = from; m < to; m += kUnits) {
          T gs[kUnits][R];
#pragma unroll
          for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int r = 0; r < R; ++r) gs[u][r] = g[(m + u) * t.stride + at[r]];
#pragma unroll
          for (int v = 0; v < kUnits; ++v) {
            T w[kUnits];
            load<kUnits>(weight[v] + m, true, 1, w);
#pragma unroll
            for (int u = 0; u < kUnits; ++u)
#pragma unroll
              for (int r = 0; r < R; ++r) part[v][r] += w[u] * gs[u][r];
          }
        }
#pragma unroll
        for (int v = 0; v < kUnits; ++v)
#pragma unroll
          for (int r = 0; r < R; ++r) sum[v][r] += part[v][r];
      }
#pragma unroll
      for (int v = 0; v < kUnits; ++v)
#pragma unroll
        for (int r = 0; r < R; ++r)
          if (first + v < n && chunk * R + r < rows) gin[(first + v) * t.stride + at[r]] = sum[v][r];
    }
  });
}

// The reverse of net_keep: `g` holds the gradients of the outputs' rows and is overwritten, as `other` is. Adds to the
// parameters' `sums` where these are given; returns where row 0 of the gradient of the inputs is.
template <class T>
FF_D T* net_bwd(const NetTile<T>& t, const T* in, T* kept, T* g, T* other, T* of_units, double* sums) {
  T* const values = kept + (t.keeps_linear() ? t.net.units * t.stride : 0);
  for (int i = int(t.net.depth) - 1; i >= 0; --i) {
    const NetLayer& l = t.net.layers[i];
    units_bwd(t, l, i + 1 < int(t.net.depth), g, kept + l.linear * t.stride, values + l.linear * t.stride, of_units);
    const T* const before = i == 0 ? in : values + t.net.layers[i - 1].linear * t.stride;
    if (sums) parameters_bwd(t, l, g, before, of_units, sums);
    inputs_bwd(t, l, i == 0 ? 1 : t.rows, g, other);
    __syncthreads();
    T* const swap = g;
    g = other, other = swap;
  }
  return g;
}

}  // namespace fastflow
