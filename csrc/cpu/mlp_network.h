// The networks of an MLP coupling on a block of 64 samples, rows [unit][sample]: their outputs, and, backward, the
// gradients of their inputs and parameters.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mlp_narrow.h"
#include "mlp_stack.h"
#include "product.h"
#include "transpose.h"

namespace fastflow::mlp {

template <HiddenKind kind, bool slope, class T>
void activate_rows(T* y, T* d, int64_t n, T leak) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Slope<T> f = hidden<kind>(y[i], leak);
    y[i] = f.y;
    if constexpr (slope) d[i] = f.d;
  }
}

// The sum of n numbers, a power of two, in a fixed order; they are destroyed.
template <class T>
T tree_sum(T* values, int64_t n) {
  for (int64_t width = n / 2; width > 0; width /= 2)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// What a thread works with, every row 64 samples wide
template <class T>
struct Workspace {
  std::vector<T> memory;
  T *inputs, *outputs, *hidden, *slopes;  // of the networks: rows of their inputs, outputs, hidden layers
  T *goutputs, *g[2], *transposed;        // backward
  T *gweight, *dots, *gbias, *spare;      // gradients of one coupling's parameters, sums of lanes apart

  Workspace(const Stack<T>& s, bool backward) {
    constexpr int64_t lanes = Vector<T>::lanes;
    const int64_t in = s.features + s.context;
    int64_t weights = 0, narrow = 0, biases = 0;
    for (const Step<T>& step : s.steps) {
      int64_t w = 0, d = 0, b = 0;
      for (const Network<T>& net : step.networks)
        for (const Linear<T>& l : net.layers) {
          w += l.out * padded(l.in), b += l.out;
          if (is_narrow(l)) d += l.out * l.in;
        }
      weights = std::max(weights, w), narrow = std::max(narrow, d), biases = std::max(biases, b);
    }
    const int64_t hidden_rows = backward ? s.hidden : 2 * s.widest;
    std::array<int64_t, 11> sizes = {in * kSamples, s.outputs * kSamples, hidden_rows * kSamples};
    if (backward)
      sizes = {sizes[0],
               sizes[1],
               sizes[2],
               s.hidden * kSamples,
               s.outputs * kSamples,
               s.widest * kSamples,
               s.widest * kSamples,
               padded(s.widest) * kSamples,
               weights,
               narrow * lanes + kSamples,
               biases * lanes};
    int64_t total = 0;
    for (int64_t& n : sizes) n = padded(n), total += n;
    memory.resize(total + 2 * kPad);
    T* p = memory.data();
    p += (kVectorBytes - reinterpret_cast<uintptr_t>(p) % kVectorBytes) % kVectorBytes / sizeof(T);
    T** const parts[11] = {&inputs, &outputs,    &hidden,  &slopes, &goutputs, &g[0],
                           &g[1],   &transposed, &gweight, &dots,   &gbias};
    for (int i = 0; i < 11; ++i) *parts[i] = p, p += sizes[i];
    spare = dots + padded(narrow * lanes);
  }
};

template <class T>
void gather_inputs(const Step<T>& s, const T* state, const T* context, int64_t contexts, int64_t n, int64_t first,
                   T* to) {
  for (int64_t row : s.inputs) {
    if (row < 0)
      std::fill(to, to + kSamples, T(0));
    else
      std::copy_n(state + row * n + first, kSamples, to);
    to += kSamples;
  }
  for (int64_t c = 0; c < contexts; ++c, to += kSamples) std::copy_n(context + c * n + first, kSamples, to);
}

// y = W in + b
template <class T>
void linear(const Linear<T>& l, const T* in, T* out) {
  product<false>(l.out, kSamples, l.in, Left<T>{l.weight, l.in, 1}, in, kSamples, Start<T>{l.bias, 1, 0}, out,
                 kSamples);
}

// phi(W in + b), with `keep` the slopes too
template <HiddenKind kind, bool keep, class T>
void hidden_layer(const Linear<T>& l, const T* in, T* out, T* slopes, T leak) {
  if (l.in > kNarrow) {
    linear(l, in, out);
    return activate_rows<kind, keep>(out, slopes, l.out * kSamples, leak);
  }
  with_count(l.in, [&](auto inputs) {
    narrow_rows<inputs()>(l, in, out, [=](T a, [[maybe_unused]] int64_t at) {
      const Slope<T> f = hidden<kind>(a, leak);
      if constexpr (keep) slopes[at] = f.d;
      return f.y;
    });
  });
}

// The networks' outputs; with `keep` the rows of all hidden layers one after the other, their slopes beside them.
template <bool keep, class T>
void networks(const Step<T>& s, const Workspace<T>& w, int64_t widest) {
  T *hidden = w.hidden, *slopes = w.slopes;
  for (const Network<T>& net : s.networks) {
    const T* in = w.inputs;
    for (size_t i = 0; i < net.layers.size(); ++i) {
      const Linear<T>& l = net.layers[i];
      if (i + 1 == net.layers.size()) {
        linear(l, in, w.outputs + net.first_output * kSamples);
        break;
      }
      T* out = keep ? hidden : w.hidden + (i % 2) * widest * kSamples;
      with_hidden(s.activation,
                  [&](auto kind) { hidden_layer<kind(), keep && keeps_slope(kind())>(l, in, out, slopes, s.leak); });
      if (keep) hidden += l.out * kSamples, slopes += l.out * kSamples;
      in = out;
    }
  }
}

// --- gradients ------------------------------------------------------------------------------------------

// f(slope), with slope(place) = phi'(a) in front of a layer from what was kept of it; the first layer has none
template <class T, class F>
void with_slope(const Step<T>& s, bool first, const T* kept, const T* slopes, const F& f) {
  if (first) return f([](int64_t) { return T(1); });
  with_hidden(s.activation, [&](auto kind) {
    f([=, leak = s.leak](int64_t at) {
      if constexpr (keeps_slope(kind()))
        return slopes[at];
      else
        return slope_from_output<kind()>(kept[at], leak);
    });
  });
}

// gin = W^T g slope, gW (+)= g y^T, gb (+)= g
template <class T, class F>
void linear_grad(const Linear<T>& l, const T* g, const T* y, T* gin, F slope, T* transposed, const LayerGrad<T>& to,
                 bool add) {
  if (l.in > kNarrow) add_bias_grad(l, g, to.bias, add);
  if (l.in > kNarrow && l.out <= kNarrow)
    return with_count(l.out, [&](auto outputs) { narrow_columns_grad<outputs()>(l, g, y, gin, slope, to, add); });
  if (l.in <= kNarrow) {
    with_count(l.in, [&](auto inputs) { narrow_rows_grad<inputs()>(l, g, y, gin, to, add); });
  } else {
    const int64_t row = padded(l.in);
    const Left<T> left = {g, kSamples, 1};
    transpose_rows<kSamples>(y, l.in, transposed, row);
    if (add)
      product<true>(l.out, row, kSamples, left, transposed, row, Start<T>{}, to.weight, row);
    else
      product<false>(l.out, row, kSamples, left, transposed, row, Start<T>{}, to.weight, row);
    product<false>(l.in, kSamples, l.out, Left<T>{l.weight, 1, l.in}, g, kSamples, Start<T>{}, gin, kSamples);
  }
#pragma omp simd
  for (int64_t i = 0; i < l.in * kSamples; ++i) gin[i] *= slope(i);
}

// Gradients of a coupling's parameters from where a step summed them to where the chunk keeps them.
template <class T>
void finish_layer(const Linear<T>& l, const LayerGrad<T>& from, T* sums) {
  sum_lanes(from.bias, l.out, sums + l.gbias);
  if (is_narrow(l)) return sum_lanes(from.dots, l.out * l.in, sums + l.gweight);
  for (int64_t i = 0; i < l.out; ++i) std::copy_n(from.weight + i * padded(l.in), l.in, sums + l.gweight + i * l.in);
}

// From the gradients of the networks' outputs in w.goutputs to those of their inputs, added to the rows of `g` and of
// the context, and of their parameters.
template <class T>
void networks_grad(const Step<T>& s, const Workspace<T>& w, int64_t contexts, int64_t n, int64_t first, bool add, T* g,
                   T* gcontext) {
  constexpr int64_t lanes = Vector<T>::lanes;
  T *hidden = w.hidden, *slopes = w.slopes;
  LayerGrad<T> to = {w.gweight, w.dots, w.gbias};
  for (const Network<T>& net : s.networks) {
    const int64_t depth = int64_t(net.layers.size());
    // behind the last hidden layer of this network, and behind the sums of its last layer
    for (int64_t i = 0; i < depth; ++i) {
      const Linear<T>& l = net.layers[i];
      if (i + 1 < depth) hidden += l.out * kSamples, slopes += l.out * kSamples;
      to.weight += l.out * padded(l.in), to.bias += l.out * lanes;
      if (is_narrow(l)) to.dots += l.out * l.in * lanes;
    }
    T *kept = hidden, *slope = slopes;
    LayerGrad<T> of = to;
    const T* gout = w.goutputs + net.first_output * kSamples;
    for (int64_t i = depth - 1; i >= 0; --i) {
      const Linear<T>& l = net.layers[i];
      of.weight -= l.out * padded(l.in), of.bias -= l.out * lanes;
      if (is_narrow(l)) of.dots -= l.out * l.in * lanes;
      if (i > 0) kept -= l.in * kSamples, slope -= l.in * kSamples;
      T* gin = w.g[i % 2];
      with_slope(s, i == 0, kept, slope, [&](auto of_slope) {
        linear_grad(l, gout, i > 0 ? kept : w.inputs, gin, of_slope, w.transposed, of, add);
      });
      gout = gin;
    }
    const auto add_row = [&](const T* from, T* row) {
#pragma omp simd
      for (int64_t i = 0; i < kSamples; ++i) row[i] += from[i];
    };
    for (int64_t row : s.inputs) {
      if (row >= 0) add_row(gout, g + row * n + first);
      gout += kSamples;
    }
    for (int64_t c = 0; c < contexts; ++c, gout += kSamples) add_row(gout, gcontext + c * n + first);
  }
}

}  // namespace fastflow::mlp
