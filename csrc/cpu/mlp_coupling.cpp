// Stacks of MLP couplings: value and log-determinant in one pass, all gradients in another that evaluates every network
// once more. A task has some samples and takes them through the stack step by step, so that the weights of one network
// and their gradients stay in L1 and L2; what passes from step to step are the D features of a sample.
//
// Features are rows: [D, samples], blocks of 64 samples. Products are then W [m, n] times [n, 64 samples], with W read
// in place, and W^T times gradients, the same with strides exchanged; only the gradient of W needs a transposed
// operand. Bound by the rate of multiply-adds.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "mlp_network.h"
#include "mlp_stack.h"
#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "scale_map.h"
#include "view.h"

namespace fastflow::mlp {
namespace {

constexpr int64_t kPass = 1024;                // samples that a forward takes through all steps together
constexpr int64_t kChunks = 16;                // partial sums of the parameters' gradients, at most
constexpr int64_t kChunkBlocks = 8;            // blocks of one of them, where there are more than four
constexpr int64_t kParallelWork = 128 * 1024;  // multiply-adds below which a second thread costs more than it gives

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
      if (is_narrow(l)) from.dots += l.out * l.in * Vector<T>::lanes;
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
  const int64_t chunks = std::min(blocks, std::max<int64_t>(4, std::min(kChunks, blocks / kChunkBlocks)));
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
  const std::vector<Parameter> given = parameters(params, &x);
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
  const std::vector<Parameter> given = parameters(params, &y), made = parameters(gparams);
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
}  // namespace fastflow::mlp

FASTFLOW_BIND(mlp_coupling) {
  using namespace fastflow::mlp;
  m.def("mlp_coupling_fwd", &mlp_coupling_fwd);
  m.def("mlp_coupling_bwd", &mlp_coupling_bwd);
}
