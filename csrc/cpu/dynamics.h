// The dynamics of a continuous flow, an MLP f(x, t), on blocks of samples: values and tangents go through the same
// products. A block's rows are [samples, 1 + S, n]: every sample's value, then its tangents. In this order a sample's
// terms of a weight's gradient, which partly cancel, are added up before those of other samples.
//
// Every layer is gate(t) * (W y + v) + drift(t), and W is packed once, whatever the time: gate and drift, vectors of a
// moment (one for a block, or one for each of its samples), are applied where the activation is.
//
// Narrow nets: a block of samples stays in L1 through all layers, and threads share out the blocks. Wide ones: one
// block is the whole batch, and threads share out the products and the columns of the activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../trace.h"
#include "parallel.h"
#include "rows.h"
#include "tile.h"
#include "transpose.h"
#include "view.h"

namespace fastflow {

constexpr int64_t kBlockRows = 128;  // value and tangent rows that go through all layers together
constexpr int64_t kChunks = 32;      // partial sums of the weights' gradients, whatever the threads
constexpr int64_t kColumns = 64;     // of a task of a wide layer's activations
constexpr int64_t kFew = 4;          // columns of a product that are so few that it is one of dot products
constexpr int64_t kNarrow = 128;     // the widest layer of a narrow net, FUSED_WIDTH in fastflow/ops/trace_mlp.py
constexpr int64_t kStripRows = 48;   // rows of a task of a wide product; or that are activated right after theirs
constexpr int64_t kDepth = 256;      // of a run of the product that makes a wide weight's gradient: it stays in L2

// Blocks that one thread goes through one after the other, whatever the threads: they share a partial sum.
struct Groups {
  int64_t size, count;
  explicit Groups(int64_t blocks) : size(std::max<int64_t>(1, (blocks + kChunks - 1) / kChunks)) {
    count = (blocks + size - 1) / size;
  }
};

template <class T>
using Memory = std::unique_ptr<T[]>;  // not cleared

template <class T>
Memory<T> allocate(int64_t n) {
  return Memory<T>(new T[n]);
}

// --- activation: the values of samples, then their tangents ------------------------------------------------------

// One sample's vectors of a layer at its time: a = (gate z + bias) + drift, a' = gate z'. Where there is no gate
// everything is in the bias; there may be no bias either.
template <class T>
struct Affine {
  const T *gate, *bias, *drift;
};

// f(first, count) over n columns: whole vectors, whose number is a constant for the compiler, then what is left
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kPad <= n; i += kPad) f(i, std::integral_constant<int64_t, kPad>());
  if (i < n) f(i, n - i);
}

// y = phi(a), y' = phi'(a) a' on n columns of the row z and its tangents. `z` may be `y`; where the inputs are kept z
// becomes a. With a gate, u keeps gate z + bias if it is given.
template <Activation kind, bool gated, class T>
void forward_rows(T* z, const Affine<T> f, T* u, T* y, int64_t tangents, int64_t n, int64_t z_step, int64_t y_step) {
  for_vectors(n, [&](int64_t first, auto count) {
    const T *gate = f.gate + first, *bias = f.bias + first, *drift = f.drift + first;
    T *in = z + first, *out = y + first;
    T before[kPad], slope[kPad];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      before[i] = gated ? gate[i] * in[i] + bias[i] : in[i] + bias[i];
      const T value = gated ? before[i] + drift[i] : before[i];
      const Slope<T> s = activate<kind>(value);
      if constexpr (keeps_input(kind)) in[i] = value;
      out[i] = s.y;
      slope[i] = gated && !keeps_input(kind) ? s.d * gate[i] : s.d;
    }
    if (gated && u)
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) u[first + i] = before[i];
    for (int64_t s = 0; s < tangents; ++s) {
      in += z_step, out += y_step;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        T value = in[i];
        if constexpr (gated && keeps_input(kind)) in[i] = value = value * gate[i];
        out[i] = slope[i] * value;
      }
    }
  });
}

// The same of the last layer, which has no activation: a = gate z + bias + drift in the place of z, a' = gate z'
template <class T>
void finish_rows(T* z, const Affine<T> f, T* u, int64_t tangents, int64_t n, int64_t step) {
  for_vectors(n, [&](int64_t first, auto count) {
    T* row = z + first;
    T gate[kPad];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      gate[i] = f.gate ? f.gate[first + i] : T(1);
      const T before = gate[i] * row[i] + f.bias[first + i];
      if (u) u[first + i] = before;
      row[i] = f.drift ? before + f.drift[first + i] : before;
    }
    for (int64_t s = 0; s < tangents && f.gate; ++s) {
      row += step;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) row[i] *= gate[i];
    }
  });
}

// The outputs of kept inputs once more.
template <Activation kind, class T>
void again_rows(const T* kept, T* y, int64_t tangents, int64_t n, int64_t step) {
  T slope[kColumns];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Slope<T> s = activate<kind>(kept[i]);
    y[i] = s.y, slope[i] = s.d;
  }
  for (int64_t s = 0; s < tangents; ++s) {
    kept += step, y += step;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = slope[i] * kept[i];
  }
}

// Gradients g of (y, y') become those of (z, z'). Added up over samples: ga, the gradient of the drift (and of the bias
// where nothing is gated), and gi, that of what the gate is the sigmoid of.
template <Activation kind, bool gated, class T>
void backward_rows(const T* kept, const T* u, const T* gate, T* g, int64_t tangents, int64_t n, int64_t kept_step,
                   int64_t g_step, T* ga, T* gi) {
  for_vectors(n, [&](int64_t first, auto count) {
    T slope[kPad], bend[kPad], total[kPad];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Curve<T> f = curve<kind>(kept[first + i]);
      slope[i] = f.d, bend[i] = f.c, total[i] = T(0);
    }
    for (int64_t s = 1; s <= tangents; ++s) {
      const T* k = kept + s * kept_step + first;
      T* gs = g + s * g_step + first;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        total[i] += k[i] * gs[i];
        gs[i] *= gated ? slope[i] * gate[first + i] : slope[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = first + i;
      const T value = g[at] * slope[i] + bend[i] * total[i];
      ga[at] += value;
      if constexpr (gated) {
        const T tangent = keeps_input(kind) ? slope[i] * total[i] : total[i];
        gi[at] += (T(1) - gate[at]) * (value * u[at] + tangent);
      }
      g[at] = gated ? gate[at] * value : value;
    }
  });
}

template <class F>
void with_activation(int kind, const F& f) {
  switch (Activation(kind)) {
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>());
    case Activation::softplus:
      return f(std::integral_constant<Activation, Activation::softplus>());
    case Activation::elu:
      return f(std::integral_constant<Activation, Activation::elu>());
    default:
      return f(std::integral_constant<Activation, Activation::silu>());
  }
}

// --- layers -----------------------------------------------------------------------------------------------------

enum class Kind : int { concat, concat_squash, ignore };  // as LAYERS in fastflow/ops/trace_mlp.py

// The raw parameters of a layer; at one t it is affine, W y + b:
//   concat         W = V[:, 1:],  b = v + t V[:, 0]
//   concat_squash  W = gate V,    b = gate v + t h,   gate = sigmoid(w t + u) for every unit
struct Parameters {
  View weight, bias, gate_weight, gate_bias, hyper;
  Kind kind;
  int64_t in, out;

  Parameters(const View* v, Kind k) : weight(v[0]), bias(v[1]), kind(k), in(v[0].size[1]), out(v[0].size[0]) {
    if (kind == Kind::concat_squash) gate_weight = v[2], gate_bias = v[3], hyper = v[4];
    if (kind == Kind::concat) --in;
  }
  int64_t skip() const { return kind == Kind::concat; }  // columns before those of y
  static int64_t count(Kind kind) { return kind == Kind::concat_squash ? 5 : 2; }

  template <class T>
  T gate(int64_t i, T t) const {
    return kind == Kind::concat_squash ? logistic(at<T>(gate_weight, i) * t + at<T>(gate_bias, i)).sigmoid : T(1);
  }
  // what t is multiplied with
  template <class T>
  T drift(int64_t i) const {
    return kind == Kind::concat_squash ? at<T>(hyper, i) : kind == Kind::concat ? at<T>(weight, i) : T(0);
  }
};

// A right factor [depth, columns] in panels of kPanel columns, each [depth, its columns padded]; or, of few long
// columns, as [columns, padded depth].
template <class T>
struct Packed {
  int64_t depth = 0, columns = 0;
  bool few = false;
  std::vector<T> data;

  // element(k, j) of the factor; are the rows of the left one padded with finite numbers?
  template <class F>
  void fill(int64_t rows, int64_t n, bool left_padded, const F& element) {
    depth = rows, columns = n, few = left_padded && n <= kFew && depth > kPad;
    if (few) {
      data.assign(n * padded(depth), T(0));
      for (int64_t j = 0; j < n; ++j)
        for (int64_t k = 0; k < depth; ++k) data[j * padded(depth) + k] = element(k, j);
      return;
    }
    data.assign(depth * padded(columns), T(0));
    for (int64_t j = 0; j < n; ++j) {
      const int64_t panel = j / kPanel * kPanel, width = panel_width(panel);
      T* to = data.data() + panel * depth + (j - panel);
      for (int64_t k = 0; k < depth; ++k) to[k * width] = element(k, j);
    }
  }
  int64_t panel_width(int64_t first) const { return std::min(kPanel, padded(columns) - first); }
};

// C [rows, kPad] = A B of few columns: dot products in the lanes of a vector each, then the sums of the lanes
template <int64_t columns, class T>
void dots(int64_t rows, const T* a, int64_t a_row, const Packed<T>& b, T* c) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  const int64_t depth = padded(b.depth);
  V sums[columns][lanes] = {};
  T dot[columns][lanes];
  for (int64_t first = 0; first < rows; first += lanes) {
    const int64_t count = std::min(lanes, rows - first);
    for (int64_t i = 0; i < count; ++i, a += a_row) {
      V sum[columns] = {};
      for (int64_t k = 0; k < depth; k += lanes) {
        const V left = load_vector(a + k);
#pragma GCC unroll 4
        for (int64_t j = 0; j < columns; ++j) sum[j] += left * load_vector(b.data.data() + j * depth + k);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < columns; ++j) sums[j][i] = sum[j];
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; ++j) store_vector<T>(lane_sums<T>(sums[j]), dot[j]);
    for (int64_t i = 0; i < count; ++i, c += kPad) {
      std::fill_n(c, kPad, T(0));
      for (int64_t j = 0; j < columns; ++j) c[j] = dot[j][i];
    }
  }
}

// C [rows, padded columns] = A B
template <class T>
void multiply(int64_t rows, const T* a, int64_t a_row, const Packed<T>& b, T* c, bool parallel) {
  if (b.few) {
    static_assert(kFew == 4, "the cases below");
    if (b.columns == 1) dots<1>(rows, a, a_row, b, c);
    if (b.columns == 2) dots<2>(rows, a, a_row, b, c);
    if (b.columns == 3) dots<3>(rows, a, a_row, b, c);
    if (b.columns == 4) dots<4>(rows, a, a_row, b, c);
    return;
  }
  const int64_t c_row = padded(b.columns), panels = (b.columns + kPanel - 1) / kPanel;
  const int64_t height = parallel ? kStripRows : std::max<int64_t>(1, rows), strips = (rows + height - 1) / height;
  parallel_for(panels * strips, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / strips * kPanel, row = task % strips * height, width = b.panel_width(first);
      multiply(Product<T>{std::min(height, rows - row), width, b.depth, a + row * a_row, a_row, 1,
                          b.data.data() + first * b.depth, width, c + row * c_row + first, c_row});
    }
  });
}

template <class T>
struct Layer {
  int64_t in, out;
  Packed<T> forward, backward;  // W^T [in, out]; W [out, in] where asked for
};

// The network, its matrices packed: as they are, or at one time, where they have gates and drifts in them.
template <class T>
struct Dynamics {
  std::vector<Parameters> parameters;
  std::vector<Layer<T>> layers;
  std::vector<int64_t> offset;  // of a layer's units among all of them, each layer's padded
  int64_t features, tangents, rows, units = 0, widest = 0, work = 0;  // rows of a sample; multiply-adds of a row
  bool gated, wide;
  std::vector<T> bias, hyper, gate_weight, gate_bias;  // [units]; `hyper` is multiplied with t

  Dynamics(int64_t dim, int64_t count, const std::vector<View>& raw, int kind, bool backward, const T* t = nullptr)
      : features(dim), tangents(count), rows(1 + count), gated(Kind(kind) == Kind::concat_squash && !t) {
    const size_t each = Parameters::count(Kind(kind));
    for (size_t i = 0; i + each <= raw.size(); i += each) {
      parameters.emplace_back(&raw[i], Kind(kind));
      const Parameters& p = parameters.back();
      if (p.in != (i == 0 ? dim : parameters[parameters.size() - 2].out))
        throw std::invalid_argument("the widths of the layers do not fit each other");
      offset.push_back(units);
      units += padded(p.out);
      widest = std::max({widest, padded(p.in), padded(p.out)});
      work += p.in * p.out;
    }
    wide = widest > kNarrow;
    for (auto* v : {&bias, &hyper, &gate_weight, &gate_bias}) v->assign(units, T(0));
    for (size_t l = 0; l < parameters.size(); ++l) {
      const Parameters& p = parameters[l];
      layers.push_back({p.in, p.out, {}, {}});
      std::vector<T> scale(p.out, T(1));
      for (int64_t i = 0; i < p.out; ++i) {
        const int64_t unit = offset[l] + i;
        if (t) scale[i] = p.gate(i, *t);
        bias[unit] = scale[i] * at<T>(p.bias, i) + (t ? *t * p.template drift<T>(i) : T(0));
        hyper[unit] = t ? T(0) : p.template drift<T>(i);
        if (gated) gate_weight[unit] = at<T>(p.gate_weight, i), gate_bias[unit] = at<T>(p.gate_bias, i);
      }
      const int64_t skip = p.skip();
      const auto element = [&](int64_t i, int64_t k) { return scale[i] * at<T>(p.weight, i, skip + k); };
      const bool whole = !wide && l > 0;  // the rows of x have no padding
      if (!backward || !t)
        layers[l].forward.fill(p.in, p.out, whole, [&](int64_t k, int64_t i) { return element(i, k); });
      if (backward) layers[l].backward.fill(p.out, p.in, !wide, element);
    }
  }
  int64_t depth() const { return int64_t(layers.size()); }
  // samples of a block: as many as fit, in a number of blocks that threads share out evenly
  int64_t block(int64_t samples) const {
    if (wide) return samples;
    const int64_t blocks = (samples * rows + kBlockRows - 1) / kBlockRows,
                  even = blocks > 2 ? (blocks + 3) / 4 * 4 : blocks;
    return std::max<int64_t>(1, (samples + even - 1) / std::max<int64_t>(1, even));
  }
};

// Gates, biases and drifts of all units at one time, or at the time of each sample of a block.
template <class T>
struct Moments {
  int64_t step = 0, units;  // step: 0 for one time
  std::vector<T> t, gate, bias, drift;

  Moments(const Dynamics<T>& net, int64_t count) : units(net.units), t(count), bias(count * net.units) {
    if (net.gated) gate.resize(count * units), drift.resize(count * units);
    step = count > 1 ? units : 0;
  }

  void set(const Dynamics<T>& net, int64_t b, T time) {
    t[b] = time;
    T* to = bias.data() + b * units;
    if (net.gated)
      gates(time, net.gate_weight.data(), net.gate_bias.data(), net.bias.data(), net.hyper.data(), units,
            gate.data() + b * units, to, drift.data() + b * units);
    else
#pragma omp simd
      for (int64_t i = 0; i < units; ++i) to[i] = net.bias[i] + time * net.hyper[i];
  }
  // on its own: inlined, its loop does not vectorise
  __attribute__((noinline)) static void gates(T time, const T* w, const T* u, const T* v, const T* hyper, int64_t n,
                                              T* __restrict gate, T* __restrict bias, T* __restrict drift) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T value = logistic(w[i] * time + u[i]).sigmoid;
      gate[i] = value, bias[i] = value * v[i], drift[i] = time * hyper[i];
    }
  }

  Affine<T> of(int64_t b, int64_t unit) const {
    const int64_t i = b * step + unit;
    return {gate.empty() ? nullptr : gate.data() + i, bias.data() + i, drift.empty() ? nullptr : drift.data() + i};
  }
};

// --- a block forward ----------------------------------------------------------------------------------------------

// What backward needs of a block: the rows of every hidden layer's outputs (of silu inputs); and with gates the values
// before the drift, of all layers, and the last layer's rows.
template <class T>
struct Kept {
  std::vector<T*> rows, before;

  static int64_t size(const Dynamics<T>& net, int64_t count, int64_t tangents) {
    int64_t n = 0;
    for (const auto& l : net.layers) n += (1 + tangents + net.gated) * count * padded(l.out);
    return n;
  }
  Kept() = default;
  Kept(const Dynamics<T>& net, int64_t count, int64_t tangents, T* memory) {
    for (const auto& l : net.layers) {
      rows.push_back(memory), memory += (1 + tangents) * count * padded(l.out);
      before.push_back(net.gated ? memory : nullptr), memory += net.gated * count * padded(l.out);
    }
  }
};

// f(columns [first, first + n) of a layer of this width): shared out where the net is wide
template <class F>
void for_columns(int64_t width, bool parallel, const F& f) {
  parallel_for((width + kColumns - 1) / kColumns, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k * kColumns, std::min(kColumns, width - k * kColumns));
  });
}

// The values and tangents of the last layer [count, 1 + S, padded D], from those of x, [count, 1 + S, D]. Buffers: two
// of count (1 + S) widest; where hidden rows are kept they serve inputs that are kept besides.
template <Activation kind, class T>
T* forward_block(const Dynamics<T>& net, const Moments<T>& now, int64_t count, int64_t tangents, const T* x,
                 T* const* buffers, const Kept<T>* kept) {
  const int64_t rows = 1 + tangents, last = net.depth() - 1;
  const T* in = x;
  for (int64_t l = 0;; ++l) {
    const Layer<T>& layer = net.layers[l];
    const int64_t in_width = l == 0 ? layer.in : padded(layer.in), width = padded(layer.out);
    T* z = kept ? kept->rows[l] : buffers[l % 2];
    T* y = l < last && keeps_input(kind) && kept ? buffers[l % 2] : z;
    T* before = kept && net.gated ? kept->before[l] : nullptr;
    // what follows the product, on n columns of the samples from `begin` to `end`
    const auto follow = [&](int64_t begin, int64_t end, int64_t first, int64_t n) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t place = b * rows * width + first;
        const Affine<T> f = now.of(b, net.offset[l] + first);
        T* u = before ? before + b * width + first : nullptr;
        if (l == last)
          finish_rows(z + place, f, u, tangents, n, width);
        else if (net.gated)
          forward_rows<kind, true>(z + place, f, u, y + place, tangents, n, width, width);
        else
          forward_rows<kind, false>(z + place, f, u, y + place, tangents, n, width, width);
      }
    };
    if (net.wide) {
      multiply(rows * count, in, in_width, layer.forward, z, true);
      for_columns(width, true, [&](int64_t first, int64_t n) { follow(0, count, first, n); });
    } else {  // while the product's rows are in L1
      const int64_t some = std::max<int64_t>(1, kStripRows / rows);
      for (int64_t b = 0; b < count; b += some) {
        const int64_t end = std::min(count, b + some);
        multiply(rows * (end - b), in + b * rows * in_width, in_width, layer.forward, z + b * rows * width, false);
        follow(b, end, 0, width);
      }
    }
    if (l == last) return z;
    in = y;
  }
}

}  // namespace fastflow
