// Value and tangents of an MLP in one sweep: a sample's primal row and its S tangent rows go through the same products,
// activation value and slope are computed together. Saved: the rows of every hidden layer (x and probes come again).
// Bound by the rate of multiply-adds: a block of samples stays in L1 through all layers, the weights beside it.
#include "../trace.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "tile.h"
#include "view.h"

namespace fastflow {
namespace {

constexpr int64_t kBlockRows = 128;            // primal and tangent rows that go through all layers together
constexpr int64_t kChunks = 32;                // partial sums of the weights' gradients, whatever the threads
constexpr int64_t kColumns = 256;              // columns of a row between two looks at its tangents
constexpr int64_t kParallelWork = 256 * 1024;  // multiply-adds below which a second thread costs more than it gives

enum class Kind : int { concat, concat_squash, ignore };  // as LAYERS in fastflow/ops/trace_mlp.py

// --- activation of a sample: its primal row, then its tangents ----------------------------------------

// y = phi(a + bias), y' = phi'(a + bias) a'.  `a` may be `y`; where the inputs are kept it becomes a + bias.
template <Activation kind, class T>
void forward_rows(T* a, const T* bias, T* y, int64_t tangents, int64_t width, int64_t a_row, int64_t y_row) {
  T slope[kColumns];
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t n = std::min(kColumns, width - first);
    T *in = a + first, *out = y + first;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T value = in[i] + (bias ? bias[first + i] : T(0));
      const Slope<T> f = activate<kind>(value);
      if constexpr (keeps_input(kind)) in[i] = value;
      out[i] = f.y;
      slope[i] = f.d;
    }
    for (int64_t s = 0; s < tangents; ++s) {
      in += a_row, out += y_row;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = slope[i] * in[i];
    }
  }
}

// gradients of (y, y') become gradients of (a, a')
template <Activation kind, class T>
void backward_rows(const T* kept, T* g, int64_t tangents, int64_t width, int64_t kept_row, int64_t g_row) {
  T slope[kColumns], bend[kColumns], total[kColumns];
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t n = std::min(kColumns, width - first);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Curve<T> f = curve<kind>(kept[first + i]);
      slope[i] = f.d, bend[i] = f.c, total[i] = T(0);
    }
    for (int64_t s = 1; s <= tangents; ++s) {
      const T* k = kept + s * kept_row + first;
      T* gs = g + s * g_row + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        total[i] += k[i] * gs[i];
        gs[i] *= slope[i];
      }
    }
    T* g0 = g + first;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g0[i] = g0[i] * slope[i] + bend[i] * total[i];
  }
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

// --- layers -----------------------------------------------------------------------------------------

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

  template <class T>
  T gate(int64_t i, T t) const {
    return kind == Kind::concat_squash ? logistic(at<T>(gate_weight, i) * t + at<T>(gate_bias, i)).sigmoid : T(1);
  }
  template <class T>
  T shift(int64_t i, T t) const {
    return kind == Kind::concat_squash ? t * at<T>(hyper, i) : kind == Kind::concat ? t * at<T>(weight, i) : T(0);
  }
};

template <class T>
struct Affine {
  int64_t in, out;
  std::vector<T> weight, bias;  // W [out, padded in], or its transpose [in, padded out]; b [padded out]

  Affine(const Parameters& p, T t, bool transposed) : in(p.in), out(p.out), bias(padded(out)) {
    const int64_t row = transposed ? 1 : padded(in), column = transposed ? padded(out) : 1;
    weight.resize(transposed ? in * column : out * row);
    for (int64_t i = 0; i < out; ++i) {
      const T gate = p.gate(i, t);
      const T* from = &at<T>(p.weight, i, p.skip());
      for (int64_t k = 0; k < in; ++k) weight[i * row + k * column] = gate * from[k * p.weight.stride[1]];
      bias[i] = gate * at<T>(p.bias, i) + p.shift(i, t);
    }
  }
};

template <class T>
struct Net {
  std::vector<Parameters> parameters;
  std::vector<Affine<T>> layers;
  int64_t samples, tangents, rows, block, widest = 0, work = 0;  // rows of a sample, samples of a block
  T t;

  Net(const View& x, const View& time, const View& probes, const std::vector<View>& raw, int kind, bool transposed)
      : samples(x.size[0]), tangents(probes.size[0]), rows(1 + tangents), t(at<T>(time)) {
    const size_t each = Kind(kind) == Kind::concat_squash ? 5 : 2;
    block = std::max<int64_t>(1, kBlockRows / rows);
    for (size_t i = 0; i + each <= raw.size(); i += each) {
      parameters.emplace_back(&raw[i], Kind(kind));
      layers.emplace_back(parameters.back(), t, transposed);
      const Affine<T>& l = layers.back();
      if (l.in != (i == 0 ? x.size[1] : layers[layers.size() - 2].out))
        throw std::invalid_argument("the widths of the layers do not fit each other");
      widest = std::max({widest, padded(l.in), padded(l.out)});
      work += samples * rows * l.in * l.out;
    }
  }
  int64_t depth() const { return int64_t(layers.size()); }
  int64_t blocks() const { return (samples + block - 1) / block; }
  bool parallel() const { return work >= kParallelWork; }
  int64_t scratch() const { return block * rows * widest; }

  // where the kept rows of hidden layer l begin
  T* kept(const View& saved, int64_t l) const {
    T* p = reinterpret_cast<T*>(saved.data);
    for (int64_t i = 0; i < l; ++i) p += samples * rows * padded(layers[i].out);
    return p;
  }
};

// [samples, 1 + S, padded D]: every sample's x, then its probes
template <class T>
void stack(const View& x, const View& probes, int64_t first, int64_t count, int64_t rows, T* to) {
  const int64_t n = x.size[1], row = padded(n);
  for (int64_t b = first; b < first + count; ++b) {
    for (int64_t d = 0; d < n; ++d) to[d] = at<T>(x, b, d);
    to += row;
    for (int64_t s = 0; s + 1 < rows; ++s, to += row)
      for (int64_t d = 0; d < n; ++d) to[d] = at<T>(probes, s, b, d);
  }
}

// --- forward ----------------------------------------------------------------------------------------

template <Activation kind, class T>
void forward(const Net<T>& net, const View& x, const View& probes, const View& value, const View& trace,
             const View& saved) {
  const int64_t rows = net.rows, last = net.depth() - 1;
  parallel_for(net.blocks(), net.parallel(), [&](int64_t begin, int64_t end) {
    std::vector<T> memory(2 * net.scratch());
    T* buffers[2] = {memory.data(), memory.data() + net.scratch()};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * net.block, count = std::min(net.block, net.samples - first);
      const T* in = buffers[1];
      stack(x, probes, first, count, rows, buffers[1]);
      for (int64_t l = 0; l <= last; ++l) {
        const Affine<T>& layer = net.layers[l];
        const int64_t width = padded(layer.out);
        T* a = saved && l < last ? net.kept(saved, l) + first * rows * width : buffers[l % 2];
        multiply(
            Product<T>{count * rows, width, layer.in, in, padded(layer.in), 1, layer.weight.data(), width, a, width});
        if (l == last) {
          in = a;
          break;
        }
        T* y = keeps_input(kind) ? buffers[l % 2] : a;
        for (int64_t b = 0; b < count; ++b)
          forward_rows<kind>(a + b * rows * width, layer.bias.data(), y + b * rows * width, net.tangents, layer.out,
                             width, width);
        in = y;
      }
      const Affine<T>& layer = net.layers[last];
      const int64_t width = padded(layer.out);
      for (int64_t b = 0; b < count; ++b, in += rows * width) {
        for (int64_t d = 0; d < layer.out; ++d) at<T>(value, first + b, d) = in[d] + layer.bias[d];
        for (int64_t s = 0; s < net.tangents; ++s) {
          T sum = T(0);
          for (int64_t d = 0; d < layer.out; ++d) sum += in[(1 + s) * width + d] * at<T>(probes, s, first + b, d);
          at<T>(trace, s, first + b) = sum;
        }
      }
    }
  });
}

// --- backward ---------------------------------------------------------------------------------------

// Gradients of all W and b over a chunk of samples: [out, padded in] and then [padded out] for every layer.
template <class T>
struct Partials {
  std::vector<int64_t> offset;
  int64_t size = 0, chunks, blocks;  // blocks of a chunk
  std::unique_ptr<T[]> memory;

  explicit Partials(const Net<T>& net) {
    for (const auto& l : net.layers) {
      offset.push_back(size);
      size += l.out * padded(l.in) + padded(l.out);
    }
    blocks = std::max<int64_t>(1, (net.blocks() + kChunks - 1) / kChunks);
    chunks = (net.blocks() + blocks - 1) / blocks;
    memory.reset(new T[chunks * size]);
  }
  T* weight(int64_t chunk, int64_t l) const { return memory.get() + chunk * size + offset[l]; }
};

template <class T>
void add_rows(const T* g, int64_t count, int64_t step, int64_t width, T* sum, bool add) {
  if (!add) std::fill(sum, sum + width, T(0));
  for (int64_t b = 0; b < count; ++b)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sum[i] += g[b * step + i];
}

template <Activation kind, class T>
void backward_block(const Net<T>& net, const View& x, const View& probes, const View& saved, const View& gvalue,
                    const View& gtrace, const View& gx, const Partials<T>& sums, int64_t chunk, bool add, int64_t first,
                    T* const* buffers) {
  const int64_t rows = net.rows, count = std::min(net.block, net.samples - first), last = net.depth() - 1;
  T *g = buffers[0], *next = buffers[1];
  {
    const int64_t n = net.layers[last].out, width = padded(n);
    for (int64_t b = 0; b < count; ++b) {
      T* row = g + b * rows * width;
      for (int64_t d = 0; d < n; ++d) row[d] = at<T>(gvalue, first + b, d);
      for (int64_t s = 0; s < net.tangents; ++s)
        for (int64_t d = 0; d < n; ++d)
          row[(1 + s) * width + d] = at<T>(gtrace, s, first + b) * at<T>(probes, s, first + b, d);
    }
  }
  for (int64_t l = last; l >= 0; --l) {
    const Affine<T>& layer = net.layers[l];
    const int64_t in = padded(layer.in), out = padded(layer.out);
    const T* kept = l == 0 ? buffers[2] : net.kept(saved, l - 1) + first * rows * in;
    const T* y = kept;
    if (l == 0) {
      stack(x, probes, first, count, rows, buffers[2]);
    } else if (keeps_input(kind)) {
      y = buffers[2];
      std::copy(kept, kept + count * rows * in, buffers[2]);
      for (int64_t b = 0; b < count; ++b)
        forward_rows<kind>(buffers[2] + b * rows * in, static_cast<const T*>(nullptr), buffers[2] + b * rows * in,
                           net.tangents, layer.in, in, in);
    }
    T* weight = sums.weight(chunk, l);
    multiply(Product<T>{layer.out, in, count * rows, g, 1, out, y, in, weight, in, add});
    add_rows(g, count, rows * out, layer.out, weight + layer.out * in, add);
    const int64_t step = l == 0 ? rows : 1;  // x has a gradient, the probes have none
    multiply(Product<T>{count * rows / step, in, layer.out, g, step * out, 1, layer.weight.data(), in, next, in});
    if (l > 0)
      for (int64_t b = 0; b < count; ++b)
        backward_rows<kind>(kept + b * rows * in, next + b * rows * in, net.tangents, layer.in, in, in);
    std::swap(g, next);
  }
  const int64_t width = padded(net.layers[0].in);
  for (int64_t b = 0; b < count; ++b)
    for (int64_t d = 0; d < net.layers[0].in; ++d) at<T>(gx, first + b, d) = g[b * width + d];
}

// The chunks summed for unit i of layer l, and from its W and b on to the raw parameters; returns its part of g_t,
// in double: t is one number that every unit of every layer adds to.
template <class T>
double unfold(const Net<T>& net, const Partials<T>& sums, int64_t l, int64_t i, const Parameters& g, T* row) {
  const Parameters& p = net.parameters[l];
  const int64_t n = p.in, width = padded(n), bias = p.out * width;
  std::fill(row, row + n, T(0));
  double gb = 0;
  for (int64_t c = 0; c < sums.chunks; ++c) {
    const T* from = sums.weight(c, l);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) row[k] += from[i * width + k];
    gb += double(from[bias + i]);
  }
  const T gate = p.gate(i, net.t);
  for (int64_t k = 0; k < n; ++k) at<T>(g.weight, i, p.skip() + k) = gate * row[k];
  at<T>(g.bias, i) = T(gate * gb);
  if (p.kind == Kind::ignore) return 0;
  if (p.kind == Kind::concat) {
    at<T>(g.weight, i) = T(net.t * gb);
    return gb * at<T>(p.weight, i);
  }
  double dot = gb * at<T>(p.bias, i);
  for (int64_t k = 0; k < n; ++k) dot += double(row[k]) * at<T>(p.weight, i, k);
  const double ginner = dot * gate * (T(1) - gate);
  at<T>(g.gate_weight, i) = T(ginner * net.t);
  at<T>(g.gate_bias, i) = T(ginner);
  at<T>(g.hyper, i) = T(gb * net.t);
  return ginner * at<T>(p.gate_weight, i) + gb * at<T>(p.hyper, i);
}

template <Activation kind, class T>
void backward(const Net<T>& net, const View& x, const View& probes, const View& saved, const View& gvalue,
              const View& gtrace, const View& gx, const View& gt, const std::vector<View>& graw) {
  const Partials<T> sums(net);
  parallel_for(sums.chunks, net.parallel(), [&](int64_t begin, int64_t end) {
    std::vector<T> memory(3 * net.scratch());
    T* const buffers[3] = {memory.data(), memory.data() + net.scratch(), memory.data() + 2 * net.scratch()};
    for (int64_t c = begin; c < end; ++c)
      for (int64_t k = c * sums.blocks; k < std::min((c + 1) * sums.blocks, net.blocks()); ++k)
        backward_block<kind>(net, x, probes, saved, gvalue, gtrace, gx, sums, c, k > c * sums.blocks, k * net.block,
                             buffers);
  });
  const size_t each = graw.size() / net.layers.size();
  double total = 0;
  std::vector<T> row(net.widest);
  for (int64_t l = 0; l < net.depth(); ++l) {
    const Parameters g(&graw[l * each], net.parameters[l].kind);
    for (int64_t i = 0; i < net.layers[l].out; ++i) total += unfold(net, sums, l, i, g, row.data());
  }
  at<T>(gt) = T(total);
}

// --- what Python sees ---------------------------------------------------------------------------------
// x [B, D], t [], probes [S, B, D], the raw parameters of all layers one after the other; value [B, D], trace [S, B]

void mlp_trace_fwd(const View& x, const View& t, const View& probes, const std::vector<View>& raw, int kind,
                   int activation, const View& value, const View& trace, const View& saved) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Net<T> net(x, t, probes, raw, kind, true);
    with_activation(activation, [&](auto a) { forward<a()>(net, x, probes, value, trace, saved); });
  });
}

void mlp_trace_bwd(const View& x, const View& t, const View& probes, const std::vector<View>& raw, int kind,
                   int activation, const View& saved, const View& gvalue, const View& gtrace, const View& gx,
                   const View& gt, const std::vector<View>& graw) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Net<T> net(x, t, probes, raw, kind, false);
    with_activation(activation, [&](auto a) { backward<a()>(net, x, probes, saved, gvalue, gtrace, gx, gt, graw); });
  });
}

// --- one layer, for widths that leave the cache -------------------------------------------------------
// rows of samples are [B, 1 + S, n], contiguous; W [m, n] has any strides

template <class T>
T* rows_of(const View& v) {
  if (v.stride[2] != 1 && v.size[2] > 1) throw std::invalid_argument("rows must be contiguous");
  return reinterpret_cast<T*>(v.data);
}

// a = y W^T, then value and tangents of the activation: z = phi(a + bias); no activation where z is not given
void trace_layer_fwd(const View& y, const View& weight, const View& bias, const View& a, const View& z,
                     int activation) {
  const int64_t rows = a.size[0] * a.size[1], out = a.size[2];
  with_accumulator(a.dtype, [&](auto type) {
    using T = decltype(type);
    multiply_panels(Product<T>{rows, out, y.size[2], rows_of<T>(y), y.size[2], 1, &at<T>(weight), weight.stride[1],
                               rows_of<T>(a), out},
                    weight.stride[0]);
    if (!z) return;
    with_activation(activation, [&](auto kind) {
      parallel_for(a.size[0], rows * out >= kParallelElements, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          forward_rows<kind()>(&at<T>(a, b), &at<T>(bias), &at<T>(z, b), a.size[1] - 1, out, out, out);
      });
    });
  });
}

// g of a layer's a [B, 1 + S, m] -> gW = g^T y [m, n], and g of the a before, or of x [B, n] where nothing is kept.
// Where inputs are kept `y` is first made from them.
void trace_layer_bwd(const View& g, const View& weight, const View& kept, const View& y, const View& gweight,
                     const View& previous, int activation) {
  const int64_t samples = g.size[0], all = samples * g.size[1], tangents = g.size[1] - 1, m = g.size[2], n = y.size[2];
  with_accumulator(g.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t step = kept ? 1 : g.size[1];  // x has a gradient, the probes have none
    multiply_panels(Product<T>{all / step, n, m, rows_of<T>(g), step * m, 1, &at<T>(weight), weight.stride[0],
                               reinterpret_cast<T*>(previous.data), n},
                    weight.stride[1]);
    if (kept)
      with_activation(activation, [&](auto kind) {
        parallel_for(samples, all * n >= kParallelElements, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            const T* from = &at<T>(kept, b);
            T* to = &at<T>(y, b);
            backward_rows<kind()>(from, &at<T>(previous, b), tangents, n, n, n);
            if (!keeps_input(kind())) continue;
            std::copy_n(from, (1 + tangents) * n, to);
            forward_rows<kind()>(to, static_cast<const T*>(nullptr), to, tangents, n, n, n);
          }
        });
      });
    multiply_panels(Product<T>{m, n, all, rows_of<T>(g), 1, m, rows_of<T>(y), n, rows_of<T>(gweight), n}, 1);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(trace) {
  using namespace fastflow;
  namespace py = pybind11;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("mlp_trace_fwd", &mlp_trace_fwd, release);
  m.def("mlp_trace_bwd", &mlp_trace_bwd, release);
  m.def("trace_layer_fwd", &trace_layer_fwd, release);
  m.def("trace_layer_bwd", &trace_layer_bwd, release);
}
