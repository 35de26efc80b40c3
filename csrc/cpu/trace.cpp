// Value and tangents of an MLP in one sweep: a sample's primal row and its S tangent rows go through the same products,
// activation value and slope are computed together. Saved: the rows of every hidden layer (x and probes come again).
// Bound by the rate of multiply-adds: a block of samples stays in L1 through all layers, the weights beside it.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "dynamics.h"
#include "dynamics_backward.h"
#include "module.h"

namespace fastflow {
namespace {

constexpr int64_t kParallelWork = 256 * 1024;  // multiply-adds below which a second thread costs more than it gives

// The samples of one call in blocks; all at one time, whose gates are in the matrices.
template <class T>
struct Net {
  Dynamics<T> dynamics;
  Moments<T> now;
  int64_t samples, block;
  T t;

  Net(const View& x, const View& time, const View& probes, const std::vector<View>& raw, int kind, bool backward)
      : dynamics(x.size[1], probes.size[0], raw, kind, backward, &at<T>(time)),
        now(dynamics, 1),
        samples(x.size[0]),
        block(dynamics.block(samples)),
        t(at<T>(time)) {
    now.set(dynamics, 0, T(0));
  }
  int64_t blocks() const { return (samples + block - 1) / block; }
  int64_t count(int64_t k) const { return std::min(block, samples - k * block); }
  bool parallel() const { return samples * dynamics.rows * dynamics.work >= kParallelWork; }
  int64_t scratch() const { return block * dynamics.rows * dynamics.widest; }

  // where block k keeps its hidden rows, in a tensor of those of all layers, one after the other; the last layer's in
  // `end`
  Kept<T> kept(const View& saved, int64_t k, T* end) const {
    Kept<T> found;
    T* p = reinterpret_cast<T*>(saved.data);
    for (int64_t l = 0; l + 1 < dynamics.depth(); ++l) {
      const int64_t row = dynamics.rows * padded(dynamics.layers[l].out);
      found.rows.push_back(p + k * block * row);
      p += samples * row;
    }
    found.rows.push_back(end);
    return found;
  }
};

// [count, 1 + S, D]: every sample's x, then its probes
template <class T>
void stack(const View& x, const View& probes, int64_t first, int64_t count, T* to) {
  const int64_t n = x.size[1];
  for (int64_t b = first; b < first + count; ++b) {
    for (int64_t d = 0; d < n; ++d) *to++ = at<T>(x, b, d);
    for (int64_t s = 0; s < probes.size[0]; ++s)
      for (int64_t d = 0; d < n; ++d) *to++ = at<T>(probes, s, b, d);
  }
}

template <Activation kind, class T>
void forward(const Net<T>& net, const View& x, const View& probes, const View& value, const View& trace,
             const View& saved) {
  const Dynamics<T>& f = net.dynamics;
  const int64_t n = f.features, width = padded(n);
  parallel_for(net.blocks(), net.parallel(), [&](int64_t begin, int64_t end) {
    std::vector<T> memory(3 * net.scratch());
    T* const buffers[2] = {memory.data(), memory.data() + net.scratch()};
    T* in = memory.data() + 2 * net.scratch();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * net.block, count = net.count(k);
      stack(x, probes, first, count, in);
      Kept<T> kept;
      if (saved) kept = net.kept(saved, k, buffers[(f.depth() - 1) % 2]);
      const T* row = forward_block<kind>(f, net.now, count, f.tangents, in, buffers, saved ? &kept : nullptr);
      const T* e = in;
      for (int64_t b = first; b < first + count; ++b) {
        for (int64_t d = 0; d < n; ++d) at<T>(value, b, d) = row[d];
        for (int64_t s = 0; s < f.tangents; ++s) {
          row += width, e += n;
          T sum = T(0);
          for (int64_t d = 0; d < n; ++d) sum += row[d] * e[d];
          at<T>(trace, s, b) = sum;
        }
        row += width, e += n;
      }
    }
  });
}

// From the gradients of W and b of unit i of layer l on to the raw parameters; returns its part of g_t, in double: t is
// one number that every unit of every layer adds to.
template <class T>
double unfold(const Net<T>& net, const Partials<T>& sums, int64_t l, int64_t i, const Parameters& g, T* row) {
  const Parameters& p = net.dynamics.parameters[l];
  double vectors[4];
  sums.total(net.dynamics.layers[l], l, i, row, vectors);
  const double gb = vectors[0];
  const T gate = p.gate(i, net.t);
  for (int64_t k = 0; k < p.in; ++k) at<T>(g.weight, i, p.skip() + k) = gate * row[k];
  at<T>(g.bias, i) = T(gate * gb);
  if (p.kind == Kind::ignore) return 0;
  if (p.kind == Kind::concat) {
    at<T>(g.weight, i) = T(net.t * gb);
    return gb * at<T>(p.weight, i);
  }
  double dot = gb * at<T>(p.bias, i);
  for (int64_t k = 0; k < p.in; ++k) dot += double(row[k]) * at<T>(p.weight, i, k);
  const double ginner = dot * gate * (T(1) - gate);
  at<T>(g.gate_weight, i) = T(ginner * net.t);
  at<T>(g.gate_bias, i) = T(ginner);
  at<T>(g.hyper, i) = T(gb * net.t);
  return ginner * at<T>(p.gate_weight, i) + gb * at<T>(p.hyper, i);
}

template <Activation kind, class T>
void backward(const Net<T>& net, const View& x, const View& probes, const View& saved, const View& gvalue,
              const View& gtrace, const View& gx, const View& gt, const std::vector<View>& graw) {
  const Dynamics<T>& f = net.dynamics;
  const int64_t n = f.features, width = padded(n);
  Partials<T> sums(f, net.blocks());
  parallel_for(sums.chunks, net.parallel(), [&](int64_t begin, int64_t end) {
    std::vector<T> memory(5 * net.scratch());
    T* const buffers[3] = {memory.data(), memory.data() + net.scratch(), memory.data() + 2 * net.scratch()};
    T *in = memory.data() + 3 * net.scratch(), *to = in + net.scratch();
    for (int64_t c = begin; c < end; ++c)
      for (int64_t k = c * sums.blocks; k < std::min((c + 1) * sums.blocks, net.blocks()); ++k) {
        const int64_t first = k * net.block, count = net.count(k);
        stack(x, probes, first, count, in);
        T* row = buffers[0];
        const T* e = in + n;
        std::fill(row, row + count * f.rows * width, T(0));
        for (int64_t b = first; b < first + count; ++b, row += width, e += n) {
          for (int64_t d = 0; d < n; ++d) row[d] = at<T>(gvalue, b, d);
          for (int64_t s = 0; s < f.tangents; ++s, e += n) {
            row += width;
            for (int64_t d = 0; d < n; ++d) row[d] = at<T>(gtrace, s, b) * e[d];
          }
        }
        backward_block<kind>(f, net.now, count, f.tangents, in, net.kept(saved, k, nullptr), buffers[0], buffers, sums,
                             sums.of(c), to);
        for (int64_t b = 0; b < count; ++b)
          for (int64_t d = 0; d < n; ++d) at<T>(gx, first + b, d) = to[b * n + d];
      }
  });
  const size_t each = graw.size() / f.layers.size();
  double total = 0;
  std::vector<T> row(f.widest);
  for (int64_t l = 0; l < f.depth(); ++l) {
    const Parameters g(&graw[l * each], f.parameters[l].kind);
    for (int64_t i = 0; i < f.layers[l].out; ++i) total += unfold(net, sums, l, i, g, row.data());
  }
  at<T>(gt) = T(total);
}

// --- what Python sees ---------------------------------------------------------------------------------
// x [B, D], t [], probes [S, B, D], the raw parameters of all layers one after the other; value [B, D], trace [S, B]

void mlp_trace_fwd(const View& x, const View& t, const View& probes, const std::vector<View>& raw, int kind,
                   int activation, const View& value, const View& trace, const View& saved) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Net<T> net(x, t, probes, raw, kind, false);
    with_activation(activation, [&](auto a) { forward<a()>(net, x, probes, value, trace, saved); });
  });
}

void mlp_trace_bwd(const View& x, const View& t, const View& probes, const std::vector<View>& raw, int kind,
                   int activation, const View& saved, const View& gvalue, const View& gtrace, const View& gx,
                   const View& gt, const std::vector<View>& graw) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Net<T> net(x, t, probes, raw, kind, true);
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
          for (int64_t i = 0; i < out; i += kColumns)
            forward_rows<kind(), false>(&at<T>(a, b) + i, Affine<T>{nullptr, &at<T>(bias, i), nullptr},
                                        static_cast<T*>(nullptr), &at<T>(z, b) + i, a.size[1] - 1,
                                        std::min(kColumns, out - i), out, out);
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
            for (int64_t i = 0; i < n; i += kColumns) {
              T unused[kColumns] = {};
              const int64_t some = std::min(kColumns, n - i);
              backward_rows<kind(), false, T>(from + i, nullptr, nullptr, &at<T>(previous, b) + i, tangents, some, n, n,
                                              unused, nullptr);
              if (keeps_input(kind())) again_rows<kind()>(from + i, to + i, tangents, some, n);
            }
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
