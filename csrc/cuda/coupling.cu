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

constexpr int kCopies = 4;  // steps of a thread

template <class S, int V>
FF_D void copy_rest(const Rest& r, int64_t block) {
  const int64_t total = r.samples * r.outer * r.inner / V;
#pragma unroll
  for (int n = 0; n < kCopies; ++n) {
    const int64_t k = (block * kCopies + n) * kThreads + threadIdx.x;
    if (k >= total) return;
    Position p;
    const int64_t row = quotient(k * V, r.inner);
    p.i = k * V - row * r.inner, p.b = quotient(row, r.outer), p.o = row - p.b * r.outer;
    int64_t& channel = r.channels_inner ? p.i : p.o;
    channel += channel < r.start ? 0 : r.skip;
    const S* from = reinterpret_cast<const S*>(r.from.data) + p.offset(r.from);
    S* to = reinterpret_cast<S*>(r.to.data) + p.offset(r.to);
    if (V > 1 && r.from.wide && r.to.wide)
      *reinterpret_cast<Words<S, V>*>(to) = *reinterpret_cast<const Words<S, V>*>(from);
    else
      for (int v = 0; v < V; ++v) to[v * r.to.inner] = from[v * r.from.inner];
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

  // is position s one that changes?
  FF_HD bool active(int64_t s) const {
    return parity < 0 || ((quotient(s, width) + s) - quotient(s, width) * width) % 2 == parity;
  }
  FF_HD bool active(const Position& p, int v) const { return active(walk.channels_inner ? p.o : p.i + v); }

  template <int V, class T>
  FF_HD void load_amplitude(const Position& p, T constant, T (&to)[V]) const {
    if (amplitude.data) return load<T, V>(amplitude, p, to);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = constant;
  }
};

struct CouplingForward {
  Coupling in;
  Operand y;
  Sums sums;
};

template <class X, class P, class H, int V>
FF_D void coupling_fwd(const CouplingForward& a) {
  using T = Accumulator<X>;
  const Coupling& in = a.in;
  if (blockIdx.x >= in.blocks) {
    const int64_t block = blockIdx.x - in.blocks;
    return in.rest.vector ? copy_rest<X, V>(in.rest, block) : copy_rest<X, 1>(in.rest, block);
  }
  const Team team(in.walk);
  const auto c = in.constants<T>();
  T sum = 0;
  with_kind(in.kind, [&](auto kind) {
    with_bool(in.add_first, [&](auto add_first) {
      each_step<V>(in.walk, team, [&](const Position& p) {
        T x[V], t[V], h[V], amplitude[V], y[V];
        load<X, V>(in.x, p, x);
        load<P, V>(in.t, p, t);
        load<H, V>(in.h, p, h);
        in.load_amplitude<V>(p, c.map.amplitude, amplitude);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto r = coupling<kind.value, bool(add_first.value)>(x[v], t[v], h[v], amplitude[v], c);
          const bool on = in.active(p, v);
          y[v] = on ? r.y : x[v];
          sum += p.valid ? (on ? r.log_m : T(0)) : bit_cast<T>(~typename Float<T>::Int(0));  // NaN: a wrong index
        }
        if (p.valid) store<X, V>(a.y, p, y);
      });
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

template <class X, class P, class H, int V>
FF_D void coupling_bwd(const CouplingBackward& a) {
  using T = Accumulator<X>;
  const Coupling& in = a.in;
  if (blockIdx.x >= in.blocks) {
    const int64_t block = blockIdx.x - in.blocks;
    return in.rest.vector ? copy_rest<X, V>(in.rest, block) : copy_rest<X, 1>(in.rest, block);
  }
  const Team team(in.walk);
  const auto c = in.constants<T>();
  if (!team.active) return;
  const T glogdet = reinterpret_cast<const T*>(a.glogdet)[team.b * a.glogdet_stride];
  with_kind(in.kind, [&](auto kind) {
    with_bool(in.add_first, [&](auto add_first) {
      with_bool(a.from_output, [&](auto from_output) {
        each_step<V>(in.walk, team, [&](const Position& p) {
          T x[V], t[V], h[V], amplitude[V], gy[V], gx[V], gt[V], gh[V], ga[V];
          load<X, V>(in.x, p, x);
          load<P, V>(in.t, p, t);
          load<H, V>(in.h, p, h);
          load<X, V>(a.gy, p, gy);
          in.load_amplitude<V>(p, c.map.amplitude, amplitude);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const auto r = coupling_grad<kind.value, bool(add_first.value), bool(from_output.value)>(
                x[v], t[v], h[v], amplitude[v], gy[v], glogdet, c);
            const bool on = in.active(p, v);
            gx[v] = on ? r.gx : gy[v];
            gt[v] = on ? r.gt : T(0);
            gh[v] = on ? r.gh : T(0);
            ga[v] = on ? r.gamplitude : T(0);
          }
          if (!p.valid) return;
          store<X, V>(a.gx, p, gx);
          store<P, V>(a.gt, p, gt);
          store<H, V>(a.gh, p, gh);
          store<T, V>(a.gamplitude, p, ga);
        });
      });
    });
  });
}

}  // namespace fastflow
