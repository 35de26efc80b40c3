// Stacks of MLP couplings: value and log-determinant in one pass, all gradients in another that evaluates every network
// once more. A task has some samples and takes them through the stack step by step, so that the weights of one network
// and their gradients stay in L1 and L2; what passes from step to step are the D features of a sample.
//
// Features are rows: [D, samples], blocks of 64 samples. Products are then W [m, n] times [n, 64 samples], with W read
// in place, and W^T times gradients, the same with strides exchanged; only the gradient of W needs a transposed
// operand. Bound by the rate of multiply-adds.
#include "../mlp_coupling.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../coupling.h"
#include "module.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"
#include "scale_map.h"
#include "transpose.h"
#include "view.h"

namespace fastflow {
namespace {

constexpr int64_t kSamples = 64;               // of a block
constexpr int64_t kPass = 1024;                // samples that a forward takes through all steps together
constexpr int64_t kChunks = 16;                // partial sums of the parameters' gradients, at most
constexpr int64_t kNarrow = 4;                 // rows of a gradient of W that are summed as dot products
constexpr int64_t kParallelWork = 128 * 1024;  // multiply-adds below which a second thread costs more than it gives

// --- parameters ---------------------------------------------------------------------------------------------

// A contiguous tensor; there are so many of them that what View asks of each would take as long as a small batch.
struct Parameter {
  void* data;
  int64_t numbers;
};

std::vector<Parameter> parameters(const pybind11::sequence& tensors, const View& like) {
  static PyObject* names[5] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("numel"),
                               PyUnicode_InternFromString("is_contiguous"), PyUnicode_InternFromString("dtype"),
                               PyUnicode_InternFromString("is_cpu")};
  const auto check = [](PyObject* object) {
    if (!object) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(object);
  };
  std::vector<Parameter> found;
  for (const pybind11::handle tensor : tensors) {
    PyObject* t = tensor.ptr();
    const auto dtype = check(PyObject_GetAttr(t, names[3]));
    const bool cpu = check(PyObject_GetAttr(t, names[4])).ptr() == Py_True;
    const bool contiguous = check(PyObject_CallMethodNoArgs(t, names[2])).ptr() == Py_True;
    if (!cpu || !contiguous || dtype.ptr() != dtype_objects[int(like.dtype)])
      throw std::invalid_argument("parameter " + std::to_string(found.size()) +
                                  " of a stack: expected a contiguous tensor of the dtype of x on the CPU");
    const auto pointer = check(PyObject_CallMethodNoArgs(t, names[0])),
               n = check(PyObject_CallMethodNoArgs(t, names[1]));
    found.push_back({reinterpret_cast<void*>(PyLong_AsSize_t(pointer.ptr())), PyLong_AsLongLong(n.ptr())});
  }
  return found;
}

// --- the stack, as MLPStack.code in fastflow/ops/mlp_stack.py has it ------------------------------------

template <class T>
struct Linear {
  int64_t in, out;
  const T *weight, *bias;  // [out, in], [out]
  int64_t gweight, gbias;  // where their gradients lie among those of all parameters
  int64_t numbers() const { return out * in + out; }
};

template <class T>
struct Network {
  std::vector<Linear<T>> layers;
  int64_t first_output;  // among those of the coupling's networks
};

template <class T>
struct Step {
  bool coupling = false;
  // ActNorm
  std::vector<int64_t> rows;  // where feature i lies
  const T *log_scale = nullptr, *bias = nullptr;
  int64_t glog_scale = 0, gbias = 0;
  T gain = T(1);
  // coupling
  std::vector<int64_t> inputs;               // rows that the networks see, -1 for zeros
  std::vector<int64_t> changed, shift, raw;  // rows that change; outputs that hold their parameters
  std::vector<Network<T>> networks;
  int64_t outputs = 0;
  HiddenKind activation = HiddenKind::relu;
  T leak = T(0);
  int kind = kNone;
  bool add_first = false, divide = false;
  PackedMap map{};
  double shift_gain = 1;
  const T* amplitude = nullptr;  // [1] or [changed], where it is learned
  int64_t amplitudes = 0, gamplitude = 0;

  T amplitude_of(int64_t j, const MapConstants<T>& c) const {
    return amplitude ? amplitude[amplitudes == 1 ? 0 : j] : c.amplitude;
  }
  // how x becomes y in this direction; the other direction is the other form with -g and 1 / m
  CouplingConstants<T> constants(bool inverse) const {
    return {T(inverse ? -shift_gain : shift_gain), T(divide != inverse ? -1 : 1), map_constants<T>(map)};
  }
};

template <class T>
struct Stack {
  int64_t features, context, parameters = 0, work = 0;         // numbers in all parameters; multiply-adds of a sample
  int64_t widest = 1, hidden = 0, outputs = 1, couplings = 0;  // hidden: rows of all hidden layers of a coupling
  std::vector<int64_t> end;                                    // where feature i lies behind the last step
  std::vector<Step<T>> steps;

  Stack(const std::vector<Parameter>& params, const std::vector<int64_t>& code, const std::vector<double>& constants) {
    size_t at = 0, constant = 0, param = 0;
    const auto take = [&] {
      if (at >= code.size()) throw std::invalid_argument("the code of a stack ends too early");
      return code[at++];
    };
    const auto number = [&] {
      if (constant >= constants.size()) throw std::invalid_argument("the constants of a stack end too early");
      return constants[constant++];
    };
    const auto list = [&](int64_t n, int64_t low, int64_t high) {
      std::vector<int64_t> values(std::max<int64_t>(0, n));
      for (int64_t& v : values) {
        v = take();
        if (v < low || v >= high) throw std::invalid_argument("an index of a stack reaches outside of it");
      }
      return values;
    };
    const auto tensor = [&](int64_t rows, int64_t columns, int64_t& offset) {
      if (param >= params.size()) throw std::invalid_argument("a stack has more parameters than were given");
      const Parameter& p = params[param++];
      if (p.numbers != rows * columns)
        throw std::invalid_argument("parameter " + std::to_string(param - 1) + " of a stack has another size");
      offset = parameters;
      parameters += rows * columns;
      return static_cast<const T*>(p.data);
    };
    features = take(), context = take();
    const int64_t count = take();
    end = list(features, 0, features);
    steps.resize(count);
    at += 4 * count;  // where the steps begin: they are read in their order
    for (Step<T>& s : steps) {
      s.coupling = take() == 1;
      if (!s.coupling) {
        s.rows = list(features, 0, features);
        s.gain = T(number());
        s.log_scale = tensor(features, 1, s.glog_scale), s.bias = tensor(features, 1, s.gbias);
        continue;
      }
      ++couplings;
      const int64_t in = take();
      s.inputs = list(in, -1, features);
      const int64_t n = take();
      s.changed = list(n, 0, features);
      s.shift = list(n, 0, INT64_MAX);
      if (take()) s.raw = list(n, 0, INT64_MAX);
      s.networks.resize(take());
      int64_t rows = 0;
      for (Network<T>& net : s.networks) {
        net.first_output = s.outputs;
        net.layers.resize(take());
        int64_t before = in + context;
        for (Linear<T>& l : net.layers) {
          l.in = before, l.out = take();
          l.weight = tensor(l.out, l.in, l.gweight), l.bias = tensor(l.out, 1, l.gbias);
          widest = std::max({widest, l.in, l.out});
          work += l.in * l.out;
          before = l.out;
          if (&l != &net.layers.back()) rows += l.out;
        }
        s.outputs += before;
      }
      hidden = std::max(hidden, rows), outputs = std::max(outputs, s.outputs);
      const int activation = int(take());
      if (activation < 0 || activation > int(HiddenKind::softplus)) throw std::invalid_argument("unknown activation");
      s.activation = HiddenKind(activation);
      s.kind = int(take()), s.add_first = take(), s.divide = take();
      s.amplitudes = take();
      for (double& c : s.map) c = number();
      s.shift_gain = number(), s.leak = T(number());
      s.kind = resolve(s.kind, s.map[3]);
      if (s.raw.empty() != (s.kind == kNone) && n > 0) throw std::invalid_argument("a scale map without raw scales");
      if (s.amplitudes) s.amplitude = tensor(s.amplitudes, 1, s.gamplitude);
      for (const auto* outs : {&s.shift, &s.raw})
        for (int64_t o : *outs)
          if (o >= s.outputs) throw std::invalid_argument("a network of a stack has too few outputs");
    }
    if (param != params.size()) throw std::invalid_argument("a stack has fewer parameters than were given");
  }

  // f(step, number of the coupling) from the input's end to the output's, or back
  template <class F>
  void each(bool inverse, const F& f) const {
    int64_t coupling = inverse ? couplings : 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step<T>& s = steps[inverse ? steps.size() - 1 - i : i];
      if (inverse && s.coupling) --coupling;
      f(s, coupling);
      if (!inverse && s.coupling) ++coupling;
    }
  }
};

template <class F>
void with_hidden(HiddenKind kind, const F& f) {
  switch (kind) {
#define FASTFLOW_HIDDEN(k) \
  case HiddenKind::k:      \
    return f(std::integral_constant<HiddenKind, HiddenKind::k>());
    FASTFLOW_HIDDEN(relu)
    FASTFLOW_HIDDEN(leaky_relu)
    FASTFLOW_HIDDEN(tanh)
    FASTFLOW_HIDDEN(elu)
    FASTFLOW_HIDDEN(silu)
    FASTFLOW_HIDDEN(softplus)
#undef FASTFLOW_HIDDEN
  }
}

// --- rows of samples ------------------------------------------------------------------------------------

// [rows][samples], the last sample again behind the end: padding must not meet numbers that no sample has
template <class T>
void load_rows(const View& v, int64_t first, int64_t count, const int64_t* row_of, int64_t n, T* to) {
  for (int64_t d = 0; d < v.size[1]; ++d) {
    T* row = to + (row_of ? row_of[d] : d) * n;
    for (int64_t i = 0; i < count; ++i) row[i] = at<T>(v, first + i, d);
    std::fill(row + count, row + n, row[count - 1]);
  }
}

// the same with zeros behind the end
template <class T>
void load_grads(const View& v, int64_t first, int64_t count, const int64_t* row_of, int64_t n, T* to) {
  for (int64_t d = 0; d < v.size[1]; ++d) {
    T* row = to + (row_of ? row_of[d] : d) * n;
    for (int64_t i = 0; i < count; ++i) row[i] = at<T>(v, first + i, d);
    std::fill(row + count, row + n, T(0));
  }
}

template <class T>
void store_rows(const T* from, int64_t n, const int64_t* row_of, const View& v, int64_t first, int64_t count) {
  for (int64_t d = 0; d < v.size[1]; ++d) {
    const T* row = from + (row_of ? row_of[d] : d) * n;
    for (int64_t i = 0; i < count; ++i) at<T>(v, first + i, d) = row[i];
  }
}

template <HiddenKind kind, bool slope, class T>
void activate_rows(T* y, T* d, int64_t n, T leak) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Slope<T> f = hidden<kind>(y[i], leak);
    y[i] = f.y;
    if constexpr (slope) d[i] = f.d;
  }
}

// g phi'(a), from what was kept
template <HiddenKind kind, class T>
void slope_rows(const T* kept, T* g, int64_t n, T leak) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (keeps_slope(kind))
      g[i] *= kept[i];
    else
      g[i] *= slope_from_output<kind>(kept[i], leak);
  }
}

template <int kind, bool add_first, class T>
void couple_rows(T* x, const T* t, const T* h, T* logdet, T amplitude, CouplingConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < kSamples; ++i) {
    const CouplingValue<T> v = coupling<kind>(x[i], t[i], h[i], amplitude, c, add_first);
    x[i] = v.y;
    logdet[i] += v.log_m;
  }
}

// x or, from_output, y, which becomes x; g becomes the gradient of x
template <int kind, bool add_first, bool from_output, class T>
void couple_rows_grad(T* value, const T* t, const T* h, T* g, const T* glogdet, T* gt, T* gh, T* gamplitude,
                      T amplitude, CouplingConstants<T> c, CouplingConstants<T> back) {
#pragma omp simd
  for (int64_t i = 0; i < kSamples; ++i) {
    const CouplingGrad<T> r =
        coupling_grad<kind>(value[i], t[i], h[i], amplitude, g[i], glogdet[i], c, add_first, from_output);
    if constexpr (from_output) value[i] = coupling<kind>(value[i], t[i], h[i], amplitude, back, !add_first).y;
    g[i] = r.gx, gt[i] = r.gt, gh[i] = r.gh;
    gamplitude[i] += r.gamplitude;
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

// --- a block of samples through the networks of a coupling ----------------------------------------------

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

  static bool is_narrow(const Linear<T>& l) { return std::min(l.in, l.out) <= kNarrow; }
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
      linear(l, in, out);
      with_hidden(s.activation, [&](auto kind) {
        activate_rows<kind(), keep && keeps_slope(kind())>(out, slopes, l.out * kSamples, s.leak);
      });
      if (keep) hidden += l.out * kSamples, slopes += l.out * kSamples;
      in = out;
    }
  }
}

// f(kind, add_first) with both constants
template <class T, class F>
void with_form(const Step<T>& s, bool inverse, const F& f) {
  with_kind(s.kind, [&](auto kind) { with_bool(s.add_first != inverse, [&](auto add_first) { f(kind, add_first); }); });
}

// --- forward --------------------------------------------------------------------------------------------

template <class T>
void actnorm_rows(const Step<T>& s, bool inverse, T* state, int64_t n) {
  for (size_t d = 0; d < s.rows.size(); ++d) {
    T* row = state + s.rows[d] * n;
    const T a = s.gain * s.log_scale[d], b = s.bias[d], m = exp(inverse ? -a : a);
    if (inverse)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) row[i] = row[i] * m - b;
    else
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) row[i] = (row[i] + b) * m;
  }
}

template <class T>
T actnorm_logdet(const Step<T>& s, bool inverse) {
  double total = 0;
  for (size_t d = 0; d < s.rows.size(); ++d) total += double(s.gain * s.log_scale[d]);
  return T(inverse ? -total : total);
}

template <class T>
void forward(const Stack<T>& stack, const View& x, const View& context, bool inverse, const View& inputs, const View& y,
             const View& logdet) {
  const int64_t samples = x.size[0], blocks = (samples + kSamples - 1) / kSamples;
  const int64_t* begins = inverse ? stack.end.data() : nullptr;
  const int64_t* ends = inverse ? nullptr : stack.end.data();
  parallel_for(blocks, samples * stack.work >= kParallelWork, [&](int64_t begin, int64_t end) {
    const Workspace<T> w(stack, false);
    const int64_t most = std::min((end - begin) * kSamples, kPass);
    std::vector<T> memory((stack.features + stack.context + 1) * most);
    T *state = memory.data(), *ctx = state + stack.features * most, *total = ctx + stack.context * most;
    for (int64_t start = begin * kSamples; start < std::min(end * kSamples, samples); start += most) {
      const int64_t count = std::min(most, std::min(end * kSamples, samples) - start);
      const int64_t n = (count + kSamples - 1) / kSamples * kSamples;
      load_rows(x, start, count, begins, n, state);
      if (context) load_rows(context, start, count, nullptr, n, ctx);
      std::fill(total, total + n, T(0));
      stack.each(inverse, [&](const Step<T>& s, int64_t number) {
        if (!s.coupling) {
          const T more = actnorm_logdet(s, inverse);
          for (int64_t i = 0; i < n; ++i) total[i] += more;
          return actnorm_rows(s, inverse, state, n);
        }
        if (inputs)
          for (int64_t d = 0; d < stack.features; ++d)
            std::copy_n(state + d * n, count, &at<T>(inputs, number, d, start));
        const CouplingConstants<T> c = s.constants(inverse);
        for (int64_t first = 0; first < n; first += kSamples) {
          gather_inputs(s, state, ctx, stack.context, n, first, w.inputs);
          networks<false>(s, w, stack.widest);
          with_form(s, inverse, [&](auto kind, auto add_first) {
            for (size_t j = 0; j < s.changed.size(); ++j) {
              const T* t = w.outputs + s.shift[j] * kSamples;
              const T* h = kind() == kNone ? t : w.outputs + s.raw[j] * kSamples;
              couple_rows<kind(), add_first()>(state + s.changed[j] * n + first, t, h, total + first,
                                               s.amplitude_of(j, c.map), c);
            }
          });
        }
      });
      store_rows(state, n, ends, y, start, count);
      for (int64_t i = 0; i < count; ++i) at<T>(logdet, start + i) = total[i];
    }
  });
}

// --- backward -------------------------------------------------------------------------------------------

// gW (+)= g y^T with rows of gW padded, gb += g, over the samples of a block. Where gW has few rows or columns, and in
// gb, the lanes of a vector are summed apart until the end of the step.
template <class T>
struct LayerGrad {
  T *weight, *dots, *bias;
};

template <class T>
void add_weight_grad(const Linear<T>& l, const T* g, const T* y, T* transposed, const LayerGrad<T>& to, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes, vectors = kSamples / lanes;
  const auto load = [](const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
  };
  const auto store = [add](V sum, T* at) {
    if (add) {
      V before;
      std::memcpy(&before, at, sizeof(V));
      sum += before;
    }
    std::memcpy(at, &sum, sizeof(V));
  };
  const bool narrow = Workspace<T>::is_narrow(l);
  for (int64_t i = 0; i < l.out; ++i) {
    const T* gi = g + i * kSamples;
    V sum = {};
    for (int64_t v = 0; v < vectors; ++v) sum += load(gi + v * lanes);
    store(sum, to.bias + i * lanes);
    if (!narrow) continue;
    for (int64_t j = 0; j < l.in; ++j) {
      V dot = {};
      for (int64_t v = 0; v < vectors; ++v) dot += load(gi + v * lanes) * load(y + j * kSamples + v * lanes);
      store(dot, to.dots + (i * l.in + j) * lanes);
    }
  }
  if (narrow) return;
  const int64_t row = padded(l.in);
  transpose_rows<kSamples>(y, l.in, transposed, row);
  const Left<T> left = {g, kSamples, 1};
  if (add)
    product<true>(l.out, row, kSamples, left, transposed, row, Start<T>{}, to.weight, row);
  else
    product<false>(l.out, row, kSamples, left, transposed, row, Start<T>{}, to.weight, row);
}

// Gradients of a coupling's parameters from where a step summed them to where the chunk keeps them.
template <class T>
void finish_layer(const Linear<T>& l, const LayerGrad<T>& from, T* sums) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < l.out; ++i) {
    sums[l.gbias + i] = tree_sum(from.bias + i * lanes, lanes);
    T* row = sums + l.gweight + i * l.in;
    if (!Workspace<T>::is_narrow(l)) {
      std::copy_n(from.weight + i * padded(l.in), l.in, row);
      continue;
    }
    for (int64_t j = 0; j < l.in; ++j) row[j] = tree_sum(from.dots + (i * l.in + j) * lanes, lanes);
  }
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
      if (Workspace<T>::is_narrow(l)) to.dots += l.out * l.in * lanes;
    }
    T *kept = hidden, *slope = slopes;
    LayerGrad<T> of = to;
    const T* gout = w.goutputs + net.first_output * kSamples;
    for (int64_t i = depth - 1; i >= 0; --i) {
      const Linear<T>& l = net.layers[i];
      of.weight -= l.out * padded(l.in), of.bias -= l.out * lanes;
      if (Workspace<T>::is_narrow(l)) of.dots -= l.out * l.in * lanes;
      if (i > 0) kept -= l.in * kSamples, slope -= l.in * kSamples;
      add_weight_grad(l, gout, i > 0 ? kept : w.inputs, w.transposed, of, add);
      T* gin = w.g[i % 2];
      product<false>(l.in, kSamples, l.out, Left<T>{l.weight, 1, l.in}, gout, kSamples, Start<T>{}, gin, kSamples);
      if (i > 0)
        with_hidden(s.activation, [&](auto kind) {
          slope_rows<kind()>(keeps_slope(kind()) ? slope : kept, gin, l.in * kSamples, s.leak);
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

// Features and their gradients of the samples of a chunk, n with the padding
template <class T>
struct Chunk {
  int64_t first, count, n;
  T *state, *g, *context, *gcontext, *glogdet;
};

template <class T>
void coupling_grad_step(const Stack<T>& stack, const Step<T>& s, bool inverse, const View& inputs, int64_t number,
                        const Chunk<T>& k, const Workspace<T>& w, T* sums) {
  const int64_t n = k.n;
  if (inputs)
    for (int64_t d = 0; d < stack.features; ++d) {
      T* row = k.state + d * n;
      std::copy_n(&at<T>(inputs, number, d, k.first), k.count, row);
      std::fill(row + k.count, row + n, row[k.count - 1]);
    }
  const CouplingConstants<T> c = s.constants(inverse), back = s.constants(!inverse);
  if (s.amplitudes) std::fill(sums + s.gamplitude, sums + s.gamplitude + s.amplitudes, T(0));
  for (int64_t first = 0; first < n; first += kSamples) {
    gather_inputs(s, k.state, k.context, stack.context, n, first, w.inputs);
    networks<true>(s, w, stack.widest);
    std::fill(w.goutputs, w.goutputs + s.outputs * kSamples, T(0));
    with_form(s, inverse, [&](auto kind, auto add_first) {
      with_bool(!inputs, [&](auto from_output) {
        for (size_t j = 0; j < s.changed.size(); ++j) {
          const T* t = w.outputs + s.shift[j] * kSamples;
          const T* h = kind() == kNone ? t : w.outputs + s.raw[j] * kSamples;
          T *gt = w.goutputs + s.shift[j] * kSamples, *gamplitude = w.spare, ignored[kSamples];
          T* gh = kind() == kNone ? ignored : w.goutputs + s.raw[j] * kSamples;
          std::fill(gamplitude, gamplitude + kSamples, T(0));
          const int64_t at = s.changed[j] * n + first;
          couple_rows_grad<kind(), add_first(), from_output()>(k.state + at, t, h, k.g + at, k.glogdet + first, gt, gh,
                                                               gamplitude, s.amplitude_of(j, c.map), c, back);
          if (s.amplitudes) sums[s.gamplitude + (s.amplitudes == 1 ? 0 : j)] += tree_sum(gamplitude, kSamples);
        }
      });
    });
    networks_grad(s, w, stack.context, n, first, first > 0, k.g, k.gcontext);
  }
  LayerGrad<T> from = {w.gweight, w.dots, w.gbias};
  for (const Network<T>& net : s.networks)
    for (const Linear<T>& l : net.layers) {
      finish_layer(l, from, sums);
      from.weight += l.out * padded(l.in), from.bias += l.out * Vector<T>::lanes;
      if (Workspace<T>::is_narrow(l)) from.dots += l.out * l.in * Vector<T>::lanes;
    }
}

// The state is y; it becomes x, (x + b) m = y or x m - b = y.
template <class T>
void actnorm_grad_step(const Step<T>& s, bool inverse, const Chunk<T>& k, T* sums) {
  for (size_t d = 0; d < s.rows.size(); ++d) {
    T *y = k.state + s.rows[d] * k.n, *g = k.g + s.rows[d] * k.n;
    const T a = s.gain * s.log_scale[d], b = s.bias[d], m = exp(inverse ? -a : a), one_m = exp(inverse ? a : -a);
    const T sign = inverse ? -s.gain : s.gain;
    T of_scale[kSamples] = {}, of_bias[kSamples] = {};
    for (int64_t first = 0; first < k.n; first += kSamples)
#pragma omp simd
      for (int64_t i = 0; i < kSamples; ++i) {
        const T gi = g[first + i], scaled = inverse ? y[first + i] + b : y[first + i], gx = gi * m;
        of_scale[i] += gi * scaled + k.glogdet[first + i];
        of_bias[i] += inverse ? -gi : gx;
        g[first + i] = gx;
        y[first + i] = inverse ? scaled * one_m : scaled * one_m - b;
      }
    sums[s.glog_scale + d] = sign * tree_sum(of_scale, kSamples);
    sums[s.gbias + d] = tree_sum(of_bias, kSamples);
  }
}

template <class T>
void backward(const Stack<T>& stack, const View& y, const View& context, const View& inputs, const View& gy,
              const View& glogdet, bool inverse, const View& gx, const View& gcontext,
              const std::vector<Parameter>& gparams) {
  const int64_t samples = y.size[0], blocks = (samples + kSamples - 1) / kSamples;
  const int64_t chunks = std::min(blocks, std::max<int64_t>(4, std::min(kChunks, blocks / 2)));
  const bool parallel = samples * stack.work >= kParallelWork;
  const int64_t* begins = inverse ? stack.end.data() : nullptr;
  const int64_t* ends = inverse ? nullptr : stack.end.data();
  const std::unique_ptr<T[]> sums(new T[chunks * stack.parameters]);
  parallel_for(chunks, parallel, [&](int64_t begin, int64_t end) {
    const Workspace<T> w(stack, true);
    const int64_t most = (blocks / std::max<int64_t>(1, chunks) + 1) * kSamples, each = stack.features + stack.context;
    std::vector<T> memory((2 * each + 1) * most);
    for (int64_t c = begin; c < end; ++c) {
      Chunk<T> k;
      k.first = c * blocks / chunks * kSamples, k.n = (c + 1) * blocks / chunks * kSamples - k.first;
      k.count = std::min(k.n, samples - k.first);
      k.state = memory.data(), k.g = k.state + stack.features * k.n, k.context = k.g + stack.features * k.n;
      k.gcontext = k.context + stack.context * k.n, k.glogdet = k.gcontext + stack.context * k.n;
      load_rows(y, k.first, k.count, ends, k.n, k.state);
      load_grads(gy, k.first, k.count, ends, k.n, k.g);
      if (context) load_rows(context, k.first, k.count, nullptr, k.n, k.context);
      std::fill(k.gcontext, k.gcontext + stack.context * k.n, T(0));
      std::fill(k.glogdet, k.glogdet + k.n, T(0));
      for (int64_t i = 0; i < k.count; ++i) k.glogdet[i] = at<T>(glogdet, k.first + i);
      T* own = sums.get() + c * stack.parameters;
      stack.each(!inverse, [&](const Step<T>& s, int64_t number) {
        if (s.coupling)
          coupling_grad_step(stack, s, inverse, inputs, number, k, w, own);
        else
          actnorm_grad_step(s, inverse, k, own);
      });
      store_rows(k.g, k.n, begins, gx, k.first, k.count);
      if (gcontext) store_rows(k.gcontext, k.n, static_cast<const int64_t*>(nullptr), gcontext, k.first, k.count);
    }
  });
  // the chunks in their order, whoever adds them
  std::vector<int64_t> starts(1, 0);
  for (const Parameter& g : gparams) starts.push_back(starts.back() + g.numbers);
  if (starts.back() != stack.parameters)
    throw std::invalid_argument("the gradients differ from the parameters in size");
  parallel_for(int64_t(gparams.size()), parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* out = static_cast<T*>(gparams[i].data);
      const int64_t n = starts[i + 1] - starts[i];
      if (chunks == 0) std::fill(out, out + n, T(0));
      for (int64_t c = 0; c < chunks; ++c) {
        const T* from = sums.get() + c * stack.parameters + starts[i];
        if (c == 0) {
          std::copy_n(from, n, out);
          continue;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] += from[j];
      }
    }
  });
}

// --- the functions that Python calls --------------------------------------------------------------------

void mlp_coupling_fwd(const View& x, const View& context, const pybind11::sequence& params,
                      const std::vector<int64_t>& code, const std::vector<double>& constants, bool inverse,
                      const View& inputs, const View& y, const View& logdet) {
  const std::vector<Parameter> given = parameters(params, x);
  const pybind11::gil_scoped_release release;
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Stack<T> stack(given, code, constants);
    for (const View& v : {x, y})
      if (v.dtype != dtype_of<T>() || v.size[1] != stack.features)
        throw std::invalid_argument("x does not fit its stack");
    if (context && (context.dtype != x.dtype || context.size[1] != stack.context || context.size[0] != x.size[0]))
      throw std::invalid_argument("the context does not fit its stack");
    if (!context && stack.context > 0) throw std::invalid_argument("a stack misses its context");
    forward(stack, x, context, inverse, inputs, y, logdet);
  });
}

void mlp_coupling_bwd(const View& y, const View& context, const pybind11::sequence& params, const View& inputs,
                      const View& gy, const View& glogdet, const std::vector<int64_t>& code,
                      const std::vector<double>& constants, bool inverse, const View& gx, const View& gcontext,
                      const pybind11::sequence& gparams) {
  const std::vector<Parameter> given = parameters(params, y), made = parameters(gparams, y);
  const pybind11::gil_scoped_release release;
  with_accumulator(y.dtype, [&](auto type) {
    using T = decltype(type);
    const Stack<T> stack(given, code, constants);
    for (const View& v : {y, gy, gx})
      if (v.dtype != dtype_of<T>() || v.size[1] != stack.features)
        throw std::invalid_argument("y does not fit its stack");
    if (context && (context.dtype != y.dtype || context.size[1] != stack.context || context.size[0] != y.size[0]))
      throw std::invalid_argument("the context does not fit its stack");
    if (!context && stack.context > 0) throw std::invalid_argument("a stack misses its context");
    backward(stack, y, context, inputs, gy, glogdet, inverse, gx, gcontext, made);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(mlp_coupling) {
  using namespace fastflow;
  m.def("mlp_coupling_fwd", &mlp_coupling_fwd);
  m.def("mlp_coupling_bwd", &mlp_coupling_bwd);
}
