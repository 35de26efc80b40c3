// Stacks of MLP couplings: a block takes a tile of samples through all steps, what it knows of them in shared memory as
// rows [feature or unit][sample]; the parameters are read where they lie, one after the other, and stay in the caches.
// Backward evaluates every network once more; a block adds the parameters' gradients of its tiles to a share of its
// own, and a second launch adds up the shares in their order.
// The arguments are packed by fastflow/ops/cuda/mlp_coupling.py, the code of a stack by fastflow/ops/mlp_stack.py.
#include "../coupling.h"
#include "../mlp_coupling.h"
#include "launch.cuh"

namespace fastflow {

struct StackArguments {
  char *params, *code, *constants;  // of T, int64, double
  int64_t samples, tile, inverse;   // samples of a tile: 32 or a power of two below it
  Matrix context;
  char* inputs;  // of the couplings, [couplings, D, samples], where they are kept
};

// --- the stack, as MLPStack.code has it -------------------------------------------------------------------

template <class T>
struct Reader {
  const int64_t *code, *head;
  int features, contexts, count;

  FF_D explicit Reader(const StackArguments& a) {
    code = reinterpret_cast<const int64_t*>(a.code);
    features = int(code[0]), contexts = int(code[1]), count = int(code[2]);
    head = code + 3 + features;
  }
  FF_D int end(int feature) const { return int(code[3 + feature]); }
};

template <class T>
struct StepReader {
  const int64_t* code;
  const double* constants;
  int64_t first_param;
  int coupling;  // its number, -1 for an ActNorm

  FF_D StepReader(const Reader<T>& stack, const StackArguments& a, int i) {
    const int64_t* h = stack.head + 4 * i;
    code = stack.code + h[0], first_param = h[1];
    constants = reinterpret_cast<const double*>(a.constants) + h[2];
    coupling = code[0] == 1 ? int(h[3]) : -1;
  }
  FF_D T gain() const { return T(constants[0]); }  // of an ActNorm
  FF_D int row(int feature) const { return int(code[1 + feature]); }

  // of a coupling
  FF_D int inputs() const { return int(code[1]); }
  FF_D int input(int i) const { return int(code[2 + i]); }
  FF_D int changes() const { return int(code[2 + inputs()]); }
  FF_D const int64_t* lists() const { return code + 3 + inputs(); }
  FF_D int changed(int j) const { return int(lists()[j]); }
  FF_D int shift(int j) const { return int(lists()[changes() + j]); }
  FF_D bool scales() const { return lists()[2 * changes()] != 0; }
  FF_D int raw(int j) const { return int(lists()[2 * changes() + 1 + j]); }
  FF_D const int64_t* networks() const { return lists() + (scales() ? 3 : 2) * changes() + 1; }
};

// One linear layer of a network.
struct LinearLayer {
  int in, out;
  int64_t weight, bias;  // where they lie among the parameters
};

// What follows the networks in the code of a coupling
struct Tail {
  int activation, kind;
  bool add_first, divide;
  int amplitudes, outputs;
  int64_t amplitude;  // where it lies
};

// f(layer, number of the network, number of the layer, is it the last?) for all layers
template <class T, class F>
FF_D Tail each_layer(const StepReader<T>& s, int contexts, const F& f) {
  const int64_t* c = s.networks();
  const int networks = int(*c++);
  int64_t param = s.first_param;
  Tail tail = {};
  for (int k = 0; k < networks; ++k) {
    const int depth = int(*c++);
    int before = s.inputs() + contexts;
    for (int l = 0; l < depth; ++l) {
      const int out = int(*c++);
      const LinearLayer layer = {before, out, param, param + int64_t(before) * out};
      f(layer, k, l, l + 1 == depth);
      param += int64_t(before) * out + out, before = out;
    }
    tail.outputs += before;
  }
  tail.activation = int(c[0]), tail.kind = resolve(int(c[1]), s.constants[3]), tail.add_first = c[2] != 0,
  tail.divide = c[3] != 0;
  tail.amplitudes = int(c[4]), tail.amplitude = param;
  return tail;
}

template <class T>
FF_D CouplingConstants<T> coupling_constants(const StepReader<T>& s, const Tail& t, bool inverse) {
  const double* c = s.constants;
  const MapConstants<T> map = {T(c[0]), T(c[1]), T(c[2]), T(c[3]), T(c[4]), log(T(c[2]))};
  return {T(inverse ? -c[5] : c[5]), t.divide != inverse ? T(-1) : T(1), map};
}

template <class F>
FF_D void with_map(int kind, const F& f) {
  with_number<kNone, kExp, kSigmoid, kSoftplus, kTanh, kLinearTanh, kAtan, kSoftClip, kSigmoidEps>(kind, f);
}

template <class F>
FF_D void with_hidden(int activation, const F& f) {
  with_number<0, 1, 2, 3, 4, 5>(activation, f);
}

// --- rows in shared memory ------------------------------------------------------------------------------

// The rows of a tile, padded by one: neighbouring threads then read neighbouring banks along either side.
template <class T>
struct Tile {
  static constexpr int units = 4;  // outputs of a thread, one sample of each

  T* memory;
  int samples, row;
  int64_t first, count;  // the samples themselves, of all

  FF_D T* at(int i) const { return memory + i * row; }
  FF_D int sample() const { return int(threadIdx.x) % samples; }
  FF_D int lane() const { return int(threadIdx.x) / samples; }
  FF_D int lanes() const { return kThreads / samples; }
  // behind the end the last sample again
  FF_D int64_t global() const { return smaller(first + sample(), count - 1); }
  FF_D bool valid() const { return first + sample() < count; }
};

// f(row, sample) for n rows, by all threads
template <class T, class F>
FF_D void each_row(const Tile<T>& t, int n, const F& f) {
  for (int i = t.lane(); i < n; i += t.lanes()) f(i, t.sample());
  __syncthreads();
}

// y[m] = sum over k of w(m, k) x[k], from the bias where there is one; put(m, sample, value) stores it
template <class T, class F>
FF_D void dense(const Tile<T>& t, const T* w, int w_row, int w_column, const T* bias, int in, int out, const T* x,
                const F& put) {
  const int s = t.sample();
  for (int m = t.lane() * Tile<T>::units; m < out; m += t.lanes() * Tile<T>::units) {
    T sum[Tile<T>::units];
    int64_t at[Tile<T>::units];
#pragma unroll
    for (int u = 0; u < Tile<T>::units; ++u) {
      const int unit = m + u < out ? m + u : out - 1;
      sum[u] = bias ? bias[unit] : T(0), at[u] = int64_t(unit) * w_row;
    }
    for (int k = 0; k < in; ++k) {
      const T value = x[k * t.row + s];
#pragma unroll
      for (int u = 0; u < Tile<T>::units; ++u) sum[u] += w[at[u] + int64_t(k) * w_column] * value;
    }
#pragma unroll
    for (int u = 0; u < Tile<T>::units; ++u)
      if (m + u < out) put(m + u, s, sum[u]);
  }
  __syncthreads();
}

// Where the rows of a tile lie in shared memory; struct Rows of the launches counts them.
struct RowsOfTile {
  int64_t state, context, total, inputs, outputs, hidden, widest;  // first rows; hidden: two of `widest` in a forward
  int64_t slopes, goutputs, g, gcontext, gtile;                    // backward; gtile: two of `widest`
};

template <class T>
FF_D void gather(const StepReader<T>& s, const Tile<T>& t, const RowsOfTile& r, int contexts) {
  const int n = s.inputs();
  each_row(t, n + contexts, [&](int i, int b) {
    const int from = i < n ? s.input(i) : 0;
    const T* row = i < n ? t.at(int(r.state) + (from < 0 ? 0 : from)) : t.at(int(r.context) + i - n);
    t.at(int(r.inputs) + i)[b] = from < 0 ? T(0) : row[b];
  });
}

// The outputs of a coupling's networks; `keep`: the rows of all hidden layers one after the other, and their slopes
template <bool keep, class T>
FF_D Tail run_networks(const StepReader<T>& s, const StackArguments& a, const Tile<T>& t, const RowsOfTile& r,
                       int contexts) {
  const T* params = reinterpret_cast<const T*>(a.params);
  int hidden = 0, outputs = 0;
  const T* in = nullptr;
  const Tail tail = each_layer(s, contexts, [](const LinearLayer&, int, int, bool) {});
  const T leak = T(s.constants[6]);
  each_layer(s, contexts, [&](const LinearLayer& layer, int, int l, bool last) {
    if (l == 0) in = t.at(int(r.inputs));
    const T *weight = params + layer.weight, *bias = params + layer.bias;
    if (last) {
      T* out = t.at(int(r.outputs) + outputs);
      dense(t, weight, layer.in, 1, bias, layer.in, layer.out, in,
            [&](int m, int b, T value) { out[m * t.row + b] = value; });
      outputs += layer.out;
      return;
    }
    const int place = keep ? hidden : (l % 2) * int(r.widest);
    T *out = t.at(int(r.hidden) + place), *slopes = t.at(int(r.slopes) + (keep ? hidden : 0));
    with_hidden(tail.activation, [&](auto kind) {
      constexpr HiddenKind activation = HiddenKind(decltype(kind)::value);
      dense(t, weight, layer.in, 1, bias, layer.in, layer.out, in, [&](int m, int b, T value) {
        const Slope<T> f = fastflow::hidden<activation>(value, leak);
        out[m * t.row + b] = f.y;
        if constexpr (keep && keeps_slope(activation)) slopes[m * t.row + b] = f.d;
      });
    });
    hidden += layer.out;
    in = out;
  });
  return tail;
}

// --- forward --------------------------------------------------------------------------------------------

struct StackForward {
  StackArguments stack;
  RowsOfTile rows;
  Matrix x, y;
  char* logdet;
};

template <class T>
FF_D void mlp_coupling_fwd(const StackForward& a) {
  FF_SHARED(T, shared);
  const StackArguments& o = a.stack;
  const Reader<T> stack(o);
  const RowsOfTile& r = a.rows;
  const int n = int(o.tile);
  const Tile<T> t = {shared, n, n + 1, int64_t(blockIdx.x) * n, o.samples};
  const T* params = reinterpret_cast<const T*>(o.params);
  const bool inverse = o.inverse != 0;
  each_row(t, stack.features,
           [&](int d, int b) { t.at(int(r.state) + (inverse ? stack.end(d) : d))[b] = a.x.at<T>(t.global(), d); });
  each_row(t, stack.contexts, [&](int d, int b) { t.at(int(r.context) + d)[b] = o.context.at<T>(t.global(), d); });
  T* total = t.at(int(r.total));
  each_row(t, 1, [&](int, int b) { total[b] = T(0); });
  for (int i = 0; i < stack.count; ++i) {
    const StepReader<T> s(stack, o, inverse ? stack.count - 1 - i : i);
    if (s.coupling < 0) {
      const T *scale = params + s.first_param, *bias = scale + stack.features;
      each_row(t, stack.features, [&](int d, int b) {
        T& x = t.at(int(r.state) + s.row(d))[b];
        const T v = s.gain() * scale[d];
        x = inverse ? x * exp(-v) - bias[d] : (x + bias[d]) * exp(v);
      });
      each_row(t, 1, [&](int, int b) {
        double sum = 0;
        for (int d = 0; d < stack.features; ++d) sum += double(s.gain() * scale[d]);
        total[b] += T(inverse ? -sum : sum);
      });
      continue;
    }
    if (o.inputs)
      each_row(t, stack.features, [&](int d, int b) {
        if (t.valid())
          reinterpret_cast<T*>(o.inputs)[(int64_t(s.coupling) * stack.features + d) * o.samples + t.first + b] =
              t.at(int(r.state) + d)[b];
      });
    gather(s, t, r, stack.contexts);
    const Tail tail = run_networks<false>(s, o, t, r, stack.contexts);
    const CouplingConstants<T> c = coupling_constants(s, tail, inverse);
    with_map(tail.kind, [&](auto kind) {
      each_row(t, s.changes(), [&](int j, int b) {
        T &x = t.at(int(r.state) + s.changed(j))[b], &shift = t.at(int(r.outputs) + s.shift(j))[b];
        const T h = s.scales() ? t.at(int(r.outputs) + s.raw(j))[b] : T(0);
        const T amplitude = tail.amplitudes ? params[tail.amplitude + (tail.amplitudes == 1 ? 0 : j)] : c.map.amplitude;
        const auto v = coupling<decltype(kind)::value>(x, shift, h, amplitude, c, tail.add_first != inverse);
        x = v.y, shift = v.log_m;  // nobody needs the shift any more
      });
    });
    each_row(t, 1, [&](int, int b) {
      T sum = T(0);
      for (int j = 0; j < s.changes(); ++j) sum += t.at(int(r.outputs) + s.shift(j))[b];
      total[b] += sum;
    });
  }
  each_row(t, stack.features, [&](int d, int b) {
    if (t.valid()) a.y.at<T>(t.first + b, d) = t.at(int(r.state) + (inverse ? d : stack.end(d)))[b];
  });
  each_row(t, 1, [&](int, int b) {
    if (t.valid()) reinterpret_cast<T*>(a.logdet)[t.first + b] = total[b];
  });
}

// --- backward -------------------------------------------------------------------------------------------

struct StackBackward {
  StackArguments stack;
  RowsOfTile rows;
  Matrix y, gy, gx, gcontext;
  char* glogdet;
  int64_t glogdet_stride;
  char* partial;  // [blocks, parameters]
  int64_t parameters, blocks, tiles;
};

// sums of a block over its tiles, every one by the same thread
template <class T>
struct Share {
  T* to;
  bool first;

  FF_D void add(int64_t i, T value) const { to[i] = first ? value : to[i] + value; }
};

template <class T>
FF_D void layer_grad(const Tile<T>& t, const LinearLayer& l, const T* g, const T* y, const Share<T>& share) {
  const int groups = (l.out + Tile<T>::units - 1) / Tile<T>::units;
  for (int i = threadIdx.x; i < groups * l.in; i += kThreads) {
    const int m = i / l.in * Tile<T>::units, k = i % l.in;
    T sum[Tile<T>::units];
    int at[Tile<T>::units];
#pragma unroll
    for (int u = 0; u < Tile<T>::units; ++u) sum[u] = T(0), at[u] = (m + u < l.out ? m + u : l.out - 1) * t.row;
    for (int b = 0; b < t.samples; ++b) {
      const T value = y[k * t.row + b];
#pragma unroll
      for (int u = 0; u < Tile<T>::units; ++u) sum[u] += g[at[u] + b] * value;
    }
#pragma unroll
    for (int u = 0; u < Tile<T>::units; ++u)
      if (m + u < l.out) share.add(l.weight + int64_t(m + u) * l.in + k, sum[u]);
  }
  for (int m = threadIdx.x; m < l.out; m += kThreads) {
    double sum = 0;
    for (int b = 0; b < t.samples; ++b) sum += double(g[m * t.row + b]);
    share.add(l.bias + m, T(sum));
  }
}

template <class T>
FF_D void actnorm_grad(const StepReader<T>& s, const Tile<T>& t, const RowsOfTile& r, const T* params, int features,
                       bool inverse, const Share<T>& share) {
  const T* gl = t.at(int(r.total));
  for (int d = threadIdx.x; d < features; d += kThreads) {
    T *y = t.at(int(r.state) + s.row(d)), *g = t.at(int(r.g) + s.row(d));
    const T v = s.gain() * params[s.first_param + d], bias = params[s.first_param + features + d];
    const T m = exp(inverse ? -v : v), back = exp(inverse ? v : -v);
    double of_scale = 0, of_bias = 0;
    for (int b = 0; b < t.samples; ++b) {
      const T scaled = inverse ? y[b] + bias : y[b], gx = g[b] * m;
      of_scale += double(g[b] * scaled) + double(gl[b]);
      of_bias += double(inverse ? -g[b] : gx);
      g[b] = gx;
      y[b] = inverse ? scaled * back : scaled * back - bias;
    }
    share.add(s.first_param + d, T((inverse ? -s.constants[0] : s.constants[0]) * of_scale));
    share.add(s.first_param + features + d, T(of_bias));
  }
  __syncthreads();
}

template <class T>
FF_D void coupling_grad_step(const StepReader<T>& s, const StackArguments& o, const Tile<T>& t, const RowsOfTile& r,
                             const Reader<T>& stack, bool inverse, const Share<T>& share) {
  const T* params = reinterpret_cast<const T*>(o.params);
  if (o.inputs)
    each_row(t, stack.features, [&](int d, int b) {
      t.at(int(r.state) + d)[b] =
          reinterpret_cast<const T*>(o.inputs)[(int64_t(s.coupling) * stack.features + d) * o.samples + t.global()];
    });
  gather(s, t, r, stack.contexts);
  const Tail tail = run_networks<true>(s, o, t, r, stack.contexts);
  each_row(t, tail.outputs, [&](int i, int b) { t.at(int(r.goutputs) + i)[b] = T(0); });
  const CouplingConstants<T> c = coupling_constants(s, tail, inverse), back = coupling_constants(s, tail, !inverse);
  const bool add_first = tail.add_first != inverse, from_output = !o.inputs;
  const T* gl = t.at(int(r.total));
  with_map(tail.kind, [&](auto kind) {
    each_row(t, s.changes(), [&](int j, int b) {
      T &x = t.at(int(r.state) + s.changed(j))[b], &g = t.at(int(r.g) + s.changed(j))[b];
      T& shift = t.at(int(r.outputs) + s.shift(j))[b];
      const T h = s.scales() ? t.at(int(r.outputs) + s.raw(j))[b] : T(0);
      const T amplitude = tail.amplitudes ? params[tail.amplitude + (tail.amplitudes == 1 ? 0 : j)] : c.map.amplitude;
      const auto v = coupling_grad<decltype(kind)::value>(x, shift, h, amplitude, g, gl[b], c, add_first, from_output);
      if (from_output) x = coupling<decltype(kind)::value>(x, shift, h, amplitude, back, !add_first).y;
      g = v.gx, shift = v.gamplitude;  // nobody needs the shift any more
      t.at(int(r.goutputs) + s.shift(j))[b] = v.gt;
      if (s.scales()) t.at(int(r.goutputs) + s.raw(j))[b] = v.gh;
    });
  });
  for (int i = threadIdx.x; i < tail.amplitudes; i += kThreads) {
    T sum = T(0);
    for (int j = 0; j < s.changes(); ++j)
      if (tail.amplitudes == 1 || j == i)
        for (int b = 0; b < t.samples; ++b) sum += t.at(int(r.outputs) + s.shift(j))[b];
    share.add(tail.amplitude + i, sum);
  }
  // the layers from the last to the first: found again from the beginning, for they lie in this order
  int layers = 0;
  each_layer(s, stack.contexts, [&](const LinearLayer&, int, int, bool) { ++layers; });
  const T* gout = nullptr;
  for (int i = layers - 1; i >= 0; --i) {
    LinearLayer layer = {};
    int number = 0, hidden = 0, outputs = 0, depth_number = 0, l_of = 0;
    bool is_last = false;
    each_layer(s, stack.contexts, [&](const LinearLayer& one, int, int l, bool last) {
      if (number == i) layer = one, l_of = l, is_last = last, depth_number = hidden - one.in;
      if (number < i) last ? outputs += one.out : hidden += one.out;
      ++number;
    });
    if (is_last) gout = t.at(int(r.goutputs) + outputs);
    const T* y = l_of == 0 ? t.at(int(r.inputs)) : t.at(int(r.hidden) + depth_number);
    const T* slopes = t.at(int(r.slopes) + (l_of == 0 ? 0 : depth_number));
    layer_grad(t, layer, gout, y, share);
    T* gin = t.at(int(r.gtile) + (l_of % 2) * int(r.widest));
    const T* weight = params + layer.weight;
    const T leak = T(s.constants[6]);
    if (l_of > 0) {
      with_hidden(tail.activation, [&](auto kind) {
        constexpr HiddenKind activation = HiddenKind(decltype(kind)::value);
        dense(t, weight, 1, layer.in, static_cast<const T*>(nullptr), layer.out, layer.in, gout,
              [&](int m, int b, T value) {
                const int place = m * t.row + b;
                if constexpr (keeps_slope(activation))
                  gin[place] = value * slopes[place];
                else
                  gin[place] = value * slope_from_output<activation>(y[place], leak);
              });
      });
    } else {
      dense(t, weight, 1, layer.in, static_cast<const T*>(nullptr), layer.out, layer.in, gout,
            [&](int m, int b, T value) {
              const int from = m < s.inputs() ? s.input(m) : 0;
              T* to = m < s.inputs() ? t.at(int(r.g) + (from < 0 ? 0 : from)) : t.at(int(r.gcontext) + m - s.inputs());
              if (from >= 0) to[b] += value;
            });
    }
    gout = gin;
  }
}

template <class T>
FF_D void mlp_coupling_bwd(const StackBackward& a) {
  FF_SHARED(T, shared);
  const StackArguments& o = a.stack;
  const Reader<T> stack(o);
  const RowsOfTile& r = a.rows;
  const int n = int(o.tile);
  const bool inverse = o.inverse != 0;
  for (int64_t number = blockIdx.x; number < a.tiles; number += a.blocks) {
    const Tile<T> t = {shared, n, n + 1, number * n, o.samples};
    const Share<T> share = {reinterpret_cast<T*>(a.partial) + int64_t(blockIdx.x) * a.parameters,
                            number == int64_t(blockIdx.x)};
    each_row(t, stack.features, [&](int d, int b) {
      const int row = inverse ? d : stack.end(d);
      t.at(int(r.state) + row)[b] = a.y.at<T>(t.global(), d);
      t.at(int(r.g) + row)[b] = t.valid() ? a.gy.at<T>(t.global(), d) : T(0);
    });
    each_row(t, stack.contexts, [&](int d, int b) {
      t.at(int(r.context) + d)[b] = o.context.at<T>(t.global(), d);
      t.at(int(r.gcontext) + d)[b] = T(0);
    });
    each_row(t, 1, [&](int, int b) {
      const T gl = reinterpret_cast<const T*>(a.glogdet)[t.global() * a.glogdet_stride];
      t.at(int(r.total))[b] = t.valid() ? gl : T(0);
    });
    for (int i = 0; i < stack.count; ++i) {
      const StepReader<T> s(stack, o, inverse ? i : stack.count - 1 - i);
      if (s.coupling < 0)
        actnorm_grad(s, t, r, reinterpret_cast<const T*>(o.params), stack.features, inverse, share);
      else
        coupling_grad_step(s, o, t, r, stack, inverse, share);
    }
    each_row(t, stack.features, [&](int d, int b) {
      const int row = inverse ? stack.end(d) : d;
      if (t.valid()) a.gx.at<T>(t.first + b, d) = t.at(int(r.g) + row)[b];
    });
    each_row(t, stack.contexts, [&](int d, int b) {
      if (t.valid()) a.gcontext.at<T>(t.first + b, d) = t.at(int(r.gcontext) + d)[b];
    });
  }
}

}  // namespace fastflow
