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
  if (blockIdx.x >= in.blocks) {
    const int64_t block = blockIdx.x - in.blocks;
    return in.rest.vector ? copy_rest<X, V>(in.rest, block) : copy_rest<X, 1>(in.rest, block);
  }
  const Team team(in.walk);
  const auto c = in.constants<T>();
  T sum = 0;
  with_kind(in.kind, [&](auto kind) {
    with_bool(in.add_first, [&](auto add_first) {
      const auto value = [&](T x, T t, T h, T amplitude) {
        return coupling<decltype(kind)::value, bool(decltype(add_first)::value)>(x, t, h, amplitude, c);
      };
      each_step<V, general>(in.walk, team, [&](const Position<general>& p) {
        T x[V], t[V], h[V], y[V];
        load<X>(in.x, p, x);
        load<P>(in.t, p, t);
        load<H>(in.h, p, h);
        if constexpr (general) {
          const auto r = value(x[0], t[0], h[0], in.amplitude_at(p, c.map.amplitude));
          const bool on = in.active(p);
          y[0] = on ? r.y : x[0];
          sum += !p.valid ? not_a_number<T>() : on ? r.log_m : T(0);
          if (!p.valid) return;
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const auto r = value(x[v], t[v], h[v], c.map.amplitude);
            y[v] = r.y;
            sum += r.log_m;
          }
        }
        store<X>(a.y, p, y);
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

template <class X, class P, class H, int V, bool general>
FF_D void coupling_bwd(const CouplingBackward& a) {
  using T = Accumulator<X>;
  const Coupling& in = a.in;
  if (blockIdx.x >= in.blocks) {
    const int64_t block = blockIdx.x - in.blocks;
    return in.rest.vector ? copy_rest<X, V>(in.rest, block) : copy_rest<X, 1>(in.rest, block);
  }
  const Team team(in.walk);
  if (!team.active) return;
  const auto c = in.constants<T>();
  const T glogdet = reinterpret_cast<const T*>(a.glogdet)[team.b * a.glogdet_stride];
  with_kind(in.kind, [&](auto kind) {
    with_bool(in.add_first, [&](auto add_first) {
      with_bool(a.from_output, [&](auto from_output) {
        const auto grad = [&](T x, T t, T h, T amplitude, T gy) {
          return coupling_grad<decltype(kind)::value, bool(decltype(add_first)::value),
                               bool(decltype(from_output)::value)>(x, t, h, amplitude, gy, glogdet, c);
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
    });
  });
}

}  // namespace fastflow
