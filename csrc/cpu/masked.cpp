// A network of masked layers, a block of samples through all of them at a time.
#include <pybind11/stl.h>

#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "staircase.h"

namespace fastflow {
namespace {

template <class T>
struct Network {
  std::vector<Stairs<T>> layers;
  Stairs<T> direct;
  Hidden hidden;
  int64_t widest = 0, work = 0;

  Network(const std::vector<View>& weights, const std::vector<View>& reaches, const View& direct_weight,
          const View& direct_reach, int activation, bool residual)
      : hidden{static_cast<int64_t>(weights.size()) - 1, activation, residual} {
    if (weights.empty() || weights.size() != reaches.size())
      throw std::invalid_argument("a network needs weights, and a reach for each");
    for (size_t l = 0; l < weights.size(); ++l) {
      layers.emplace_back(weights[l], reaches[l]);
      if (l > 0 && layers[l].columns != layers[l - 1].rows) throw std::invalid_argument("weights do not follow");
      widest = std::max({widest, layers[l].rows, layers[l].columns});
      work += layers[l].rows * layers[l].columns;
    }
    for (int64_t l = 2; l < hidden.layers; l += 2)
      if (residual && layers[l].rows != layers[0].rows) throw std::invalid_argument("a residual of another width");
    if (direct_weight) {
      direct = Stairs<T>(direct_weight, direct_reach);
      if (direct.rows != layers.back().rows || direct.columns != layers[0].columns)
        throw std::invalid_argument("the direct weight does not match");
    }
  }
  int64_t last() const { return hidden.layers; }
};

template <class T>
void forward(const Network<T>& net, const View& x, const std::vector<View>& starts, const View& y, const View& saved) {
  each_block(x.size[0], net.work, [&](int64_t first, int64_t count, int64_t width) {
    std::vector<T> memory((net.layers[0].columns + 3 * net.widest) * width);
    T* const input = memory.data();
    T *sum = input + net.layers[0].columns * width, *other = sum + net.widest * width;
    T* const stream = other + net.widest * width;
    const T* in = input;
    load(x, first, count, width, false, input);
    for (int64_t l = 0, row = 0; l <= net.last(); ++l) {
      const Stairs<T>& layer = net.layers[l];
      const int64_t size = layer.rows * width;
      fill_start(start_of(starts[l], layer.rows), first, count, width, 0, layer.rows, sum);
      add_stairs(layer, in, sum, width);
      if (l == net.last()) break;
      if (net.hidden.joins(l)) add_to(sum, stream, size);
      if (net.hidden.residual && l % 2 == 0) std::copy_n(sum, size, stream);
      if (saved) store(sum, turned(rows_of(saved, row, layer.rows)), first, count, width, false);
      with_unit(net.hidden.of(l), [&](auto kind) { apply<kind()>(sum, sum, size); });
      row += layer.rows;
      in = sum;
      std::swap(sum, other);
    }
    if (net.direct.data) add_stairs(net.direct, input, sum, width);
    store(sum, y, first, count, width, false);
  });
}

// From the gradient of y to those of all sums, ga, and of x. Units are counted from their end throughout.
template <class T>
void backward(const Network<T>& net, const View& saved, const View& gy, const View& gx, const View& ga) {
  std::vector<Stairs<T>> mirrored;
  for (const auto& layer : net.layers) mirrored.push_back(layer.mirrored());
  const Stairs<T> direct = net.direct.data ? net.direct.mirrored() : Stairs<T>();
  each_block(gy.size[0], net.work, [&](int64_t first, int64_t count, int64_t width) {
    const int64_t outputs = net.layers.back().rows;
    std::vector<T> memory((outputs + 4 * net.widest) * width);
    T* const output = memory.data();
    T *sum = output + outputs * width, *other = sum + net.widest * width;
    T *const stream = other + net.widest * width, *const kept = stream + net.widest * width;
    const T* in = output;
    load(gy, first, count, width, true, output);
    int64_t row = saved.size[0];
    for (int64_t l = net.last(); l >= 0; --l) {
      const Stairs<T>& layer = mirrored[l];
      const int64_t size = layer.rows * width, before = l - 1;
      std::fill(sum, sum + size, T(0));
      add_stairs(layer, in, sum, width);
      if (l == 0) break;
      row -= layer.rows;
      load(turned(rows_of(saved, row, layer.rows)), first, count, width, true, kept);
      with_unit(net.hidden.of(before), [&](auto kind) { apply_slope<kind()>(kept, sum, size); });
      if (net.hidden.joins(before + 2)) add_to(sum, stream, size);
      if (net.hidden.residual && before % 2 == 0) std::copy_n(sum, size, stream);
      store(sum, turned(rows_of(ga, row, layer.rows)), first, count, width, true);
      in = sum;
      std::swap(sum, other);
    }
    if (direct.data) add_stairs(direct, output, sum, width);
    store(sum, gx, first, count, width, true);
  });
}

// --- gradients of weights ---------------------------------------------------------------------------

constexpr int64_t kStrip = 240;  // rows of a task
constexpr int64_t kDepth = 512;  // samples whose inputs are packed at a time

// phi of kPanel inputs, from column `first` on, of the samples [sample, sample + depth), [depth, width]
template <class T>
void pack_inputs(const View& x, int activation, int64_t sample, int64_t depth, int64_t first, int64_t count,
                 int64_t width, T* to) {
  constexpr int64_t step = 16;
  if (count < width) std::fill(to, to + depth * width, T(0));
  for (int64_t b0 = 0; b0 < depth; b0 += step)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t b = b0; b < std::min(b0 + step, depth); ++b) to[b * width + i] = at<T>(x, sample + b, first + i);
  with_unit(activation, [&](auto kind) {
    if constexpr (kind() != Unit::linear) apply<kind()>(to, to, depth * width);
  });
}

// gW[j, i] = sum over samples of g[b, j] phi(x[b, i]) for i < reach[j], 0 beyond.
template <class T>
void weight_grad(const View& g, const View& x, const Stairs<T>& gweight, int activation) {
  const int64_t samples = g.size[0], rows = gweight.rows, columns = gweight.columns;
  const int64_t panels = (columns + kPanel - 1) / kPanel, strips = (rows + kStrip - 1) / kStrip;
  parallel_for(panels * strips, samples * rows * columns >= kWorthIt, [&](int64_t begin, int64_t end) {
    std::vector<T> panel(std::min(kDepth, samples) * kPanel), out(kStrip * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      // panels from both ends in turn: the first see many rows, the last few
      const int64_t turn = task / strips, p = turn % 2 ? panels - 1 - turn / 2 : turn / 2;
      const int64_t column = p * kPanel, count = std::min(kPanel, columns - column), width = padded(count);
      const int64_t row = task % strips * kStrip, stop = std::min(row + kStrip, rows);
      const auto sees = std::upper_bound(gweight.reach.begin() + row, gweight.reach.begin() + stop, column);
      const int64_t first = sees - gweight.reach.begin();
      if (samples == 0) std::fill(out.begin(), out.end(), T(0));
      for (int64_t b = 0; b < samples && first < stop; b += kDepth) {
        const int64_t depth = std::min(kDepth, samples - b);
        pack_inputs(x, activation, b, depth, column, count, width, panel.data());
        multiply(Product<T>{stop - first, width, depth, &at<T>(g, b, first), g.stride[1], g.stride[0], panel.data(),
                            width, out.data(), width, b > 0});
      }
      for (int64_t j = row; j < stop; ++j) {
        T* to = const_cast<T*>(gweight.data) + j * gweight.row + column;
        const int64_t known = std::clamp<int64_t>(gweight.reach[j] - column, 0, count);
        if (j >= first) std::copy_n(out.data() + (j - first) * width, known, to);
        std::fill(to + known, to + count, T(0));
      }
    }
  });
}

// --- what Python sees -------------------------------------------------------------------------------
// x [B, n], starts [m] or [B, m], y [B, m], saved and ga [units, B]

void masked_mlp_fwd(const View& x, const std::vector<View>& weights, const std::vector<View>& starts,
                    const std::vector<View>& reaches, const View& direct, const View& direct_reach, int activation,
                    bool residual, const View& y, const View& saved) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    forward(Network<T>(weights, reaches, direct, direct_reach, activation, residual), x, starts, y, saved);
  });
}

void masked_mlp_bwd(const std::vector<View>& weights, const std::vector<View>& reaches, const View& direct,
                    const View& direct_reach, int activation, bool residual, const View& saved, const View& gy,
                    const View& gx, const View& ga) {
  with_accumulator(gy.dtype, [&](auto type) {
    using T = decltype(type);
    backward(Network<T>(weights, reaches, direct, direct_reach, activation, residual), saved, gy, gx, ga);
  });
}

void masked_weight_bwd(const View& g, const View& x, const View& reach, int activation, const View& gweight) {
  with_accumulator(g.dtype, [&](auto type) {
    using T = decltype(type);
    weight_grad(g, x, Stairs<T>(gweight, reach), activation);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(masked) {
  using namespace fastflow;
  namespace py = pybind11;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("masked_mlp_fwd", &masked_mlp_fwd, release);
  m.def("masked_mlp_bwd", &masked_mlp_bwd, release);
  m.def("masked_weight_bwd", &masked_weight_bwd, release);
}
