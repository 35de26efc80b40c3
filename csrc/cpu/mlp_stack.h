// A stack of MLP couplings as its kernels see it: the code of MLPStack in fastflow/ops/mlp_stack.py, read and checked.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../coupling.h"
#include "../mlp_coupling.h"
#include "rows.h"
#include "scale_map.h"
#include "view.h"

namespace fastflow::mlp {

// --- parameters ---------------------------------------------------------------------------------------------

// A contiguous tensor; there are so many of them that what View asks of each would take as long as a small batch.
struct Parameter {
  void* data;
  int64_t numbers;
};

// Of the parameters, given `like`, also checks what would corrupt memory; gradients were allocated for this call.
inline std::vector<Parameter> parameters(const pybind11::sequence& tensors, const View* like = nullptr) {
  static PyObject* const names[5] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("numel"),
                                     PyUnicode_InternFromString("is_contiguous"), PyUnicode_InternFromString("dtype"),
                                     PyUnicode_InternFromString("is_cpu")};
  const auto owned = [](PyObject* answer) {
    if (!answer) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(answer);
  };
  std::vector<Parameter> found;
  found.reserve(tensors.size());
  for (const pybind11::handle tensor : tensors) {
    PyObject* t = tensor.ptr();
    const auto ask = [&](PyObject* name) { return owned(PyObject_CallMethodNoArgs(t, name)); };
    if (like && (owned(PyObject_GetAttr(t, names[4])).ptr() != Py_True || ask(names[2]).ptr() != Py_True ||
                 owned(PyObject_GetAttr(t, names[3])).ptr() != dtype_objects[int(like->dtype)]))
      throw std::invalid_argument("parameter " + std::to_string(found.size()) +
                                  " of a stack: expected a contiguous tensor of the dtype of x on the CPU");
    const auto pointer = ask(names[0]), n = ask(names[1]);
    found.push_back({reinterpret_cast<void*>(PyLong_AsSize_t(pointer.ptr())), PyLong_AsLongLong(n.ptr())});
  }
  return found;
}

// --- steps ----------------------------------------------------------------------------------------------

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

}  // namespace fastflow::mlp
