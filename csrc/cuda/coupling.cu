// Affine coupling on a GPU: value and per-sample log-determinant in one pass over x and the packed parameters; blocks
// beyond those of the walk copy the channels that pass through. Bound by memory bandwidth.
// The arguments are packed by fastflow/ops/cuda/coupling.py.
#include "../coupling.h"
#include "walk.cuh"

namespace fastflow {

// What passes through unchanged: channels before `start`, and those `skip` further on.
struct Rest {
  Operand from, to;  // [samples, outer, inner] with only these channels counted
  int64_t samples, outer, inner, start, skip, channels_inner, vector;
};

[[maybe_unused]] constexpr int kCopies = 4;  // steps of a thread

template <class S, int V>
FF_D void copy_rest(const Rest& r, int64_t block) {
  const int64_t total = r.samples * r.outer * r.inner / V;
#pragma unroll
  for (int n = 0; n < kCopies; ++n) {
    const int64_t k = (block * kCopies + n) * kThreads + threadIdx.x;
    if (k >= total) return;
    Position<false> p;
    const int64_t row = quotient(k * V, r.inner);
    p.i = k * V - row * r.inner, p.b = quotient(row, r.outer), p.o = row - p.b * r.outer;
    if (r.channels_inner)
      p.i += p.i < r.start ? 0 : r.skip;
    else
      p.o += p.o < r.start ? 0 : r.skip;
    Accumulator<S> values[V];  // wider than what is copied, so nothing is rounded
    load<S>(r.from, p, values);
    store<S>(r.to, p, values);
  }
}

struct Coupling {
  Walk walk;
  int64_t blocks;  // of the walk
  Rest rest;
  Operand x, t, h, amplitude;
  int64_t kind, add_first, parity, width;
  double shift_gain, sign;
  Map map;

  template <class T>
  FF_HD CouplingConstants<T> constants() const {
    return {T(shift_gain), T(sign), map.constants<T>()};
  }

  // what the blocks beyond those of the walk do
  template <class X, int V>
  FF_D void copy_rest() const {
    const int64_t block = blockIdx.x - blocks;
    rest.vector ? fastflow::copy_rest<X, V>(rest, block) : fastflow::copy_rest<X, 1>(rest, block);
  }

  // is this position one that changes?
  FF_HD bool active(const Position<true>& p) const {
    const int64_t s = walk.channels_inner ? p.o : p.i, row = quotient(s, width);
    return parity < 0 || (row + s - row * width) % 2 == parity;
  }

  template <class T>
  FF_HD T amplitude_at(const Position<true>& p, T constant) const {
    return amplitude.data ? reinterpret_cast<const T*>(amplitude.data)[p.offset(amplitude)] : constant;
  }
};

struct CouplingForward {
  Coupling in;
  Operand y;
  Sums sums;
};

// `general`: with an index, a checkerboard or a learned amplitude, one element a step
template <class X, class P, class H, int V, bool general>
FF_D void coupling_fwd(const CouplingForward& a) {
  using T = Accumulator<X>;
  const Coupling& in = a.in;
  if (blockIdx.x >= in.blocks) return in.copy_rest<X, V>();
  const Team team(in.walk);
  const auto c = in.constants<T>();
  T sum = 0;
  const bool add_first = in.add_first;
  with_kind(in.kind, [&](auto kind) {
    each_step<V, general>(in.walk, team, [&](const Position<general>& p) {
      T x[V], t[V], h[V], y[V];
      load<X>(in.x, p, x);
      load<P>(in.t, p, t);
      load<H>(in.h, p, h);
      if constexpr (general) {
        const auto r =
            coupling<decltype(kind)::value>(x[0], t[0], h[0], in.amplitude_at(p, c.map.amplitude), c, add_first);
        const bool on = in.active(p);
        y[0] = on ? r.y : x[0];
        sum += !p.valid ? not_a_number<T>() : on ? r.log_m : T(0);
        if (!p.valid) return;
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto r = coupling<decltype(kind)::value>(x[v], t[v], h[v], c.map.amplitude, c, add_first);
          y[v] = r.y;
          sum += r.log_m;
        }
      }
      store<X>(a.y, p, y);
    });
  });
  add_up<T>(in.walk, team, a.sums, double(sum));
}

struct CouplingBackward {
  Coupling in;
  Operand gy, gx, gt, gh, gamplitude;
  char* glogdet;
  int64_t glogdet_stride, from_output;
};

template <class X, class P, class H, int V, bool general>
FF_D void coupling_bwd(const CouplingBackward& a) {
  using T = Accumulator<X>;
  const Coupling& in = a.in;
  if (blockIdx.x >= in.blocks) return in.copy_rest<X, V>();
  const Team team(in.walk);
  if (!team.active) return;
  const auto c = in.constants<T>();
  const T glogdet = reinterpret_cast<const T*>(a.glogdet)[team.b * a.glogdet_stride];
  const bool add_first = in.add_first, from_output = a.from_output;
  with_kind(in.kind, [&](auto kind) {
    const auto grad = [&](T x, T t, T h, T amplitude, T gy) {
      return coupling_grad<decltype(kind)::value>(x, t, h, amplitude, gy, glogdet, c, add_first, from_output);
    };
    each_step<V, general>(in.walk, team, [&](const Position<general>& p) {
      T x[V], t[V], h[V], gy[V], gx[V], gt[V], gh[V];
      load<X>(in.x, p, x);
      load<P>(in.t, p, t);
      load<H>(in.h, p, h);
      load<X>(a.gy, p, gy);
      if constexpr (general) {
        const auto r = grad(x[0], t[0], h[0], in.amplitude_at(p, c.map.amplitude), gy[0]);
        const bool on = in.active(p);
        const T ga[1] = {on ? r.gamplitude : T(0)};
        gx[0] = on ? r.gx : gy[0], gt[0] = on ? r.gt : T(0), gh[0] = on ? r.gh : T(0);
        if (!p.valid) return;
        store<T>(a.gamplitude, p, ga);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto r = grad(x[v], t[v], h[v], c.map.amplitude, gy[v]);
          gx[v] = r.gx, gt[v] = r.gt, gh[v] = r.gh;
        }
      }
      store<X>(a.gx, p, gx);
      store<P>(a.gt, p, gt);
      store<H>(a.gh, p, gh);
    });
  });
}

}  // namespace fastflow
