// Affine coupling on the CPU: value and per-sample log-determinant in one pass over x and the packed parameters.
// Saved for backward: nothing beyond the inputs (or the output alone). Bound by memory bandwidth.
#include "../coupling.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "module.h"
#include "packing.h"
#include "rows.h"
#include "scale_map.h"

namespace fastflow {
namespace {

// Which elements are transformed: channels [start, stop), or the channels of `index`, or, where parity >= 0, the
// positions with (row + column) % 2 == parity.
struct Where {
  int64_t start, stop, parity, width;
};

// fastflow/ops/coupling.py: Options
using Packed = std::tuple<int, int, bool, bool, double, PackedMap, std::array<int64_t, 4>>;

struct Options {
  int packing, kind;
  bool add_first, divide;
  double shift_gain;
  PackedMap map;
  Where where;

  explicit Options(const Packed& p) {
    std::array<int64_t, 4> w;
    std::tie(packing, kind, add_first, divide, shift_gain, map, w) = p;
    kind = resolve(kind, map[3]);
    where = {w[0], w[1], w[2], w[3]};
  }
};

struct Operands {
  View x, t, h, amplitude;  // all [B, transformed channels, S]
  int64_t shape[3];
};

View select(const View& v, const Where& where, const View& index, int64_t channels) {
  if (!v || v.size[1] != channels) return v;  // already given for the transformed channels only
  if (index) return v.gather(reinterpret_cast<const int64_t*>(index.data), index.size[0]);
  return v.channels(where.start, where.stop - where.start);
}

Operands operands(const View& x, const View& params, const View& raw, const View& amplitude, const View& index,
                  const Options& o) {
  const Where& where = o.where;
  const int64_t channels = x.size[1];
  Operands in;
  in.x = select(x, where, index, channels);
  std::copy(in.x.size, in.x.size + 3, in.shape);
  const Unpacked p = unpack(params, raw, o.packing);
  in.t = select(p.first, where, index, channels).expand(in.shape);
  in.h = select(p.second, where, index, channels);
  in.h = in.h ? in.h.expand(in.shape) : in.t;  // additive: never looked at
  in.amplitude = amplitude ? select(amplitude, where, index, channels).expand(in.shape) : amplitude;
  return in;
}

template <class T>
const T* amplitudes(const Operands& in, const Walk& walk, const Box& box, const CouplingConstants<T>& c, T* buffer) {
  if (in.amplitude) return load(in.amplitude, walk, box, buffer);
  std::fill(buffer, buffer + box.size(), c.map.amplitude);
  return buffer;
}

// 1 where (row + column) % 2 == parity, and everywhere without a parity
template <class T>
const T* checkerboard(const Where& where, const Walk& walk, const Box& box, T* active) {
  if (where.parity < 0) {
    std::fill(active, active + box.size(), T(1));
    return active;
  }
  int64_t k = 0;
  for (int64_t b = 0; b < box.nb; ++b)
    for (int64_t o = box.o; o < box.o + box.no; ++o)
      for (int64_t i = box.i; i < box.i + box.ni; ++i, ++k) {
        const int64_t s = walk.channels_inner() ? o : i;
        active[k] = T((s / where.width + s % where.width) % 2 == where.parity);
      }
  return active;
}

// The channels that pass through unchanged.
void copy_rest(const View& x, const View& y, const Where& where, const View& index) {
  if (x.data == y.data || where.parity >= 0) return;
  // channels_last: one long copy, the changed channels included, is faster than many short ones
  if (x.stride[1] < x.stride[2] && std::equal(x.stride, x.stride + 3, y.stride)) return copy(x, y);
  if (!index) {
    copy(x.channels(0, where.start), y.channels(0, where.start));
    copy(x.channels(where.stop, x.size[1] - where.stop), y.channels(where.stop, x.size[1] - where.stop));
    return;
  }
  const int64_t* changed = reinterpret_cast<const int64_t*>(index.data);
  std::vector<bool> is_changed(x.size[1]);
  for (int64_t i = 0; i < index.size[0]; ++i) is_changed[changed[i]] = true;
  std::vector<int64_t> rest;
  for (int64_t c = 0; c < x.size[1]; ++c)
    if (!is_changed[c]) rest.push_back(c);
  copy(x.gather(rest.data(), rest.size()), y.gather(rest.data(), rest.size()));
}

template <class T>
CouplingConstants<T> constants_of(const Options& o) {
  return {T(o.shift_gain), T(o.divide ? -1 : 1), map_constants<T>(o.map)};
}

// Runs a loop with the sign a constant where a reciprocal would otherwise be computed for nothing.
template <int kind, class T, class Run>
inline __attribute__((always_inline)) void fixed_sign(CouplingConstants<T>& c, const Run& run) {
  if constexpr (!divides(kind)) return run();
  if (c.sign < T(0)) {
    c.sign = T(-1);
    run();
  } else {
    c.sign = T(1);
    run();
  }
}

// The loops proper: contiguous arrays, constants by value, nothing that would keep the compiler from vectorising.
// `elementwise`: the amplitude varies (a), and only elements with on != 0 are transformed.
template <int kind, bool add_first, bool elementwise, class T>
inline __attribute__((always_inline)) void forward_run(const T* x, const T* t, const T* h, const T* a, const T* on,
                                                       T* y, T* log_m, int64_t n, const CouplingConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto r = coupling<kind>(x[i], t[i], h[i], elementwise ? a[i] : c.map.amplitude, c, add_first);
    if constexpr (elementwise) {
      y[i] = on[i] != T(0) ? r.y : x[i];
      log_m[i] = on[i] != T(0) ? r.log_m : T(0);
    } else {
      y[i] = r.y;
      log_m[i] = r.log_m;
    }
  }
}

template <int kind, bool add_first, bool elementwise, class T>
void forward_loop(const T* x, const T* t, const T* h, const T* a, const T* on, T* y, T* log_m, int64_t n,
                  CouplingConstants<T> c) {
  const auto run = [&] { forward_run<kind, add_first, elementwise>(x, t, h, a, on, y, log_m, n, c); };
  fixed_sign<kind>(c, run);
}

template <int kind, bool add_first, bool elementwise, bool from_output, class T>
inline __attribute__((always_inline)) void backward_run(const T* x, const T* t, const T* h, const T* a, const T* on,
                                                        const T* gy, const T* glogdet, T* gx, T* gt, T* gh, T* ga,
                                                        int64_t n, const CouplingConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto r = coupling_grad<kind>(x[i], t[i], h[i], elementwise ? a[i] : c.map.amplitude, gy[i], glogdet[i], c,
                                       add_first, from_output);
    if constexpr (elementwise) {
      gx[i] = on[i] != T(0) ? r.gx : gy[i];
      gt[i] = on[i] != T(0) ? r.gt : T(0);
      gh[i] = on[i] != T(0) ? r.gh : T(0);
      ga[i] = on[i] != T(0) ? r.gamplitude : T(0);
    } else {
      gx[i] = r.gx;
      gt[i] = r.gt;
      gh[i] = r.gh;
    }
  }
}

template <int kind, bool add_first, bool elementwise, bool from_output, class T>
void backward_loop(const T* x, const T* t, const T* h, const T* a, const T* on, const T* gy, const T* glogdet, T* gx,
                   T* gt, T* gh, T* ga, int64_t n, CouplingConstants<T> c) {
  const auto run = [&] {
    backward_run<kind, add_first, elementwise, from_output>(x, t, h, a, on, gy, glogdet, gx, gt, gh, ga, n, c);
  };
  fixed_sign<kind>(c, run);
}

// Picks an instance of a loop: f(kind, add_first, elementwise) returns its address.
template <class F>
auto pick(int kind, bool add_first, bool elementwise, const F& f) {
  const auto by_flags = [&](auto kind) {
    using std::true_type, std::false_type;
    if (add_first) return elementwise ? f(kind, true_type(), true_type()) : f(kind, true_type(), false_type());
    return elementwise ? f(kind, false_type(), true_type()) : f(kind, false_type(), false_type());
  };
  return with_kind(kind, by_flags);
}

template <class T>
void forward(const Operands& in, const View& y, const View& logdet, const View& running, const Options& o) {
  const Walk walk(in.shape[0], in.shape[1], in.shape[2], in.x);
  SampleSums sums(walk, in.shape[0]);
  const CouplingConstants<T> constants = constants_of<T>(o);
  const bool elementwise = in.amplitude || o.where.parity >= 0;
  const auto loop = pick(o.kind, o.add_first, elementwise, [](auto kind, auto add_first, auto elementwise) {
    return &forward_loop<kind(), add_first(), elementwise(), T>;
  });
  for_boxes(walk, [&](const Box& box, int64_t k) {
    T bx[kTile], bt[kTile], bh[kTile], ba[kTile], bm[kTile], by[kTile], log_m[kTile];
    const T* x = load(in.x, walk, box, bx);
    const T* t = load(in.t, walk, box, bt);
    const T* h = o.kind == kNone ? t : load(in.h, walk, box, bh);
    const T* a = elementwise ? amplitudes(in, walk, box, constants, ba) : nullptr;
    const T* on = elementwise ? checkerboard(o.where, walk, box, bm) : nullptr;
    T* out = target(y, walk, box, by);
    loop(x, t, h, a, on, out, log_m, box.size(), constants);
    commit(y, walk, box, out, by);
    sums.add(box, k, log_m);
  });
  sums.finish(logdet, running);
}

template <class T>
void backward(const Operands& in, const View& gy, const View& glogdet, const View& gx, const View& gt, const View& gh,
              const View& gamplitude, bool from_output, const Options& o) {
  const Walk walk(in.shape[0], in.shape[1], in.shape[2], in.x);
  const CouplingConstants<T> constants = constants_of<T>(o);
  const bool elementwise = in.amplitude || o.where.parity >= 0;
  const auto loop = pick(o.kind, o.add_first, elementwise, [&](auto kind, auto add_first, auto elementwise) {
    return from_output ? &backward_loop<kind(), add_first(), elementwise(), true, T>
                       : &backward_loop<kind(), add_first(), elementwise(), false, T>;
  });
  for_boxes(walk, [&](const Box& box, int64_t) {
    T bx[kTile], bt[kTile], bh[kTile], ba[kTile], bm[kTile], bg[kTile], bl[kTile];
    T ox[kTile], ot[kTile], oh[kTile], oa[kTile];
    const T* x = load(in.x, walk, box, bx);
    const T* t = load(in.t, walk, box, bt);
    const T* h = o.kind == kNone ? t : load(in.h, walk, box, bh);
    const T* a = elementwise ? amplitudes(in, walk, box, constants, ba) : nullptr;
    const T* on = elementwise ? checkerboard(o.where, walk, box, bm) : nullptr;
    const T* g = load(gy, walk, box, bg);
    const T* l = load(glogdet, walk, box, bl);
    T* to_x = target(gx, walk, box, ox);
    T* to_t = target(gt, walk, box, ot);
    T* to_h = target(gh, walk, box, oh);
    T* to_a = target(gamplitude, walk, box, oa);
    loop(x, t, h, a, on, g, l, to_x, to_t, to_h, to_a, box.size(), constants);
    commit(gx, walk, box, to_x, ox);
    commit(gt, walk, box, to_t, ot);
    commit(gh, walk, box, to_h, oh);
    commit(gamplitude, walk, box, to_a, oa);
  });
}

// --- what Python sees: every view is [B, C, S], None where an argument is not used -------------------

void coupling_fwd(const View& x, const View& params, const View& raw, const View& amplitude, const View& index,
                  const View& running, const View& y, const View& logdet, const Packed& packed) {
  const Options o(packed);
  const Operands in = operands(x, params, raw, amplitude, index, o);
  const View out = select(y, o.where, index, x.size[1]);
  copy_rest(x, y, o.where, index);
  with_accumulator(x.dtype, [&](auto type) { forward<decltype(type)>(in, out, logdet, running, o); });
}

void coupling_bwd(const View& value, const View& params, const View& raw, const View& amplitude, const View& index,
                  const View& gy, const View& glogdet, const View& gx, const View& gparams, const View& graw,
                  const View& gamplitude, bool from_output, const Packed& packed) {
  const Options o(packed);
  const int64_t channels = value.size[1];
  const Operands in = operands(value, params, raw, amplitude, index, o);
  const Unpacked g = unpack(gparams, graw, o.packing);
  if (gx) copy_rest(gy, gx, o.where, index);
  with_accumulator(value.dtype, [&](auto type) {
    backward<decltype(type)>(in, select(gy, o.where, index, channels), glogdet.expand(in.shape),
                             select(gx, o.where, index, channels), select(g.first, o.where, index, channels),
                             select(g.second, o.where, index, channels), gamplitude, from_output, o);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(coupling) {
  using namespace fastflow;
  namespace py = pybind11;
  m.def("coupling_fwd", &coupling_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("coupling_bwd", &coupling_bwd, py::call_guard<py::gil_scoped_release>());
}
