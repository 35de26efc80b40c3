// The inverse of an autoregressive layer in one sweep on a GPU, and the reverse of that sweep: a block takes a few
// samples through all degrees, a warp a unit at a time. Values lie in scratch, [units, kSamples] for every block.
// Units are sorted by degree, so what a unit sees are the first values of the layer before. In the reverse sweep all
// is counted from its end (strides are then negative), which makes it the same sweep.
// The arguments are packed by fastflow/ops/cuda/autoregressive.py.
#include "../autoregressive.h"
#include "../masked.h"
#include "walk.cuh"

namespace fastflow {

constexpr int kSamples = 8;  // of a block
constexpr int kMost = 32;    // layers, that of the outputs counted
constexpr int kTeam = 128;   // threads of a block

struct SweepLayer {
  char* weight;
  int64_t row, column, rows;
  char* start;  // none: 0
  int64_t start_sample, start_unit;
  int64_t offset;  // of its values in scratch
  int64_t saved;   // its first row there
};

struct SweepNet {
  int64_t samples, steps, in_each, out_each, hidden, activation, residual, scratch_rows;
  char* counts;  // [hidden, steps + 1] of the network, whichever the direction
  int64_t counts_row, counts_column;
  char* direct;
  int64_t direct_row, direct_column;
  char *saved, *values, *sums;
  SweepLayer layers[kMost];
};

struct SweepStep {
  int64_t form, shift, kind;
  double sign;
  Map map;
};

template <class F>
FF_HD void with_unit(int64_t kind, const F& f) {
  with_number<int(Unit::linear), int(Unit::relu), int(Unit::tanh), int(Unit::softplus), int(Unit::elu),
              int(Unit::silu)>(int(kind), f);
}

// A network on its way through the degrees, seen from one block.
template <class T, bool mirrored>
struct SweepBlock {
  const SweepNet& net;
  T *values, *sums;
  int64_t first;  // sample
  int warp, lane;

  FF_D explicit SweepBlock(const SweepNet& n)
      : net(n), first(int64_t(blockIdx.x) * kSamples), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    const int64_t mine = int64_t(blockIdx.x) * n.scratch_rows * kSamples;
    values = reinterpret_cast<T*>(n.values) + mine;
    sums = n.sums ? reinterpret_cast<T*>(n.sums) + mine : values;
  }

  // how many of the inputs (l = 0) or of hidden layer l - 1 are known after step d
  FF_D int64_t known(int64_t l, int64_t d) const {
    if (l == 0) return net.in_each * d;
    const int64_t* counts = reinterpret_cast<const int64_t*>(net.counts);
    if constexpr (!mirrored) return counts[(l - 1) * net.counts_row + d * net.counts_column];
    const int64_t unknown =
        d < net.steps ? counts[(net.hidden - l) * net.counts_row + (net.steps - d - 1) * net.counts_column] : 0;
    return net.layers[l - 1].rows - unknown;
  }

  FF_D const T* input(int64_t l) const { return values + (l == 0 ? 0 : net.layers[l - 1].offset * kSamples); }

  FF_D void multiply(T (&sum)[kSamples], const T* weight, int64_t column, int64_t count, const T* in) const {
    for (int64_t k = lane; k < count; k += 32) {
      const T w = weight[k * column];
#pragma unroll
      for (int s = 0; s < kSamples; ++s) sum[s] += w * in[k * kSamples + s];
    }
  }

  // finish(row, s, sum) for the rows [begin, end) of layer l, of whose inputs `count` are known
  template <class F>
  FF_D void rows(int64_t l, int64_t begin, int64_t end, int64_t count, int64_t direct, const F& finish) const {
    const SweepLayer& layer = net.layers[l];
    for (int64_t i = begin + warp; i < end; i += kTeam / 32) {
      T sum[kSamples] = {};
      multiply(sum, reinterpret_cast<const T*>(layer.weight) + i * layer.row, layer.column, count, input(l));
      if (net.direct)
        multiply(sum, reinterpret_cast<const T*>(net.direct) + i * net.direct_row, net.direct_column, direct, values);
      double total = 0;
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        const double found = warp_sum(double(sum[s]));
        total = lane == s ? found : total;
      }
      if (lane < kSamples && first + lane < net.samples) {
        if (layer.start)
          total += double(
              reinterpret_cast<const T*>(layer.start)[(first + lane) * layer.start_sample + i * layer.start_unit]);
        finish(i, lane, T(total));
      }
    }
  }

  // element(step, s, the outputs of that step) makes the inputs; unit(l, row, s, sum) a hidden value
  template <class E, class U>
  FF_D void run(const E& element, const U& unit) const {
    const SweepLayer& last = net.layers[net.hidden];
    T* const outputs = values + last.offset * kSamples;
    for (int64_t d = 0; d <= net.steps; ++d) {
      if (d > 0) {
        const int64_t row = (d - 1) * net.out_each;
        rows(net.hidden, row, row + net.out_each, known(net.hidden, d - 1), known(0, d - 1),
             [&](int64_t i, int s, T sum) { outputs[i * kSamples + s] = sum; });
        __syncthreads();
        if (threadIdx.x < kSamples && first + threadIdx.x < net.samples)
          element(d - 1, int(threadIdx.x), outputs + row * kSamples + threadIdx.x);
        __syncthreads();
      }
      for (int64_t l = 0; l < net.hidden; ++l) {
        const int64_t begin = d > 0 ? known(1 + l, d - 1) : 0, end = known(1 + l, d);
        if (begin == end) continue;  // the same for all threads
        rows(l, begin, end, known(l, d), 0, [&](int64_t i, int s, T sum) { unit(l, i, s, sum); });
        __syncthreads();
      }
    }
  }
};

struct SweepForward {
  SweepNet net;
  SweepStep step;
  Matrix z, x, params;
  char* logdet;
};

// f(Constant<form>, Constant<kind>) of an affine form
template <class F>
FF_HD void with_step(const SweepStep& step, const F& f) {
  if (step.form == kGate) return f(Constant<kGate>(), Constant<kSigmoid>());
  with_kind(step.kind, [&](auto kind) {
    step.form == kScaleFirst ? f(Constant<kScaleFirst>(), kind) : f(Constant<kShiftFirst>(), kind);
  });
}

template <class T>
FF_D void autoregressive_fwd(const SweepForward& a) {
  const SweepBlock<T, false> block(a.net);
  const SweepNet& net = a.net;
  const auto c = a.step.map.template constants<T>();
  double total = 0;
  block.run(
      [&](int64_t d, int s, const T* outputs) {
        const int64_t sample = block.first + s;
        const T z = a.z.template at<T>(sample, d), t = outputs[a.step.shift * kSamples];
        Solved<T> found;
        if (a.step.form == kBernoulli)
          found = solve<kBernoulli, kNone>(z, t, T(0), T(0), c);
        else
          with_step(a.step, [&](auto form, auto kind) {
            found = solve<decltype(form)::value, decltype(kind)::value>(z, t, outputs[(1 - a.step.shift) * kSamples],
                                                                        T(a.step.sign), c);
          });
        block.values[d * kSamples + s] = found.x;
        a.x.template at<T>(sample, d) = found.x;
        total += double(found.logdet);
        if (a.params.data)
          for (int64_t i = 0; i < net.out_each; ++i)
            a.params.template at<T>(d * net.out_each + i, sample) = outputs[i * kSamples];
      },
      [&](int64_t l, int64_t i, int s, T sum) {
        const SweepLayer& layer = net.layers[l];
        const int64_t at = (layer.offset + i) * kSamples + s;
        if (net.residual && l >= 2 && l % 2 == 0) sum += block.sums[(net.layers[l - 2].offset + i) * kSamples + s];
        if (net.saved) reinterpret_cast<T*>(net.saved)[(layer.saved + i) * net.samples + block.first + s] = sum;
        if (net.sums) block.sums[at] = sum;
        with_unit(net.residual && l == net.hidden - 1 ? int64_t(Unit::linear) : net.activation,
                  [&](auto kind) { block.values[at] = unit<Unit(decltype(kind)::value)>(sum).y; });
      });
  if (threadIdx.x < kSamples && block.first + threadIdx.x < net.samples)
    reinterpret_cast<T*>(a.logdet)[block.first + threadIdx.x] = T(total);
}

struct SweepBackward {
  SweepNet net;
  SweepStep step;
  Matrix x, z, params, gx, gz, gparams, ga;  // params, gparams and ga are [rows, B]
  char* glogdet;
  int64_t glogdet_stride;
};

template <class T>
FF_D void autoregressive_bwd(const SweepBackward& a) {
  const SweepBlock<T, true> block(a.net);
  const SweepNet& net = a.net;
  const auto c = a.step.map.template constants<T>();
  const int64_t each = net.in_each;
  block.run(
      [&](int64_t step, int s, const T* outputs) {
        const int64_t sample = block.first + s, d = net.steps - 1 - step;
        const int64_t shift = d * each + a.step.shift, raw = d * each + 1 - a.step.shift;
        const T gx = a.gx.template at<T>(sample, d) + outputs[0];
        const T glogdet = reinterpret_cast<const T*>(a.glogdet)[sample * a.glogdet_stride];
        SolvedGrad<T> g;
        with_step(a.step, [&](auto form, auto kind) {
          g = solve_grad<decltype(form)::value, decltype(kind)::value>(
              a.x.template at<T>(sample, d), a.z.template at<T>(sample, d), a.params.template at<T>(shift, sample),
              a.params.template at<T>(raw, sample), gx, glogdet, T(a.step.sign), c);
        });
        a.gz.template at<T>(sample, d) = g.gz;
        a.gparams.template at<T>(shift, sample) = g.gt;
        a.gparams.template at<T>(raw, sample) = g.gh;
        const int64_t last = net.steps * each - 1;  // counted from the end
        block.values[(last - shift) * kSamples + s] = g.gt;
        block.values[(last - raw) * kSamples + s] = g.gh;
      },
      [&](int64_t l, int64_t i, int s, T sum) {
        const SweepLayer& layer = net.layers[l];
        const int64_t of = net.hidden - 1 - l, row = layer.saved + layer.rows - 1 - i, sample = block.first + s;
        const T kept = reinterpret_cast<const T*>(net.saved)[row * net.samples + sample];
        with_unit(net.residual && of == net.hidden - 1 ? int64_t(Unit::linear) : net.activation,
                  [&](auto kind) { sum *= unit<Unit(decltype(kind)::value)>(kept).d; });
        if (net.residual && of % 2 == 0 && of + 2 < net.hidden)
          sum += block.values[(net.layers[l - 2].offset + i) * kSamples + s];
        block.values[(layer.offset + i) * kSamples + s] = sum;
        a.ga.template at<T>(row, sample) = sum;
      });
}

}  // namespace fastflow
