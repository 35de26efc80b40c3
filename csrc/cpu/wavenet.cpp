// A stack of causal gated convolutions over whole sequences: h' = h + R z, skip = sum of S z with
// z = tanh(.) sigmoid(.) of the taps h_t, h_{t-d}, ... and the conditioning.
// A block of time steps goes through all layers while it and the skips stay in the cache; what is kept are the inputs
// of the layers, each behind its history, so that a tap is a shift by rows and no product is ragged at the start.
// Backward goes through the blocks from the last to the first, makes the gates again, and holds the gradients that
// taps send to earlier steps in a ring for every layer.
// Bound by the rate of multiply-adds. Sums over steps and samples do not depend on the number of threads.
#include "wavenet.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "module.h"
#include "parallel.h"
#include "rows.h"

namespace fastflow {
namespace {

constexpr int64_t kSteps = 64;                 // of a block
constexpr int64_t kLanes = 8;                  // samples at work at once, each with its own sums of gradients
constexpr int64_t kParallelWork = 256 * 1024;  // multiply-adds below which a second thread costs more than it gives

// The layers' inputs behind their histories, [B, past + L T, R]
template <class T>
struct Kept {
  T* data;
  int64_t steps, rows;
  // of layer l, the row of step t as the oldest tap has it
  T* row(const Layers<T>& net, int64_t b, int64_t l, int64_t t) const {
    return data + (b * rows + net.start[l] + l * steps + t) * net.residual;
  }
};

template <class T>
void gate_rows(const T* acts, int64_t count, int64_t n, int64_t z_row, T* z) {
  for (int64_t t = 0; t < count; ++t, acts += 2 * n, z += z_row)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Gate<T> f = gate(acts[i], acts[n + i]);
      z[i] = f.tanh * f.sigmoid;
    }
}

// z with its factors kept where the sums were
template <class T>
void gate_rows_kept(T* acts, int64_t count, int64_t n, int64_t z_row, T* z) {
  for (int64_t t = 0; t < count; ++t, acts += 2 * n, z += z_row)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Gate<T> f = gate(acts[i], acts[n + i]);
      z[i] = f.tanh * f.sigmoid;
      acts[i] = f.tanh, acts[n + i] = f.sigmoid;
    }
}

template <class T>
void gate_rows_backward(T* factors, const T* gz, int64_t count, int64_t n) {
  for (int64_t t = 0; t < count; ++t, factors += 2 * n, gz += n)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T ga, gb;
      gate_backward(factors[i], factors[n + i], gz[i], ga, gb);
      factors[i] = ga, factors[n + i] = gb;
    }
}

// One sample's `count` steps from `first` on: the sums before the gate, [count, 2D]
template <class T>
void before_gate(const Layers<T>& net, const Kept<T>& kept, const T* context, int64_t b, int64_t l, int64_t first,
                 int64_t count, T* acts) {
  const int64_t r = net.residual, n = 2 * net.gated, d = net.dilation[l];
  for (int64_t t = 0; t < count; ++t) std::copy_n(net.bias_of(l, b), n, acts + t * n);
  for (int64_t i = 0; i < net.width; ++i)
    add_product<T>(count, n, r, kept.row(net, b, l, first + i * d), r, 1, net.gate_of(l, i), n, acts, n);
  if (context) add_product<T>(count, n, net.context, context, net.context, 1, net.gate_of(l, net.width), n, acts, n);
}

// The walk: lanes of samples, groups of layers and blocks of steps. At any moment a group works on the block that the
// group before has finished, so that few long samples keep several threads busy. step(lane, b, l, block)
template <bool backward, class Step>
void walk(int64_t samples, int64_t depth, int64_t blocks, bool parallel, const Step& step) {
  const int64_t lanes = std::min(samples, kLanes), threads = parallel && openmp().found() ? openmp().max_threads() : 1;
  if (lanes == 0) return;
  const int64_t groups = lanes >= threads ? 1 : std::min(depth, 2 * threads / lanes);
  const int64_t rounds = (samples + lanes - 1) / lanes;
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t diagonal = 0; diagonal < blocks + groups - 1; ++diagonal)
      parallel_for(lanes * groups, parallel, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t lane = task / groups, group = task % groups, b = lane * rounds + round;
          const int64_t block = diagonal - group, low = depth * group / groups, high = depth * (group + 1) / groups;
          if (b >= std::min(samples, (lane + 1) * rounds) || block < 0 || block >= blocks) continue;
          for (int64_t l = low; l < high; ++l)
            backward ? step(lane, b, depth - 1 - l, blocks - 1 - block) : step(lane, b, l, block);
        }
      });
}

// --- forward ----------------------------------------------------------------------------------------

template <class T>
void forward(const Layers<T>& net, const View& x, const T* context, const T* past, const Kept<T>& kept, T* out,
             T* skip) {
  const int64_t r = net.residual, s = net.skipped, steps = kept.steps, blocks = (steps + kSteps - 1) / kSteps;
  const bool parallel = net.batch * steps * net.work() >= kParallelWork;
  parallel_for(net.batch, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t l = 0; l < net.depth; ++l) {
        const int64_t n = net.history(net.dilation[l]) * r;
        T* to = kept.row(net, b, l, 0);
        if (past)
          std::copy_n(past + (b * net.past + net.start[l]) * r, n, to);
        else
          std::fill_n(to, n, T(0));
      }
      T* to = kept.row(net, b, 0, net.history(net.dilation[0]));
      for (int64_t t = 0; t < steps; ++t, to += r) std::copy_n(&at<T>(x, b, t), r, to);
    }
  });
  walk<false>(net.batch, net.depth, blocks, parallel, [&](int64_t, int64_t b, int64_t l, int64_t block) {
    thread_local std::vector<T> memory;
    memory.resize(kSteps * (2 * net.gated + net.z_row()));
    T *acts = memory.data(), *z = acts + kSteps * 2 * net.gated;
    const int64_t first = block * kSteps, count = std::min(kSteps, steps - first);
    for (int64_t t = 0; t < count; ++t) z[t * net.z_row() + net.gated] = T(1);
    before_gate(net, kept, context ? context + (b * steps + first) * net.context : nullptr, b, l, first, count, acts);
    gate_rows(acts, count, net.gated, net.z_row(), z);
    const T* in = kept.row(net, b, l, net.history(net.dilation[l]) + first);
    T* next = l + 1 < net.depth ? kept.row(net, b, l + 1, net.history(net.dilation[l + 1]) + first)
                                : out + (b * steps + first) * r;
    std::copy_n(in, count * r, next);
    add_product<T>(count, r, net.gated + 1, z, net.z_row(), 1, net.residual_of(l), r, next, r);
    T* sum = skip + (b * steps + first) * s;
    if (l == 0) std::fill_n(sum, count * s, T(0));
    add_product<T>(count, s, net.gated + 1, z, net.z_row(), 1, net.skip_of(l), s, sum, s);
  });
}

// --- backward ---------------------------------------------------------------------------------------

// [depth, rows, columns] with every matrix transposed
template <class T>
std::vector<T> transposed(const T* from, int64_t depth, int64_t rows, int64_t columns, int64_t row_step) {
  std::vector<T> to(depth * rows * columns);
  for (int64_t l = 0; l < depth; ++l)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[(l * columns + j) * rows + i] = from[(l * row_step + i) * columns + j];
  return to;
}

// Gradients of the inputs of a layer, on their way to earlier steps: a ring of whole blocks for every lane.
template <class T>
struct Rings {
  std::vector<int64_t> start, rows;
  int64_t total = 0, channels;
  std::unique_ptr<T[]> memory;

  Rings(const Layers<T>& net, int64_t lanes) : channels(net.residual) {
    for (const int64_t d : net.dilation) {
      start.push_back(total);
      // the block that is read, the one that is written, and those that the longest tap reaches
      rows.push_back(((net.history(d) + kSteps - 1) / kSteps + 2) * kSteps);
      total += rows.back();
    }
    memory.reset(new T[lanes * total * channels]());
  }
  T* row(int64_t lane, int64_t l, int64_t t) const {
    return memory.get() + (lane * total + start[l] + t % rows[l]) * channels;
  }
};

template <class T>
struct Gradients {
  T *x, *gate, *bias, *residual, *skip, *context;  // context may be nothing
};

template <class T>
void backward(const Layers<T>& net, const Kept<T>& kept, const T* context, const T* gout, const T* gskip,
              const Gradients<T>& to) {
  const int64_t r = net.residual, d = net.gated, s = net.skipped, c = net.context, steps = kept.steps;
  const int64_t taps = net.width * r + c, blocks = (steps + kSteps - 1) / kSteps, lanes = std::min(net.batch, kLanes);
  const bool parallel = net.batch * steps * net.work() >= kParallelWork;
  const auto gate_t = transposed(net.gate, net.depth, taps, 2 * d, taps);
  const auto residual_t = transposed(net.to_residual, net.depth, d, r, d + 1);
  const auto skip_t = transposed(net.to_skip, net.depth, d, s, d + 1);
  const Rings<T> rings(net, lanes);
  // the sums of a lane: gate, residual, skip of all layers
  const int64_t sizes[3] = {net.depth * taps * 2 * d, net.depth * (d + 1) * r, net.depth * (d + 1) * s};
  const int64_t size = sizes[0] + sizes[1] + sizes[2];
  const std::unique_ptr<T[]> sums(new T[lanes * size]());
  std::fill_n(to.bias, net.depth * net.batch * 2 * d, T(0));
  if (to.context) std::fill_n(to.context, net.batch * steps * c, T(0));

  walk<true>(net.batch, net.depth, blocks, parallel, [&](int64_t lane, int64_t b, int64_t l, int64_t block) {
    thread_local std::vector<T> memory;
    memory.resize(kSteps * (2 * d + net.z_row() + d));
    T *acts = memory.data(), *z = acts + kSteps * 2 * d, *gz = z + kSteps * net.z_row();
    const int64_t first = block * kSteps, count = std::min(kSteps, steps - first), row = net.z_row();
    for (int64_t t = 0; t < count; ++t) z[t * row + d] = T(1);
    const T* of_context = context ? context + (b * steps + first) * c : nullptr;
    before_gate(net, kept, of_context, b, l, first, count, acts);
    gate_rows_kept(acts, count, d, row, z);

    const bool last = l + 1 == net.depth;
    T* ring = last ? nullptr : rings.row(lane, l + 1, first);
    const T* gh = last ? gout + (b * steps + first) * r : ring;
    const T* gs = gskip + (b * steps + first) * s;
    T* of_gate = sums.get() + lane * size + l * taps * 2 * d;
    T* of_residual = sums.get() + lane * size + sizes[0] + l * (d + 1) * r;
    T* of_skip = sums.get() + lane * size + sizes[0] + sizes[1] + l * (d + 1) * s;
    add_product<T>(d + 1, r, count, z, 1, row, gh, r, of_residual, r);
    add_product<T>(d + 1, s, count, z, 1, row, gs, s, of_skip, s);
    std::fill_n(gz, count * d, T(0));
    add_product<T>(count, d, r, gh, r, 1, residual_t.data() + l * r * d, d, gz, d);
    add_product<T>(count, d, s, gs, s, 1, skip_t.data() + l * s * d, d, gz, d);
    gate_rows_backward(acts, gz, count, d);

    T* gbias = to.bias + (l * net.batch + b) * 2 * d;
    for (int64_t t = 0; t < count; ++t)
#pragma omp simd
      for (int64_t i = 0; i < 2 * d; ++i) gbias[i] += acts[t * 2 * d + i];
    const T* back = gate_t.data() + l * taps * 2 * d;  // [2D, taps]
    for (int64_t i = 0; i < net.width; ++i) {
      const int64_t shift = (net.width - 1 - i) * net.dilation[l];
      add_product<T>(r, 2 * d, count, kept.row(net, b, l, first + i * net.dilation[l]), 1, r, acts, 2 * d,
                     of_gate + i * r * 2 * d, 2 * d);
      // to the steps from first - shift on; what lies before the first is constant, and the ring has an end
      for (int64_t t = std::max<int64_t>(0, shift - first); t < count;) {
        const int64_t target = first - shift + t, ring_rows = rings.rows[l];
        const int64_t some = std::min(count - t, ring_rows - target % ring_rows);
        add_product<T>(some, r, 2 * d, acts + t * 2 * d, 2 * d, 1, back + i * r, taps, rings.row(lane, l, target), r);
        t += some;
      }
    }
    if (of_context) {
      add_product<T>(c, 2 * d, count, of_context, 1, c, acts, 2 * d, of_gate + net.width * r * 2 * d, 2 * d);
      if (to.context)
        add_product<T>(count, c, 2 * d, acts, 2 * d, 1, back + net.width * r, taps,
                       to.context + (b * steps + first) * c, c);
    }
    T* own = rings.row(lane, l, first);
    for (int64_t i = 0; i < count * r; ++i) own[i] += gh[i];
    if (ring) std::fill_n(ring, count * r, T(0));
    if (l == 0) {
      std::copy_n(own, count * r, to.x + (b * steps + first) * r);
      std::fill_n(own, count * r, T(0));
    }
  });
  parallel_for((size + kTile - 1) / kTile, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kTile; i < std::min(size, end * kTile); ++i) {
      T sum = T(0);
      for (int64_t lane = 0; lane < lanes; ++lane) sum += sums[lane * size + i];
      if (i < sizes[0])
        to.gate[i] = sum;
      else if (i < sizes[0] + sizes[1])
        to.residual[i - sizes[0]] = sum;
      else
        to.skip[i - sizes[0] - sizes[1]] = sum;
    }
  });
}

// --- what Python sees ---------------------------------------------------------------------------------
// x [B, T, R], context [B, T, Cc], past [B, P, R]; kept [B, P + L T, R]; out [B, T, R], sum of the skips [B, T, S]

void wavenet_fwd(const View& x, const View& gate, const View& bias, const View& residual, const View& skip,
                 const View& context, const View& past, const std::vector<int64_t>& dilations, const View& kept,
                 const View& out, const View& sum) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t samples = x.size[0], steps = x.size[1], channels = x.size[2],
                  features = context ? context.size[2] : 0;
    const Layers<T> net(samples, channels, features, gate, bias, residual, skip, dilations);
    const int64_t rows = net.past + net.depth * steps;
    if (x.stride[2] != 1) throw std::invalid_argument("x: expected dense rows");
    forward(net, x, dense<T>(context, samples, steps, features, "context"),
            dense<T>(past, samples, net.past, channels, "past"),
            Kept<T>{dense<T>(kept, samples, rows, channels, "kept"), steps, rows},
            dense<T>(out, samples, steps, channels, "out"), dense<T>(sum, samples, steps, net.skipped, "sum"));
  });
}

void wavenet_bwd(const View& kept, const View& gate, const View& bias, const View& residual, const View& skip,
                 const View& context, const std::vector<int64_t>& dilations, const View& gout, const View& gsum,
                 const View& gx, const View& ggate, const View& gbias, const View& gresidual, const View& gskip,
                 const View& gcontext) {
  with_accumulator(kept.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t samples = gx.size[0], steps = gx.size[1], channels = gx.size[2];
    const int64_t features = context ? context.size[2] : 0;
    const Layers<T> net(samples, channels, features, gate, bias, residual, skip, dilations);
    const int64_t rows = net.past + net.depth * steps, taps = net.width * channels + features;
    const Gradients<T> to = {dense<T>(gx, samples, steps, channels, "gx"),
                             dense<T>(ggate, net.depth, taps, 2 * net.gated, "ggate"),
                             dense<T>(gbias, net.depth, samples, 2 * net.gated, "gbias"),
                             dense<T>(gresidual, net.depth, net.gated + 1, channels, "gresidual"),
                             dense<T>(gskip, net.depth, net.gated + 1, net.skipped, "gskip"),
                             dense<T>(gcontext, samples, steps, features, "gcontext")};
    backward(net, Kept<T>{dense<T>(kept, samples, rows, channels, "kept"), steps, rows},
             dense<T>(context, samples, steps, features, "context"), dense<T>(gout, samples, steps, channels, "gout"),
             dense<T>(gsum, samples, steps, net.skipped, "gsum"), to);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(wavenet) {
  using namespace fastflow;
  namespace py = pybind11;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("wavenet_fwd", &wavenet_fwd, release);
  m.def("wavenet_bwd", &wavenet_bwd, release);
}
