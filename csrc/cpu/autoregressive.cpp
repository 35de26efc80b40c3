// The inverse of an autoregressive layer in one sweep over its masked network, and the reverse of that sweep.
//
// Degrees go in groups. On entry to a group all its sums get, in one product a layer, what is known by then; inside,
// degree by degree, only the few units of the group itself are missing. Left-looking: a weight is read once.
#include "../autoregressive.h"

#include <pybind11/stl.h>

#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "scale_map.h"
#include "staircase.h"

namespace fastflow {
namespace {

constexpr int64_t kGroupDegrees = 32, kGroupUnits = 64;

// --- the structure of a sweep -----------------------------------------------------------------------

template <class T>
struct Sweep {
  std::vector<Stairs<T>> layers;
  Stairs<T> direct;
  std::vector<std::vector<int64_t>> counts;  // of the inputs and every hidden layer: how many are known after step d
  int64_t each;                              // outputs of a step
  int64_t steps() const { return static_cast<int64_t>(counts[0].size()) - 1; }
  int64_t hidden() const { return static_cast<int64_t>(layers.size()) - 1; }

  Sweep() = default;
  Sweep(const std::vector<View>& weights, const View& degrees, const View& direct_weight, int64_t outputs)
      : each(outputs) {
    const int64_t n = degrees.size[1] - 1;
    if (weights.empty() || degrees.size[0] != static_cast<int64_t>(weights.size()) - 1 || n != weights[0].size[1])
      throw std::invalid_argument("counts do not go with the weights");
    counts.emplace_back(n + 1);
    for (int64_t d = 0; d <= n; ++d) counts[0][d] = d;
    for (size_t l = 0; l < weights.size(); ++l) {
      layers.push_back(plain(weights[l]));
      if (l > 0 && layers[l].columns != layers[l - 1].rows) throw std::invalid_argument("weights do not follow");
      if (l == weights.size() - 1) break;
      auto& count = counts.emplace_back(n + 1);
      for (int64_t d = 0; d <= n; ++d) {
        count[d] = at<int64_t>(degrees, l, d);
        if (count[d] < (d > 0 ? count[d - 1] : 0))
          throw std::invalid_argument("counts: expected numbers that do not decrease");
      }
      if (count[n] != layers[l].rows) throw std::invalid_argument("counts: expected the width of the layer at last");
    }
    if (layers.back().rows != n * each) throw std::invalid_argument("weights: an unexpected number of outputs");
    if (!direct_weight) return;
    direct = plain(direct_weight);
    if (direct.rows != n * each || direct.columns != n) throw std::invalid_argument("the direct weight does not match");
  }

  // The sweep in which gradients come back: from the last variable to the first, from the outputs to the inputs, units
  // counted from the end.
  Sweep mirrored() const {
    Sweep m;
    const int64_t n = steps();
    m.each = 1;
    m.counts.emplace_back(n + 1);
    for (int64_t d = 0; d <= n; ++d) m.counts[0][d] = each * d;
    for (int64_t l = hidden(); l >= 0; --l) {
      m.layers.push_back(layers[l].mirrored());
      if (l == 0) break;
      auto& count = m.counts.emplace_back(n + 1);
      for (int64_t d = 0; d <= n; ++d) count[d] = layers[l - 1].rows - (d < n ? counts[l][n - d - 1] : 0);
    }
    if (direct.data) m.direct = direct.mirrored();
    return m;
  }

 private:
  static Stairs<T> plain(const View& weight) {  // the counts say what a row reaches
    Stairs<T> s;
    s.data = reinterpret_cast<const T*>(weight.data);
    s.rows = weight.size[0], s.columns = weight.size[1], s.row = weight.stride[0], s.column = weight.stride[1];
    return s;
  }
};

// values[0] are the inputs, values[1 + l] what hidden layer l gives on, sums[l] what enters it; [units, width] all.
// start(l, first, last) begins the sums of rows, those of the outputs for l = hidden(); element(d) makes the inputs of
// step d from the outputs; unit(l, first, last) finishes hidden units.
template <class T, class Start, class Element, class UnitOf>
void run(const Sweep<T>& s, const std::vector<T*>& values, const std::vector<T*>& sums, int64_t width,
         const Start& start, const Element& element, const UnitOf& unit_of) {
  const int64_t steps = s.steps(), hidden = s.hidden(), each = s.each;
  T* const out = sums[hidden];
  const auto begin_units = [&](int64_t l, int64_t first, int64_t last, int64_t known) {
    start(l, first, last);
    add_rectangle(s.layers[l], first, last, 0, known, values[l], sums[l], width);
  };
  for (int64_t l = 0; l < hidden; ++l) {  // units that know nothing, or only those
    begin_units(l, 0, s.counts[1 + l][0], s.counts[l][0]);
    unit_of(l, 0, s.counts[1 + l][0]);
  }
  for (int64_t begin = 1, end; begin <= steps; begin = end) {
    const auto fits = [&](int64_t d) {
      if (d - begin >= kGroupDegrees) return false;
      for (int64_t l = 0; l <= hidden; ++l)
        if (s.counts[l][d] - s.counts[l][begin - 1] > kGroupUnits) return false;
      return true;
    };
    for (end = begin + 1; end <= steps && fits(end); ++end);
    const auto known = [&](int64_t l) { return s.counts[l][begin - 1]; };
    begin_units(hidden, (begin - 1) * each, (end - 1) * each, known(hidden));
    if (s.direct.data)
      add_rectangle(s.direct, (begin - 1) * each, (end - 1) * each, 0, known(0), values[0], out, width);
    for (int64_t l = 0; l < hidden; ++l) begin_units(l, known(1 + l), s.counts[1 + l][end - 1], known(l));
    for (int64_t d = begin; d < end; ++d) {
      const int64_t row = (d - 1) * each;
      add_rectangle(s.layers[hidden], row, row + each, known(hidden), s.counts[hidden][d - 1], values[hidden], out,
                    width);
      if (s.direct.data) add_rectangle(s.direct, row, row + each, known(0), s.counts[0][d - 1], values[0], out, width);
      element(d - 1);
      for (int64_t l = 0; l < hidden; ++l) {
        const int64_t first = s.counts[1 + l][d - 1], last = s.counts[1 + l][d];
        add_rectangle(s.layers[l], first, last, known(l), s.counts[l][d], values[l], sums[l], width);
        if (first < last) unit_of(l, first, last);
      }
    }
  }
}

// --- one variable -----------------------------------------------------------------------------------

template <class T>
struct Rows {  // of one variable: a value for each of `width` samples
  const T *z, *t, *h;
  T* x;
  double* logdet;
};

template <class T>
struct GradRows {
  const T *x, *z, *t, *h, *gx, *glogdet;
  T *gz, *gt, *gh;
};

template <class T>
struct StepOf {
  void (*solve)(int64_t, const Rows<T>&, T, MapConstants<T>);
  void (*grad)(int64_t, const GradRows<T>&, T, MapConstants<T>);
};

template <int form, int kind, class T>
void solve_rows(int64_t width, const Rows<T>& r, T sign, MapConstants<T> c) {
  const T *z = r.z, *t = r.t, *h = r.h;
  T* x = r.x;
  double* logdet = r.logdet;
#pragma omp simd
  for (int64_t b = 0; b < width; ++b) {
    const Solved<T> found = solve<form, kind>(z[b], t[b], h[b], sign, c);
    x[b] = found.x;
    logdet[b] += double(found.logdet);
  }
}

template <int form, int kind, class T>
void grad_rows(int64_t width, const GradRows<T>& r, T sign, MapConstants<T> c) {
  const T *x = r.x, *z = r.z, *t = r.t, *h = r.h, *gx = r.gx, *glogdet = r.glogdet;
  T *gz = r.gz, *gt = r.gt, *gh = r.gh;
#pragma omp simd
  for (int64_t b = 0; b < width; ++b) {
    const SolvedGrad<T> g = solve_grad<form, kind>(x[b], z[b], t[b], h[b], gx[b], glogdet[b], sign, c);
    gz[b] = g.gz, gt[b] = g.gt, gh[b] = g.gh;
  }
}

template <class T>
StepOf<T> step_of(int form, int kind) {
  StepOf<T> step{};
  if (form == kBernoulli) return {&solve_rows<kBernoulli, kNone, T>, nullptr};
  if (form == kGate) return {&solve_rows<kGate, kSigmoid, T>, &grad_rows<kGate, kSigmoid, T>};
  with_kind(kind, [&](auto k) {
    if (form == kScaleFirst)
      step = {&solve_rows<kScaleFirst, k(), T>, &grad_rows<kScaleFirst, k(), T>};
    else
      step = {&solve_rows<kShiftFirst, k(), T>, &grad_rows<kShiftFirst, k(), T>};
  });
  return step;
}

struct Step {
  int form;
  bool swapped;
  int kind;
  bool reciprocal;
  PackedMap constants;

  int64_t each() const { return form == kBernoulli ? 1 : 2; }
  int64_t shift() const { return form != kBernoulli && swapped ? 1 : 0; }
  int64_t raw() const { return form == kBernoulli || swapped ? 0 : 1; }
};

// --- both directions --------------------------------------------------------------------------------

// Memory for the values and sums of a block: they share it unless a residual needs both.
template <class T>
struct Block {
  std::vector<T> memory;
  std::vector<T*> values, sums;

  Block(const Sweep<T>& s, int64_t width, bool apart) {
    int64_t size = s.counts[0].back() + s.steps() * s.each;
    for (int64_t l = 0; l < s.hidden(); ++l) size += (1 + apart) * s.layers[l].rows;
    memory.resize(size * width);
    T* next = memory.data();
    const auto take = [&](int64_t rows) {
      T* const mine = next;
      next += rows * width;
      return mine;
    };
    values.push_back(take(s.counts[0].back()));
    for (int64_t l = 0; l < s.hidden(); ++l) {
      values.push_back(take(s.layers[l].rows));
      sums.push_back(apart ? take(s.layers[l].rows) : values.back());
    }
    sums.push_back(take(s.steps() * s.each));
  }
};

template <class T>
int64_t work_of(const Sweep<T>& s) {
  int64_t work = 0;
  for (const auto& layer : s.layers) work += layer.rows * layer.columns;
  return work;
}

template <class T>
void inverse(const Sweep<T>& s, const Hidden& net, const Step& step, const View& z, const std::vector<View>& starts,
             const View& x, const View& logdet, const View& saved, const View& params) {
  const StepOf<T> functions = step_of<T>(step.form, resolve(step.kind, step.constants[3]));
  const MapConstants<T> constants = map_constants<T>(step.constants);
  const T sign = step.reciprocal ? T(1) : T(-1);
  std::vector<int64_t> offset(1, 0);
  for (int64_t l = 0; l < s.hidden(); ++l) offset.push_back(offset.back() + s.layers[l].rows);
  each_block(z.size[0], work_of(s), [&](int64_t first, int64_t count, int64_t width) {
    Block<T> block(s, width, net.residual);
    std::vector<T> given(s.steps() * width);
    std::vector<double> total(width);
    load(z, first, count, width, false, given.data());
    T* const out = block.sums.back();
    run(
        s, block.values, block.sums, width,
        [&](int64_t l, int64_t from, int64_t to) {
          fill_start(start_of(starts[l], s.layers[l].rows), first, count, width, from, to, block.sums[l]);
        },
        [&](int64_t d) {
          const T* row = out + d * s.each * width;
          functions.solve(width,
                          {given.data() + d * width, row + step.shift() * width, row + step.raw() * width,
                           block.values[0] + d * width, total.data()},
                          sign, constants);
        },
        [&](int64_t l, int64_t from, int64_t to) {
          const int64_t size = (to - from) * width;
          T* const sum = block.sums[l] + from * width;
          if (net.joins(l)) add_to(sum, block.sums[l - 2] + from * width, size);
          if (saved) store(sum, turned(rows_of(saved, offset[l] + from, to - from)), first, count, width, false);
          with_unit(net.of(l), [&](auto kind) { apply<kind()>(sum, block.values[1 + l] + from * width, size); });
        });
    store(block.values[0], x, first, count, width, false);
    for (int64_t b = 0; b < count; ++b) at<T>(logdet, first + b) = T(total[b]);
    if (params) store(out, turned(params), first, count, width, false);
  });
}

template <class T>
void inverse_grad(const Sweep<T>& s, const Hidden& net, const Step& step, const View& x, const View& z,
                  const View& saved, const View& params, const View& gx, const View& glogdet, const View& gz,
                  const View& ga, const View& gparams) {
  const StepOf<T> functions = step_of<T>(step.form, resolve(step.kind, step.constants[3]));
  if (!functions.grad) throw std::invalid_argument("this form has no gradient");
  const MapConstants<T> constants = map_constants<T>(step.constants);
  const T sign = step.reciprocal ? T(1) : T(-1);
  const int64_t n = s.steps(), hidden = s.hidden(), each = step.each();
  std::vector<int64_t> offset(1, 0);
  for (int64_t l = 0; l < hidden; ++l) offset.push_back(offset.back() + s.layers[l].rows);
  const Sweep<T> back = s.mirrored();
  each_block(x.size[0], work_of(s), [&](int64_t first, int64_t count, int64_t width) {
    Block<T> block(back, width, false);
    // rows of the variables and their parameters as they come, of units from the end
    std::vector<T> memory((4 * n + n * each + offset.back() + 1) * width);
    T *const xs = memory.data(), *const zs = xs + n * width, *const gxs = zs + n * width, *const gzs = gxs + n * width;
    T *const p = gzs + n * width, *const kept = p + n * each * width, *const gl = kept + offset.back() * width;
    load(x, first, count, width, false, xs);
    load(z, first, count, width, false, zs);
    load(gx, first, count, width, false, gxs);
    load(turned(params), first, count, width, false, p);
    load(turned(saved), first, count, width, true, kept);  // also turns round the layers
    for (int64_t b = 0; b < width; ++b) gl[b] = b < count ? at<T>(glogdet, first + b) : T(0);
    T *const out = block.sums.back(), *const in = block.values[0];
    const auto forward = [&](int64_t l) { return hidden - 1 - l; };
    const auto kept_of = [&](int64_t l) { return kept + (offset.back() - offset[forward(l) + 1]) * width; };
    run(
        back, block.values, block.sums, width,
        [&](int64_t l, int64_t from, int64_t to) {
          std::fill(block.sums[l] + from * width, block.sums[l] + to * width, T(0));
        },
        [&](int64_t step_of) {
          const int64_t d = n - 1 - step_of;
          add_to(gxs + d * width, out + step_of * width, width);
          T* const g = in + step_of * each * width;  // the parameters of a variable, too, from the last to the first
          const T* const row = p + d * each * width;
          functions.grad(
              width,
              {xs + d * width, zs + d * width, row + step.shift() * width, row + step.raw() * width, gxs + d * width,
               gl, gzs + d * width, g + (each - 1 - step.shift()) * width, g + (each - 1 - step.raw()) * width},
              sign, constants);
        },
        [&](int64_t l, int64_t from, int64_t to) {
          const int64_t size = (to - from) * width, of = forward(l);
          T* const g = block.values[1 + l] + from * width;
          with_unit(net.of(of), [&](auto kind) { apply_slope<kind()>(kept_of(l) + from * width, g, size); });
          if (net.joins(of + 2)) add_to(g, block.values[1 + l - 2] + from * width, size);
        });
    store(gzs, gz, first, count, width, false);
    store(in, turned(gparams), first, count, width, true);
    for (int64_t l = 0; l < hidden; ++l)
      store(block.values[1 + l], turned(rows_of(ga, offset[forward(l)], back.layers[l].rows)), first, count, width,
            true);
  });
}

// --- what Python sees -------------------------------------------------------------------------------
// z, x [B, D], starts [m] or [B, m], counts [L, D + 1], logdet [B], saved and ga [units, B], params [outputs, B]

void autoregressive_fwd(const View& z, const std::vector<View>& weights, const std::vector<View>& starts,
                        const View& counts, const View& direct, int activation, bool residual, int form, bool swapped,
                        int kind, bool reciprocal, const PackedMap& constants, const View& x, const View& logdet,
                        const View& saved, const View& params) {
  const Step step{form, swapped, kind, reciprocal, constants};
  const Hidden net{static_cast<int64_t>(weights.size()) - 1, activation, residual};
  with_accumulator(z.dtype, [&](auto type) {
    using T = decltype(type);
    inverse(Sweep<T>(weights, counts, direct, step.each()), net, step, z, starts, x, logdet, saved, params);
  });
}

void autoregressive_bwd(const View& x, const View& z, const std::vector<View>& weights, const View& counts,
                        const View& direct, int activation, bool residual, int form, bool swapped, int kind,
                        bool reciprocal, const PackedMap& constants, const View& saved, const View& params,
                        const View& gx, const View& glogdet, const View& gz, const View& ga, const View& gparams) {
  const Step step{form, swapped, kind, reciprocal, constants};
  const Hidden net{static_cast<int64_t>(weights.size()) - 1, activation, residual};
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    inverse_grad(Sweep<T>(weights, counts, direct, step.each()), net, step, x, z, saved, params, gx, glogdet, gz, ga,
                 gparams);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(autoregressive) {
  using namespace fastflow;
  namespace py = pybind11;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("autoregressive_fwd", &autoregressive_fwd, release);
  m.def("autoregressive_bwd", &autoregressive_bwd, release);
}
